r"""What circuits take: qubits, gates, depth, measurement settings, executions by method, shots for an accuracy.

Gates and depth are counted by PennyLane's `resources_from_tape` (what `qml.specs` reports), T gates by its estimator.
An execution is one circuit sent to a device with one input, one set of angles and one measurement setting.

Shots: a Pauli word measured N times has the standard error :math:`\sqrt{(1 - \langle P\rangle^2)/N}`, at most
:math:`1/\sqrt N`, so :math:`N = 1/\epsilon^2` shots of a setting bring the standard error of each of its words to
:math:`\epsilon` at most. For an error below :math:`\epsilon` in all of W words at once with probability
:math:`1 - \delta`, Hoeffding's inequality (values in [-1, 1], union bound) asks for
:math:`N = (2/\epsilon^2)\,\ln(2W/\delta)`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pennylane as qml
import torch

from pennylane_qattn.ansatz import Ansatz
from pennylane_qattn.attention import Attention
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.counting import Executions, inference_executions, settings_of, training_executions
from pennylane_qattn.encoding import Encoding
from pennylane_qattn.features import StateFeatureMap, circuit_within
from pennylane_qattn.gates import EncodingBox, ansatz_operations, encoding_operations
from pennylane_qattn.planning import METHODS

#: The maps of an attention, in the order in which they are listed.
MAPS = ("query", "key", "value")


@dataclass(frozen=True)
class GateCounts:
    """Gates of one circuit.

    Attributes:
        depth: layers of gates that can run at once.
        one_qubit, two_qubit: gates on so many qubits, an encoding that is one box left out.
        by_name: gates by PennyLane's names.
    """

    depth: int
    one_qubit: int
    two_qubit: int
    by_name: dict[str, int]


@dataclass(frozen=True)
class CircuitResources:
    """What one circuit takes.

    Attributes:
        qubits: number of wires.
        features: length of the vector that is encoded.
        encoding, ansatz: their names.
        angles: trainable angles.
        words, distinct_words: Pauli words measured.
        settings: measurement settings; words that commute wire by wire share one.
        boxed: gates with the encoding as one box.
        decomposed: gates with the encoding decomposed, as hardware runs them.
        t_gates: T gates on a fault-tolerant machine, by PennyLane's estimator at its standard precision.
    """

    qubits: int
    features: int
    encoding: str
    ansatz: str
    angles: int
    words: int
    distinct_words: int
    settings: int
    boxed: GateCounts
    decomposed: GateCounts
    t_gates: int


def circuit_resources(circuit: Circuit) -> CircuitResources:
    """Counts one circuit; circuits that differ in their words only share the work."""
    return CircuitResources(
        words=len(circuit.words),
        distinct_words=len(set(circuit.words)),
        settings=settings_of(circuit.words),
        **_structure(circuit.num_features, circuit.encoding, circuit.ansatz),
    )


@lru_cache(maxsize=64)
def _structure(num_features: int, encoding: Encoding, ansatz: Ansatz) -> dict[str, Any]:
    """What does not depend on the words."""
    circuit = _any_words(num_features, encoding, ansatz)
    rng = np.random.default_rng(0)  # any input and angles: the gates are the same for all
    prepare = encoding_operations(circuit, rng.normal(size=num_features))
    turn = ansatz_operations(circuit, torch.as_tensor(rng.uniform(0.1, 3.0, size=circuit.weight_shape)))
    box = EncodingBox(encoding, range(circuit.num_wires))
    return {
        "qubits": circuit.num_wires,
        "features": num_features,
        "encoding": encoding.name,
        "ansatz": ansatz.label,
        "angles": math.prod(circuit.weight_shape),
        "boxed": _count([box, *turn], turn),
        "decomposed": _count([*prepare, *turn], [*prepare, *turn]),
        "t_gates": _t_gates([*prepare, *turn]),
    }


def _any_words(num_features: int, encoding: Encoding, ansatz: Ansatz) -> Circuit:
    return Circuit(num_features, ("Z" * encoding.num_wires(num_features),), encoding, ansatz)


def _count(operations: Sequence[qml.operation.Operator], sized: Sequence[qml.operation.Operator]) -> GateCounts:
    """Depth and names of all the operations, sizes of some of them."""
    everything = qml.resource.resources_from_tape(qml.tape.QuantumScript(operations))
    sizes = qml.resource.resources_from_tape(qml.tape.QuantumScript(sized), compute_depth=False).gate_sizes
    return GateCounts(everything.depth, sizes.get(1, 0), sizes.get(2, 0), dict(sorted(everything.gate_types.items())))


def _t_gates(operations: Sequence[qml.operation.Operator]) -> int:
    def run() -> None:
        for operation in operations:
            qml.apply(operation)

    return int(qml.estimator.estimate(run)().gate_counts.get("T", 0))


# --- shots ------------------------------------------------------------------------------------------------------


def shots_for_standard_error(epsilon: float, value: float = 0.0) -> int:
    r"""Shots for a standard error of :math:`\epsilon` of a Pauli word with this expectation value; 0 is the worst.

    :math:`N = (1 - \langle P\rangle^2)/\epsilon^2`, and at least 1.
    """
    _check_epsilon(epsilon)
    if not -1 <= value <= 1:
        raise ValueError(f"the expectation value of a Pauli word lies in [-1, 1]; got {value}")
    variance = 1 - value**2
    return max(1, qml.estimator.estimate_shots([np.ones(1)], variances=[variance], error=epsilon))


def shots_for_confidence(epsilon: float, confidence: float = 0.95, words: int = 1) -> int:
    r"""Shots for errors below :math:`\epsilon` in all words at once with this probability (Hoeffding, union bound).

    :math:`N = (2/\epsilon^2)\,\ln(2W/(1 - \text{confidence}))` for each setting.
    """
    _check_epsilon(epsilon)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1); got {confidence}")
    if words < 1:
        raise ValueError(f"words must be at least 1; got {words}")
    return math.ceil(2 / epsilon**2 * math.log(2 * words / (1 - confidence)))


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon <= 1:
        raise ValueError(f"the accuracy of an expectation value must lie in (0, 1]; got {epsilon}")


# --- a whole model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CircuitGroup:
    """Circuits of a model that are alike but for the letters of their words.

    Attributes:
        maps: which maps they belong to: "query", "key", "value".
        for_states: their final states are compared, and no words are measured.
        members: layer, head and map of each, layers and heads counted from 1.
        circuits: the circuits.
    """

    maps: tuple[str, ...]
    for_states: bool
    members: tuple[tuple[int, int, str], ...]
    circuits: tuple[Circuit, ...]

    @property
    def count(self) -> int:
        """Number of circuits."""
        return len(self.circuits)

    @property
    def each(self) -> tuple[CircuitResources, ...]:
        """What each of them takes."""
        return tuple(map(circuit_resources, self.circuits))

    def inference(self, sampling: bool = False) -> int | None:
        """Executions for one token, all circuits together; `None` where no words are measured."""
        if sampling and self.for_states:
            return None
        return sum(inference_executions(circuit, sampling) for circuit in self.circuits)

    def training(self, method: str, tokens: int = 1, **options: Any) -> Executions | None:
        """Executions of a training step on so many distinct tokens, all circuits together.

        Args:
            method: one of `METHODS`.
            tokens: how many.
            **options: `sampling`, `gives_states` and `options` of `training_executions`.
        """
        found = [training_executions(c, method, for_states=self.for_states, **options) for c in self.circuits]
        if None in found:
            return None
        parts = ("forward", "angles", "inputs")
        return Executions(*(tokens * sum(getattr(each, part) for each in found) for part in parts))


def circuit_groups(attentions: Iterable[Attention]) -> list[CircuitGroup]:
    """The circuits of a model's layers, those that are alike together.

    Args:
        attentions: the attention of each layer, in order; an iterator may make them one by one.
    """
    groups: dict[tuple, list[tuple[tuple[int, int, str], Circuit]]] = {}
    for layer, attention in enumerate(attentions, 1):
        for name in MAPS:
            feature_map = circuit_within(getattr(attention, f"{name}_map"))
            if feature_map is None:
                continue
            for_states = isinstance(feature_map, StateFeatureMap)
            for head, circuit in enumerate(feature_map.circuits, 1):
                kind = (for_states, circuit.num_features, len(circuit.words), circuit.encoding, circuit.ansatz)
                groups.setdefault(kind, []).append(((layer, head, name), circuit))
    found = []
    for (for_states, *_), alike in groups.items():
        members, circuits = zip(*alike, strict=True)
        maps = tuple(name for name in MAPS if any(member[2] == name for member in members))
        found.append(CircuitGroup(maps, for_states, members, circuits))
    return found


#: How a training step may run: exactly on a device that gives states, exactly on one that does not, or by shots.
MODES: dict[str, dict[str, bool]] = {
    "exact": {},
    "exact_without_states": {"gives_states": False},
    "sampling": {"sampling": True},
}


def to_plain(group: CircuitGroup, tokens: int, directions: int = 1) -> dict[str, Any]:
    """A group as plain data, for JSON: all that `qattn resources` prints, and every circuit.

    Args:
        group: the circuits.
        tokens: distinct tokens of a training step.
        directions: of spsa.
    """
    each = group.each
    circuit = asdict(each[0])
    for name in ("distinct_words", "settings"):
        del circuit[name]
    if group.for_states:
        circuit["words"] = 0
    steps: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        options = {"num_directions": directions} if method == "spsa" else {}
        steps[method] = {}
        for mode, how in MODES.items():
            found = group.training(method, tokens, options=options, **how)
            steps[method][mode] = None if found is None else {**asdict(found), "total": found.total}
    return {
        "maps": list(group.maps),
        "measures": "states" if group.for_states else "words",
        "circuits": group.count,
        "circuit": circuit,
        "members": [
            {
                "layer": layer,
                "head": head,
                "map": name,
                "distinct_words": None if group.for_states else one.distinct_words,
                "settings": None if group.for_states else one.settings,
            }
            for (layer, head, name), one in zip(group.members, each, strict=True)
        ],
        "executions_per_token": {"exact": group.inference(), "sampling": group.inference(sampling=True)},
        "executions_per_training_step": steps,
    }
