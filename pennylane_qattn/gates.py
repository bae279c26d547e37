r"""A circuit as the gates that hardware runs: for counting, drawing and export, never for gradients.

A real state is prepared by a tree of RY rotations (Möttönen et al. 2004, arXiv:quant-ph/0407010, equation 3, and their
Gray code circuit); everything else is decomposed by PennyLane. We differ in that the leaves of the tree carry the
signs, so that no RZ is needed, and in that every gate is kept whatever its angle: all inputs have the same gates,
:math:`2^n - 1` rotations and :math:`2^n - 2` CNOTs. The angles have a cusp where a subtree vanishes, which is why
nothing is differentiated through them.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pennylane as qml
import torch

from pennylane_qattn.ansatz import Ansatz
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.encoding import Encoding

#: Gates of PennyLane that have one spelling in the standard libraries of OpenQASM 2 and 3.
GATE_SET = frozenset("""RX RY RZ Hadamard S Adjoint(S) T Adjoint(T) PauliX PauliY PauliZ CNOT CZ SWAP""".split())
#: What changes no expectation value; an identity on several wires has no spelling.
_NOTHING = frozenset({"GlobalPhase", "Identity", "Barrier"})


class EncodingBox(qml.operation.Operation):
    """An encoding as one box, by its name: for drawing and counting; it cannot be run."""

    num_params = 0

    def __init__(self, encoding: Encoding, wires: Sequence[int]):
        super().__init__(wires=wires)
        self.name = f"{getattr(encoding, 'name', type(encoding).__name__)} encoding"

    def label(self, decimals: int | None = None, base_label: str | None = None, cache: dict | None = None) -> str:
        return self.name


def encoding_operations(circuit: Circuit, inputs: Any) -> list[qml.operation.Operator]:
    """The gates that prepare the state of a vector `(num_features,)`."""
    wires = range(circuit.num_wires)
    with qml.queuing.AnnotatedQueue() as queue:
        circuit.encoding.prepare(_vector(circuit, inputs), wires)
    found: list[qml.operation.Operator] = []
    for operation in qml.tape.QuantumScript.from_queue(queue).operations:
        if isinstance(operation, qml.StatePrep):
            found += state_operations(qml.math.toarray(operation.state_vector()).reshape(-1), operation.wires)
        else:
            found.append(operation)
    return decomposed(found)


def ansatz_operations(circuit: Circuit, weights: Any) -> list[qml.operation.Operator]:
    """The gates of the ansatz at angles of the shape `circuit.weight_shape`, radians."""
    weights = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    if tuple(weights.shape) != tuple(circuit.weight_shape):
        raise ValueError(f"the ansatz takes angles of shape {circuit.weight_shape}; got {tuple(weights.shape)}")
    with qml.queuing.AnnotatedQueue() as queue:
        cast(Ansatz, circuit.ansatz)(weights, list(range(circuit.num_wires)))
    return decomposed(qml.tape.QuantumScript.from_queue(queue).operations)


def decomposed(operations: Sequence[qml.operation.Operator]) -> list[qml.operation.Operator]:
    """The operations decomposed to `GATE_SET`, with NumPy angles and without what changes nothing.

    Raises:
        ValueError: if one of them cannot be decomposed.
    """
    tape = qml.tape.QuantumScript(operations)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Operator .* does not define a decomposition")  # it is refused below
        (tape,), _ = qml.transforms.decompose(tape, gate_set=GATE_SET | _NOTHING)
    (tape,), _ = qml.transforms.convert_to_numpy_parameters(tape)
    gates = [gate for gate in tape.operations if gate.name not in _NOTHING]
    for gate in gates:
        if gate.name not in GATE_SET:
            raise ValueError(f"{gate.name} cannot be decomposed to {', '.join(sorted(GATE_SET))}; write it with those")
    return gates


def state_operations(state: np.ndarray, wires: Sequence[int]) -> list[qml.operation.Operator]:
    """Gates that take `|0...0>` to a state `(2 ** len(wires),)` of norm 1, the first wire the most significant."""
    state = np.asarray(state)
    if np.iscomplexobj(state) and state.imag.any():
        return qml.MottonenStatePreparation(state, wires=wires).decomposition()
    gates = []
    for depth, angles in enumerate(ry_angles(state.real)):
        controls, target = wires[:depth], wires[depth]
        for number, angle in enumerate(_gray_code_angles(angles)):
            gates.append(qml.RY(angle, wires=target))
            if depth:
                flipped = (~number & (number + 1)).bit_length() - 1  # bit in which this Gray code and the next differ
                gates.append(qml.CNOT(wires=[controls[depth - 1 - min(flipped, depth - 1)], target]))
    return gates


def ry_angles(state: np.ndarray) -> list[np.ndarray]:
    """The rotations of each wire, `(1,), (2,), (4,), ...`, one for each basis state of the wires before it; radians.

    Amplitudes are the leaves of a binary tree. Each node splits its norm between its two halves; the last wire splits
    signed amplitudes.
    """
    angles = []
    level = np.asarray(state, dtype=np.float64)
    while len(level) > 1:
        left, right = level[0::2], level[1::2]
        angles.append(2 * np.arctan2(right, left))
        level = np.hypot(left, right)
    return angles[::-1]


def _gray_code_angles(angles: np.ndarray) -> np.ndarray:
    """Angles of plain rotations, with CNOTs between them, that make rotations by `angles` controlled by all wires."""
    size = len(angles)
    number = np.arange(size)
    gray = number ^ (number >> 1)
    signs = 1 - 2 * (np.bitwise_count(gray[:, None] & number[None, :]) % 2).astype(np.float64)
    return signs @ angles / size


def _vector(circuit: Circuit, inputs: Any) -> torch.Tensor:
    vector = torch.as_tensor(inputs, dtype=torch.float64).detach().cpu()
    if tuple(vector.shape) != (circuit.num_features,):
        raise ValueError(f"the circuit encodes {circuit.num_features} numbers; got shape {tuple(vector.shape)}")
    if not torch.isfinite(vector).all():
        raise ValueError("the vector to encode holds numbers that are not finite; give finite ones")
    return vector
