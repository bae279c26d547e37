"""Circuits as PennyLane tapes: many inputs and angles at once, with noise and with measurement settings."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pennylane as qml
import torch
from jaxtyping import Float
from pennylane.operation import Operator
from pennylane.tape import QuantumScript
from torch import Tensor

from pennylane_qattn.circuit import Circuit
from pennylane_qattn.noise import Noise
from pennylane_qattn.observables import group_words, to_pennylane, word_action
from pennylane_qattn.program import FIXED, ROTATIONS, Gate, constant_gate

#: Gates that turn the measurement basis of a letter to Z.
_TO_Z = {"X": (qml.Hadamard,), "Y": (partial(qml.RX, np.pi / 2),), "Z": ()}


@dataclass
class Job:
    """One head's circuit for several inputs.

    A job's rows are picked as an array's are, `job[rows]`.

    Attributes:
        head: which circuit.
        states: prepared states `(inputs, 2 ** wires)`; `None` where gates encode.
        encoding: angles of the encoding's gates `(inputs, gates)`; `None` where a state is prepared.
        angles: angles of the ansatz, `(angles,)` for all inputs or `(inputs, angles)`.
    """

    head: int
    states: np.ndarray | None
    encoding: np.ndarray | None
    angles: np.ndarray

    @property
    def size(self) -> int:
        """Number of inputs."""
        return len(self.states if self.encoding is None else self.encoding)

    def __getitem__(self, rows: slice | np.ndarray) -> "Job":
        states, encoding = (None if a is None else a[rows] for a in (self.states, self.encoding))
        return Job(self.head, states, encoding, self.angles if self.angles.ndim == 1 else self.angles[rows])


class Tapes:
    """Builds the tapes of circuits that share encoding and ansatz.

    Args:
        circuits: one per head.
        noise: what follows the gates and precedes the readout.
        shots: of every tape.
    """

    def __init__(self, circuits: Sequence[Circuit], noise: Noise, shots: int | None):
        first = circuits[0]
        self.num_features, self.num_wires, self.noise, self.shots = first.num_features, first.num_wires, noise, shots
        self.wires = range(self.num_wires)
        self.encoding = first.encoding
        self.program = first.ansatz.program(self.num_wires)
        # here every rotation has an angle of its own, numbered in order
        turned = [gate for gate in self.program.gates if gate.angle is not None]
        numbers = iter(range(len(turned)))
        self._angle_of = [gate.angle for gate in turned]
        self.gates = tuple(g if g.angle is None else replace(g, angle=next(numbers)) for g in self.program.gates)
        self.encoding_gates = encoding_gates(first) if self.encoding.uses_gates else ()
        self.words = [tuple(dict.fromkeys(circuit.words)) for circuit in circuits]
        #: for each head where its words stand among the distinct ones
        self.places = [[distinct.index(w) for w in c.words] for distinct, c in zip(self.words, circuits, strict=True)]
        #: for each head its settings: a basis and the distinct words that are read in it
        self.settings = [group_words(words) for words in self.words]

    @property
    def by_setting(self) -> bool:
        """Whether words are sampled setting by setting, and not all read from one simulated state."""
        return self.shots is not None

    def readout_factors(self, head: int) -> np.ndarray:
        r"""What readout errors leave of each word's exact value, :math:`(1 - 2r)^w` for a word on w wires."""
        return np.array([(1 - 2 * self.noise.readout) ** (len(w) - w.count("I")) for w in self.words[head]])

    def tapes_per_circuit(self, head: int) -> int:
        """Executions that one head needs for one input."""
        return len(self.settings[head]) if self.by_setting else 1

    def expectations(self, job: Job, broadcast: bool) -> list[QuantumScript]:
        """Tapes that measure a job's distinct words, input by input (or all inputs in one), settings within."""
        if self.by_setting:
            endings = [self._setting(job.head, setting) for setting in range(len(self.settings[job.head]))]
        else:
            endings = [([], [qml.expval(to_pennylane(word, self.wires)) for word in self.words[job.head]])]
        return [
            QuantumScript([*operations, *turn], measurements, shots=self.shots)
            for operations in self._operations(job, broadcast)
            for turn, measurements in endings
        ]

    def with_states(self, job: Job, broadcast: bool) -> list[QuantumScript]:
        """Tapes that measure a job's distinct words and return its final states."""
        words = [qml.expval(to_pennylane(word, self.wires)) for word in self.words[job.head]]
        return [QuantumScript(operations, [*words, qml.state()]) for operations in self._operations(job, broadcast)]

    def states(self, job: Job, broadcast: bool) -> list[QuantumScript]:
        """Tapes that return a job's final states, a word beside them so that all wires count."""
        z = qml.expval(qml.Z(self.num_wires - 1))
        return [QuantumScript(operations, [z, qml.state()]) for operations in self._operations(job, broadcast)]

    def backwards(self, job: Job, broadcast: bool) -> list[QuantumScript]:
        """Tapes that run the ansatz backwards on a job's states, and return what comes out."""
        gates = [qml.adjoint(gate, lazy=False) for gate in reversed(self._ansatz(job.angles))]
        z = qml.expval(qml.Z(self.num_wires - 1))
        return [QuantumScript([*start, *gates], [z, qml.state()]) for start in self._starts(job, broadcast)]

    def gathered(self, job: Job, results: Sequence[Sequence[Any]], broadcast: bool) -> np.ndarray:
        """The words `(inputs, words)` from what the tapes of `expectations` (or `with_states`) measured."""
        distinct = len(self.words[job.head])
        values = np.empty((job.size, distinct))
        if not self.by_setting:
            for row, result in enumerate(results):
                values[slice(None) if broadcast else row] = np.stack(result[:distinct], axis=-1)
            return (values * self.readout_factors(job.head))[:, self.places[job.head]]
        settings = self.settings[job.head]
        for number, result in enumerate(results):
            row, setting = divmod(number, len(settings))
            columns = list(settings[setting][1])
            target = np.ix_(range(job.size) if broadcast else [row], columns)
            values[target] = np.stack(result, axis=-1).reshape(-1, len(columns))
        return values[:, self.places[job.head]]

    def gathered_states(self, results: Sequence[tuple[np.ndarray, ...]], broadcast: bool) -> np.ndarray:
        """The states `(inputs, 2 ** wires)`; a device's further wires, which stay `|0>`, are left out."""
        if not results:
            return np.zeros((0, 2**self.num_wires), dtype=complex)
        states = results[0][-1] if broadcast else np.stack([result[-1] for result in results])
        return states.reshape(len(states), 2**self.num_wires, -1)[..., 0]

    def trainable(self, tapes: Sequence[QuantumScript], columns: Sequence[int]) -> None:
        """Marks what tapes are differentiated by: some of the angles, the encoding's first, then the ansatz's."""
        # matrices, channels and prepared states have parameters too
        rotations = [i for i, info in enumerate(tapes[0].par_info) if info["op"].name in ROTATIONS]
        for tape in tapes:
            tape.trainable_params = [rotations[column] for column in columns]

    def of_observables(self, job: Job, observables: Sequence[Operator]) -> list[QuantumScript]:
        """Tapes that measure one observable for each input."""
        each = zip(self._operations(job, False), observables, strict=True)
        return [QuantumScript(operations, [qml.expval(observable)]) for operations, observable in each]

    def on_distinct(self, head: int, weights: np.ndarray) -> np.ndarray:
        """Weights `(inputs, words)` of a head's words, added up for each distinct word."""
        total = np.zeros((len(weights), len(self.words[head])))
        for place, column in zip(self.places[head], weights.T, strict=True):
            total[:, place] += column
        return total

    def hamiltonians(self, head: int, weights: np.ndarray) -> list[Operator]:
        """For each input the sum of a head's words with its weights."""
        words = [to_pennylane(word, self.wires) for word in self.words[head]]
        return [qml.ops.LinearCombination(list(row), words) for row in self.on_distinct(head, weights)]

    def apply_hamiltonians(self, head: int, weights: np.ndarray, states: np.ndarray) -> np.ndarray:
        """The sums of a head's words, applied to one state each: `(inputs, 2 ** wires)`."""
        total = np.zeros_like(states)
        for word, column in zip(self.words[head], self.on_distinct(head, weights).T, strict=True):
            source, phases = word_action(word)
            total += column[:, None] * phases * states[:, source]
        return total

    def angles(self, weights: Float[Tensor, "heads ..."]) -> Float[Tensor, "heads angles"]:
        """The angles of the ansatz's rotations, in order, differentiable."""
        if not self._angle_of:
            return weights.new_zeros(len(weights), 0)
        return self.program.angles(weights)[:, self._angle_of]

    def _ansatz(self, angles: Any) -> list[Operator]:
        return [operation(gate, None if gate.angle is None else angles[..., gate.angle]) for gate in self.gates]

    def operations(self, states: Any, encoding: Any, angles: Any) -> list[Operator]:
        """A circuit's operations with its noise; arrays or torch tensors, with or without inputs in front."""
        return [*self._noisy(self._start(states, encoding)), *self._noisy(self._ansatz(angles))]

    def example(self) -> Job:
        """A circuit of the first head, to try what a device can do with it."""
        encoded = len([gate for gate in self.encoding_gates if gate.angle is not None])
        encoding = np.full((1, encoded), 0.3) if self.encoding.uses_gates else None
        state = None if self.encoding.uses_gates else np.eye(1, 2**self.num_wires)
        return Job(0, state, encoding, np.full(len(self._angle_of), 0.3))

    def _operations(self, job: Job, broadcast: bool):
        shared = self._noisy(self._ansatz(job.angles)) if broadcast or job.angles.ndim == 1 else None
        for row, start in enumerate(self._starts(job, broadcast)):
            yield [*self._noisy(start), *(self._noisy(self._ansatz(job.angles[row])) if shared is None else shared)]

    def _starts(self, job: Job, broadcast: bool):
        for row in [slice(None)] if broadcast else range(job.size):
            if job.encoding is None:
                yield self._start(job.states[row], None)
            else:
                yield self._start(None, job.encoding[row])

    def _start(self, states: Any, encoding: Any) -> list[Operator]:
        if not self.encoding.uses_gates:
            # normalised by the encoding; PennyLane's own check would refuse what float32 rounds
            return [qml.StatePrep(states, wires=self.wires, validate_norm=False)]
        gates = self.encoding_gates
        return [operation(gate, None if gate.angle is None else encoding[..., gate.angle]) for gate in gates]

    def _noisy(self, operations: Sequence[Operator]) -> list[Operator]:
        if not self.noise:
            return list(operations)
        return [each for op in operations for each in (op, *self.noise.after_gate(op.wires))]

    def _setting(self, head: int, setting: int):
        basis, members = self.settings[head][setting]
        turn = [gate(wire) for wire, letter in zip(self.wires, basis, strict=True) for gate in _TO_Z[letter]]
        turn += self.noise.before_readout(self.wires)
        signs = ["".join("I" if letter == "I" else "Z" for letter in self.words[head][word]) for word in members]
        return turn, [qml.expval(to_pennylane(word, self.wires)) for word in signs]


