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

#: One-angle gates; whatever is not here is decomposed by PennyLane until it is.
ROTATIONS = frozenset(
    """RX RY RZ PhaseShift CRX CRY CRZ ControlledPhaseShift IsingXX IsingYY IsingZZ IsingXY PSWAP MultiRZ PauliRot
    SingleExcitation DoubleExcitation""".split()
)
#: Gates without a parameter.
FIXED = frozenset(
    """Identity PauliX PauliY PauliZ Hadamard S T SX CNOT CY CZ CH SWAP ISWAP Toffoli CSWAP CCZ""".split()
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
        cls, function: Callable[[Tensor, Sequence[int]], Any], shape: tuple[int, ...], num_wires: int
    ) -> "Program":
        """Traces a quantum function of `(weights, wires)`.

        Raises:
            ValueError: if its gates depend on the values of the weights, leave torch, act on other wires, or are no
                unitary gates.
        """
        label = getattr(function, "__qualname__", None) or repr(function)
        recorded: list = []

        def angles(weights: Tensor) -> list:
            recorded[:] = _record(function, weights, num_wires, label)
            return [parameter for gate in recorded for parameter in gate.parameters]

        examples = [_example(shape, seed) for seed in (11, 13, 17)]
        try:
            graph, results = trace(angles, examples[0])
        except ValueError as error:
            raise ValueError(
                f"ansatz {label}: the gates must not depend on the values of the angles, and angles must stay torch "
                f"tensors; {error}"
            ) from None
        gates, used = _gates(recorded, results, label)
        graph = Graph(graph.inputs, graph.nodes, tuple(graph.outputs[i] for i in used))
        program = cls(num_wires, tuple(shape), gates, None, graph)
        program._check(function, examples[1:], label)
        entries = program._entries(examples)
        return program if entries is None else cls(num_wires, tuple(shape), gates, entries)

    @property
    def num_angles(self) -> int:
        return len(self.entries) if self.angles_graph is None else len(self.angles_graph.outputs)

    def angles(self, weights: Float[Tensor, "..."]) -> Float[Tensor, "circuits angles"]:
        """The angles of many circuits: weights `(circuits, *shape)` -> `(circuits, angles)`, radians."""
        if self.entries is not None:
            return weights.flatten(1)[:, list(self.entries)]
        return torch.stack([torch.stack([a.reshape(()) for a in self.angles_graph(w)]) for w in weights])

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
            sound = all(
                (g.name in ROTATIONS and 0 <= g.angle < program.num_angles)
                if g.angle is not None
                else (g.name in FIXED or g.name in ROTATIONS or g.name == _MATRIX)
                and g.constant.shape == (2 ** len(g.wires),) * 2
                for g in gates
            ) and all(0 <= w < program.num_wires for g in gates for w in g.wires)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a traced ansatz: {error}") from None
        if not sound:
            raise ValueError("not a traced ansatz: a gate is unknown or acts on wires or angles that are not there")
        return program

    def _entries(self, examples: list[Tensor]) -> tuple[int, ...] | None:
        """For angles that are plain entries of the weights: which ones."""
        numbers = torch.arange(prod(self.shape), dtype=torch.float64).reshape(self.shape)
        found = [float(a.detach()) for a in self.angles_graph(numbers)]
        if not all(a.is_integer() and 0 <= a < numbers.numel() for a in found):
            return None
        entries = tuple(int(a) for a in found)
        same = all(
            all(float(a) == float(w.flatten()[i]) for a, i in zip(self.angles_graph(w), entries, strict=True))
            for w in examples
        )
        return entries if same else None

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


def _example(shape: tuple[int, ...], seed: int) -> Tensor:
    numbers = np.random.default_rng(seed).uniform(-3, 3, size=shape)
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
        wires = tuple(operation.wires.tolist())
        if not traced:
            matrix = np.asarray(qml.math.toarray(qml.matrix(operation)), dtype=complex)
            pairs = tuple(tuple((float(z.real), float(z.imag)) for z in row) for row in matrix)
            gates.append(Gate(operation.name, wires, matrix=pairs))
        elif operation.name == _MATRIX:
            raise ValueError(f"ansatz {label}: a matrix that depends on the weights cannot be traced; use rotations")
        else:
            word = operation.hyperparameters.get("pauli_word")
            gates.append(Gate(operation.name, wires, angle=len(used), word=word))
            used.append(traced[0])
    return tuple(gates), used


@cache
def trace_rotations(name: str, word: str | None, num_wires: int, count: int, dtype: torch.dtype) -> Graph:
    """PennyLane's formula for the matrices of `count` gates of one kind, traced: angles `(count,)` in, matrices out."""
    if word is not None:
        options = {"pauli_word": word}
    else:
        options = {"num_wires": num_wires} if name == "MultiRZ" else {}
    compute = getattr(qml, name).compute_matrix

    def one_by_one(angles: Tensor) -> list[Tensor]:
        return [torch.stack([compute(angle, **options) for angle in angles])]

    example, other = (
        torch.linspace(0.1, 1.0, count, dtype=dtype),
        torch.linspace(-2.0, 3.0, count, dtype=dtype),
    )
    with warnings.catch_warnings():
        # Some of PennyLane's broadcast formulas leave torch for NumPy on the way: found out by trying, not trusted.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            graph, _ = trace(lambda angles: [compute(angles, **options)], example)
            agree = torch.allclose(graph(other)[0], one_by_one(other)[0])
        except (RuntimeError, TypeError, ValueError):
            agree = False
        return graph if agree else trace(one_by_one, example)[0]
