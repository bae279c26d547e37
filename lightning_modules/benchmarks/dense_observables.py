r"""The published value map as its formula stands: every gate and every observable a full matrix.

QISA (arXiv 2603.03318): :math:`v_o = \langle\psi| U^\dagger P_o U |\psi\rangle` with :math:`|\psi\rangle = x /
\lVert x\rVert`, the gates of :math:`U` applied to the state of every token one after the other, each as a matrix of
:math:`2^n \times 2^n`, and every word :math:`P_o` a matrix as large. It is written for the benchmark alone, in torch
and with nothing of the package, to be compared with what the package does.
"""

import torch
from torch import Tensor, nn

LETTERS = {
    "I": [[1, 0], [0, 1]],
    "X": [[0, 1], [1, 0]],
    "Y": [[0, -1j], [1j, 0]],
    "Z": [[1, 0], [0, -1]],
}


class DenseObservables(nn.Module):
    """One head's values, `(tokens, features)` -> `(tokens, words)`.

    Args:
        num_features: width of a token.
        words: Pauli words, one letter per qubit.
        dtype: of the states.

    Shapes:
        `weights`: `(1, 3, qubits)`, radians: RX and RY before the ring of CNOTs, RY after it.
    """

    def __init__(self, num_features: int, words: tuple[str, ...], dtype: torch.dtype = torch.complex64):
        super().__init__()
        self.num_wires = len(words[0])
        self.padding = 2**self.num_wires - num_features
        self.weights = nn.Parameter(torch.zeros(1, 3, self.num_wires))
        self.register_buffer("observables", torch.stack([word_matrix(word) for word in words]).to(dtype))
        ring = [(wire, (wire + 1) % self.num_wires) for wire in range(self.num_wires) if self.num_wires > 1]
        cnots = [_cnot(*pair, self.num_wires) for pair in ring]
        self.register_buffer("ring", torch.stack(cnots).to(dtype) if cnots else torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        states = nn.functional.pad(x / x.norm(dim=-1, keepdim=True), (0, self.padding)).to(self.observables.dtype)
        before_x, before_y, after_y = self.weights[0]
        for wire in range(self.num_wires):
            states = self._apply_gate(_rx(before_x[wire]), wire, states)
            states = self._apply_gate(_ry(before_y[wire]), wire, states)
        for matrix in self.ring:
            states = states @ matrix.T
        for wire in range(self.num_wires):
            states = self._apply_gate(_ry(after_y[wire]), wire, states)
        values = [(states.conj() * (states @ observable.T)).sum(-1).real for observable in self.observables]
        return torch.stack(values, dim=-1)

    def _apply_gate(self, gate: Tensor, wire: int, states: Tensor) -> Tensor:
        left, right = (torch.eye(2**n, dtype=gate.dtype, device=gate.device) for n in (wire, self.num_wires - wire - 1))
        return states @ torch.kron(torch.kron(left, gate), right).T


def _rx(angle: Tensor) -> Tensor:
    cos, sin = torch.cos(angle / 2), torch.sin(angle / 2)
    zero = torch.zeros_like(cos)
    return torch.complex(torch.stack((cos, zero, zero, cos)), torch.stack((zero, -sin, -sin, zero))).reshape(2, 2)


def _ry(angle: Tensor) -> Tensor:
    cos, sin = torch.cos(angle / 2), torch.sin(angle / 2)
    real = torch.stack((cos, -sin, sin, cos))
    return torch.complex(real, torch.zeros_like(real)).reshape(2, 2)


def word_matrix(word: str) -> Tensor:
    """The matrix of a Pauli word."""
    matrix = torch.ones(1, 1, dtype=torch.complex128)
    for letter in word:
        matrix = torch.kron(matrix, torch.tensor(LETTERS[letter], dtype=torch.complex128))
    return matrix


def _cnot(control: int, target: int, num_wires: int) -> Tensor:
    """The matrix of a CNOT, wire 0 being the most significant."""
    states = torch.arange(2**num_wires)
    flips = (states >> (num_wires - 1 - control)) & 1
    matrix = torch.zeros(2**num_wires, 2**num_wires, dtype=torch.complex128)
    matrix[states ^ (flips << (num_wires - 1 - target)), states] = 1
    return matrix