def operation(gate: Gate, angle: Any) -> Operator:
    """A traced gate as a PennyLane operation."""
    wires = list(gate.wires)
    if angle is None:
        return getattr(qml, gate.name)(wires) if gate.name in FIXED else qml.QubitUnitary(gate.constant, wires=wires)
    if gate.word is not None:
        return qml.PauliRot(angle, gate.word, wires=wires)
    return getattr(qml, gate.name)(angle, wires=wires)


@lru_cache(maxsize=1024)
def encoding_gates(circuit: Circuit) -> tuple[Gate, ...]:
    """The gates of an encoding that uses gates; a gate's angle is its place in `encoding_angles`."""
    gates: list[Gate] = []
    angles = 0
    inputs = torch.ones(1, circuit.num_features, dtype=torch.float64, requires_grad=True)
    for op in _encode(circuit, inputs):
        wires = tuple(int(wire) for wire in op.wires)
        if op.name in FIXED:
            gates.append(Gate(op.name, wires))
        elif not any(getattr(parameter, "requires_grad", False) for parameter in op.parameters):
            gates.append(constant_gate(op))  # its angle is no input's, so it is nothing to differentiate by
        elif op.name in ROTATIONS:
            gates.append(Gate(op.name, wires, angle=angles, word=op.hyperparameters.get("pauli_word")))
            angles += 1
        else:
            raise ValueError(f"encoding {circuit.encoding.name!r}: {op.name} is no gate that devices can differentiate")
    return tuple(gates)


def encoding_angles(circuit: Circuit, x: Tensor) -> Tensor:
    """The angles `(inputs, gates)` of the encoding's gates for inputs `(inputs, features)`, differentiable."""
    angles = [
        op.parameters[0].to(x).expand(len(x))
        for op, gate in zip(_encode(circuit, x), encoding_gates(circuit), strict=True)
        if gate.angle is not None
    ]
    return torch.stack(angles, dim=-1) if angles else x.new_zeros(len(x), 0)


def _encode(circuit: Circuit, x: Tensor) -> list[Operator]:
    with qml.queuing.AnnotatedQueue() as queue:
        circuit.encoding.prepare(x, range(circuit.num_wires))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Operator .* does not define a decomposition")
        (tape,), _ = qml.transforms.decompose(QuantumScript.from_queue(queue), gate_set=ROTATIONS | FIXED)
    return tape.operations
