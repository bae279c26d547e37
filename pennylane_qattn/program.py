"""Programs: the gates of an ansatz, traced once from its PennyLane description, as plain data.

The trace knows every gate by name and wires, and every angle as a torch expression of the weights. PennyLane is not
needed to evaluate it, nor the function it came from.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any

import numpy as np
import pennylane as qml
import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn.graph import Graph, trace
from pennylane_qattn.transforms import ordinary_mode

#: One-angle gates; whatever is not here is decomposed by PennyLane until it is.
ROTATIONS = frozenset(
    """RX RY RZ PhaseShift CRX CRY CRZ ControlledPhaseShift IsingXX IsingYY IsingZZ IsingXY PSWAP MultiRZ PauliRot
    SingleExcitation DoubleExcitation""".split()
)
#: Gates without a parameter.
FIXED = frozenset(
    """Identity PauliX PauliY PauliZ Hadamard S T SX CNOT CY CZ CH SWAP ISWAP Toffoli CSWAP CCZ""".split()
)
#: Where a trace is compared with its function: several turns, both signs, and weights all of one sign.
_RANGES = ((0.0, 2 * np.pi), (-4 * np.pi, 4 * np.pi), (-2 * np.pi, 0.0), (-1.0, 1.0), (2 * np.pi, 8 * np.pi))
#: Operations that pick entries and compute nothing.
_SELECTING = frozenset(
    """select slice view _unsafe_view reshape unbind split squeeze unsqueeze permute transpose t alias expand
    _operator""".split()
)
_GLOBAL_PHASES = frozenset({"GlobalPhase"})
_MATRIX = "QubitUnitary"


@dataclass(frozen=True)
class Gate:
    """One gate: a rotation by `angle` (its place among the program's angles), or a constant matrix.

    Attributes:
        name: PennyLane's name.
        wires: the wires it acts on, the first being the most significant.
        angle: which angle turns it; `None` for a constant gate.
        word: the Pauli word of a `PauliRot`.
        matrix: a constant gate's matrix, rows of (real, imaginary) pairs.
    """

    name: str
    wires: tuple[int, ...]
    angle: int | None = None
    word: str | None = None
    matrix: tuple | None = None

    @cached_property
    def constant(self) -> np.ndarray:
        """The matrix of a constant gate, complex128."""
        pairs = np.asarray(self.matrix, dtype=np.float64)
        return pairs[..., 0] + 1j * pairs[..., 1]


def constant_gate(operation: qml.operation.Operator) -> Gate:
    """An operation whose parameters never change, with its matrix."""
    matrix = np.asarray(qml.math.toarray(qml.matrix(operation)), dtype=complex)
    pairs = tuple(tuple((float(z.real), float(z.imag)) for z in row) for row in matrix)
    return Gate(operation.name, tuple(int(wire) for wire in operation.wires), matrix=pairs)


@dataclass(frozen=True)
class Program:
    """Gates on wires 0 to `num_wires` - 1 with angles computed from weights of a given shape.

    Attributes:
        num_wires: number of wires.
        shape: shape of the weights.
        gates: the gates in order.
        entries: for each angle the flat index of the weight it equals; `None` where angles are computed.
        angles_graph: computes the angles where they are not simply weights.
    """

    num_wires: int
    shape: tuple[int, ...]
    gates: tuple[Gate, ...]
    entries: tuple[int, ...] | None
    angles_graph: Graph | None = None

    @classmethod
    def trace(
        cls, function: Callable[[Tensor, Sequence[int]], Any], shape: tuple[int, ...], num_wires: int, label: str = ""
    ) -> "Program":
        """Traces a quantum function of `(weights, wires)`.

        Raises:
            ValueError: if its gates depend on the values of the weights, leave torch, act on other wires, or are no
                unitary gates.
        """
        label = label or getattr(function, "__qualname__", type(function).__qualname__)
        recorded: list = []

        def angles(weights: Tensor) -> list:
            recorded[:] = _record(function, weights, num_wires, label)
            return [parameter for gate in recorded for parameter in gate.parameters]

        examples = [_example(shape, low, high) for low, high in _RANGES]
        try:
            with ordinary_mode():
                graph, results = trace(angles, examples[0])
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"ansatz {label} cannot be run on weights of shape {tuple(shape)}: {error}") from error
        except ValueError as error:
            if "reads the values" not in str(error):
                raise
            raise ValueError(
                f"ansatz {label}: the gates must not depend on the values of the angles, and angles must stay torch "
                f"tensors; {error}"
            ) from None
        gates, used = _gates(recorded, results, label)
        graph = Graph(graph.inputs, graph.nodes, tuple(graph.outputs[i] for i in used))
        program = cls(num_wires, tuple(shape), gates, None, graph)
        program._check(function, examples[1:], label)
        entries = program._entries()
        return program if entries is None else cls(num_wires, tuple(shape), gates, entries)

    @property
    def num_angles(self) -> int:
        return len(self.entries) if self.angles_graph is None else len(self.angles_graph.outputs)

    def angles(self, weights: Float[Tensor, "..."]) -> Float[Tensor, "circuits angles"]:
        """The angles of many circuits: weights `(circuits, *shape)` -> `(circuits, angles)`, radians."""
        if self.entries is not None:
            return weights.reshape(len(weights), -1)[:, list(self.entries)]
        # traced in float64, and run in it: constants of the trace have that precision
        of_each = [torch.stack([a.reshape(()) for a in self.angles_graph(w)]) for w in weights.double()]
        return torch.stack(of_each).to(weights.dtype)

    def queue(self, weights: Float[Tensor, "..."], wires: Sequence[int]) -> None:
        """Queues the gates as PennyLane operations on the given wires."""
        angles = self.angles(weights[None])[0] if self.num_angles else ()
        for gate in self.gates:
            on = [wires[w] for w in gate.wires]
            if gate.angle is None:
                qml.QubitUnitary(gate.constant, wires=on) if gate.name not in FIXED else getattr(qml, gate.name)(on)
            elif gate.word is not None:
                qml.PauliRot(angles[gate.angle], gate.word, wires=on)
            else:
                getattr(qml, gate.name)(angles[gate.angle], wires=on)

    def to_plain(self) -> dict[str, Any]:
        """The program as plain data."""
        gates = [
            {
                "gate": g.name,
                "wires": list(g.wires),
                "angle": g.angle,
                "word": g.word,
                "matrix": None if g.matrix is None else [[list(entry) for entry in row] for row in g.matrix],
            }
            for g in self.gates
        ]
        return {
            "num_wires": self.num_wires,
            "shape": list(self.shape),
            "gates": gates,
            "entries": None if self.entries is None else list(self.entries),
            "angles": None if self.angles_graph is None else self.angles_graph.to_plain(),
        }

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> "Program":
        """Reads `to_plain`.

        Raises:
            ValueError: if the data are not a program.
        """
        try:
            gates = tuple(
                Gate(
                    g["gate"],
                    tuple(g["wires"]),
                    g["angle"],
                    g["word"],
                    None if g["matrix"] is None else tuple(tuple(map(tuple, row)) for row in g["matrix"]),
                )
                for g in data["gates"]
            )
            graph = None if data["angles"] is None else Graph.from_plain(data["angles"])
            entries = None if data["entries"] is None else tuple(data["entries"])
            program = cls(data["num_wires"], tuple(data["shape"]), gates, entries, graph)
            program._validate()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"not a traced ansatz: {' '.join(str(error).split())}") from None
        return program

    def _validate(self) -> None:
        """Refuses what no trace gives: `ValueError`, or whatever error running the angles raises."""

        def require(sound: bool, what: str) -> None:
            if not sound:
                raise ValueError(what)

        sizes = (self.num_wires, *self.shape)
        require(all(type(n) is int and 0 < n < 2**20 for n in sizes), f"wires and shape {sizes!r} are no sizes")
        require(prod(self.shape) < 2**20, f"shape {self.shape!r} is too large")
        for gate in self.gates:
            wires_there = all(type(w) is int and 0 <= w < self.num_wires for w in gate.wires)
            require(wires_there and len(set(gate.wires)) == len(gate.wires) > 0, f"wires {gate.wires!r}")
            if gate.angle is None:
                require(gate.name in ROTATIONS | FIXED | {_MATRIX}, f"a gate is unknown: {gate.name!r}")
                square = gate.constant.shape == (2 ** len(gate.wires),) * 2
                require(square and _is_unitary(gate.constant), f"the matrix of {gate.name} is not unitary")
            else:
                require(gate.name in ROTATIONS, f"a gate is unknown: {gate.name!r}")
                require(type(gate.angle) is int and 0 <= gate.angle < self.num_angles, f"angle {gate.angle!r}")
                size = len(gate.word) if gate.name == "PauliRot" else getattr(qml, gate.name).num_wires
                require(size in (None, len(gate.wires)), f"{gate.name} on {len(gate.wires)} wires")
                require((gate.word is None) == (gate.name != "PauliRot"), f"word {gate.word!r} of {gate.name}")
        if self.angles_graph is None:
            known = range(prod(self.shape))
            require(all(type(i) is int and i in known for i in self.entries), f"entries {self.entries!r}")
        else:
            require(self.angles_graph.inputs == 1, "the angles are computed from more than the weights")
            self.angles(torch.ones(1, *self.shape))

    def _entries(self) -> tuple[int, ...] | None:
        """For angles that are plain entries of the weights: which ones."""
        if not all(name.partition(".")[0] in _SELECTING for name, _, _ in self.angles_graph.nodes):
            return None
        numbers = torch.arange(prod(self.shape), dtype=torch.float64).reshape(self.shape)
        return tuple(int(a) for a in self.angles_graph(numbers))

    def _check(self, function: Callable, examples: list[Tensor], label: str) -> None:
        """The trace must give what the function gives for other weights too."""
        for weights in examples:
            recorded = _record(function, weights, self.num_wires, label)
            angles = self.angles(weights[None])[0] if self.num_angles else ()
            agree = len(recorded) == len(self.gates)
            for gate, operation in zip(self.gates, recorded, strict=False):
                agree &= gate.name == operation.name and gate.wires == tuple(operation.wires)
                if agree and gate.angle is not None:
                    agree &= bool(torch.isclose(angles[gate.angle], torch.as_tensor(operation.parameters[0]).double()))
                elif agree:
                    agree &= bool(np.allclose(gate.constant, qml.math.toarray(qml.matrix(operation))))
            if not agree:
                raise ValueError(
                    f"ansatz {label}: its gates or angles change with the values of the weights in a way that torch "
                    "does not see; keep the gates fixed and the angles torch expressions of the weights"
                )


def _is_unitary(matrix: np.ndarray) -> bool:
    return bool(np.allclose(matrix @ matrix.conj().T, np.eye(len(matrix))))


def _example(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    numbers = np.random.default_rng(11).uniform(low, high, size=shape)
    return torch.as_tensor(numbers, dtype=torch.float64)


def _record(function: Callable, weights: Tensor, num_wires: int, label: str) -> list[qml.operation.Operator]:
    with qml.queuing.AnnotatedQueue() as queue:
        function(weights, list(range(num_wires)))
    tape = qml.tape.QuantumScript.from_queue(queue)
    if tape.measurements:
        raise ValueError(f"ansatz {label}: it must not measure; the observables are chosen elsewhere")
    gate_set = ROTATIONS | FIXED | _GLOBAL_PHASES | {_MATRIX}
    with warnings.catch_warnings():
        # what could not be decomposed is refused below, with a line of our own
        warnings.filterwarnings("ignore", message="Operator .* does not define a decomposition")
        (tape,), _ = qml.transforms.decompose(tape, gate_set=gate_set)
    operations = [op for op in tape.operations if op.name not in _GLOBAL_PHASES and op.name != "Barrier"]
    for operation in operations:
        if operation.name not in gate_set:
            raise ValueError(f"ansatz {label}: {operation.name} is no unitary gate that can be folded")
        if not set(operation.wires) <= set(range(num_wires)):
            raise ValueError(
                f"ansatz {label}: {operation.name} acts on wires {operation.wires.tolist()}; "
                f"use the {num_wires} wires that are passed in"
            )
    return operations


def _gates(recorded: list, results: list, label: str) -> tuple[tuple[Gate, ...], list[int]]:
    """Gates from the recorded operations, and which traced values are their angles."""
    gates, used, position = [], [], 0
    for operation in recorded:
        values = results[position : position + len(operation.parameters)]
        position += len(values)
        traced = [v["ref"] for v in values if isinstance(v, dict)]
        wires = tuple(int(wire) for wire in operation.wires)
        if not traced:
            gates.append(constant_gate(operation))
            if not _is_unitary(gates[-1].constant):
                raise ValueError(f"ansatz {label}: the matrix of {operation.name} is not unitary")
        elif operation.name == _MATRIX:
            raise ValueError(f"ansatz {label}: a matrix that depends on the weights cannot be traced; use rotations")
        else:
            if (size := operation.parameters[0].numel()) != 1:
                raise ValueError(f"ansatz {label}: {operation.name} takes one angle; got {size}")
            word = operation.hyperparameters.get("pauli_word")
            gates.append(Gate(operation.name, wires, angle=len(used), word=word))
            used.append(traced[0])
    return tuple(gates), used


@dataclass(frozen=True)
class Harmonics:
    r"""The matrix of a gate, :math:`U(\theta) = C + A \cos a\theta + B \sin a\theta`.

    Every gate of `ROTATIONS` is of that kind. A constant gate is its :math:`C`.

    Attributes:
        frequency: :math:`a`, 1/2 or 1.
        constant, cosine, sine: :math:`C`, :math:`A` and :math:`B`.
    """

    frequency: float
    constant: np.ndarray
    cosine: np.ndarray
    sine: np.ndarray

    @classmethod
    def of(cls, gate: Gate) -> "Harmonics":
        """Those of a gate; of a rotation by PennyLane's own matrices."""
        if gate.angle is not None:
            return _harmonics(gate.name, gate.word, len(gate.wires))
        nothing = np.zeros_like(gate.constant)
        return cls(1.0, gate.constant, nothing, nothing)

    def matrix(self, angle: float) -> np.ndarray:
        """The matrix at an angle, radians."""
        turned = self.frequency * angle
        return self.constant + self.cosine * np.cos(turned) + self.sine * np.sin(turned)


@cache
def _harmonics(name: str, word: str | None, num_wires: int) -> Harmonics:
    def matrix(angle: float) -> np.ndarray:
        wires = list(range(num_wires))
        gate = qml.PauliRot(angle, word, wires) if word is not None else getattr(qml, name)(angle, wires=wires)
        return np.asarray(qml.matrix(gate), dtype=complex)

    for frequency in (0.5, 1.0):
        start, quarter, half = (matrix(turn * np.pi / frequency) for turn in (0, 0.5, 1))
        constant = (start + half) / 2
        parts = (constant, (start - half) / 2, quarter - constant)
        # halves and ones up to rounding, so that zeros are zeros
        found = Harmonics(frequency, *(np.where(np.abs(part) < 1e-12, 0, part) for part in parts))
        if all(np.allclose(found.matrix(angle), matrix(angle), atol=1e-12) for angle in (0.3, 1.9, 4.1, 8.7)):
            return found
    raise ValueError(f"{name} is no sum of a constant, a sine and a cosine of its angle")
