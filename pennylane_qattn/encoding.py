r"""Encodings: a real vector becomes a quantum state, `(..., d) -> (..., 2^n)`.

Amplitude encoding (QISA, arXiv 2603.03318): :math:`|\psi(x)\rangle = x / \lVert x\rVert`, zero-padded. Angle encoding
(QSANN, arXiv 2205.05625): one rotation of each wire by one feature.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pennylane as qml
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from pennylane_qattn import cuda_kernels, kernels
from pennylane_qattn.registry import Description, Registry
from pennylane_qattn.transforms import is_transformed

#: Encodings by name.
ENCODINGS: "Registry[Encoding]" = Registry("encoding")


class Encoding(Description, ABC):
    """How a real feature vector is written into a register of qubits.

    The state's amplitudes are `phases * amplitudes(x)`: a fixed diagonal of phases times a real vector, which may
    leave out trailing zeros.

    Attributes:
        uses_gates: `prepare` queues gates alone, which devices run and differentiate like any other; where it is
            false, devices prepare the state itself, and its gradient is taken in the state.
    """

    uses_gates: ClassVar[bool] = False

    @abstractmethod
    def num_wires(self, num_features: int) -> int:
        """Qubits needed for that many features."""

    @abstractmethod
    def amplitudes(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch amplitudes"]:
        """The real amplitudes, exact and with finite gradients everywhere."""

    @abstractmethod
    def prepare(self, x: Float[Tensor, "*batch features"], wires: Sequence[int]) -> None:
        """Queues the PennyLane operations that prepare the state."""

    def num_amplitudes(self, num_features: int) -> int:
        """Length of `amplitudes(x)`."""
        return 2 ** self.num_wires(num_features)

    def phases(self, num_features: int) -> Complex[Tensor, " amplitudes"] | None:
        """The fixed phases of the amplitudes, or `None` where all are 1."""
        return None


@ENCODINGS.register
@dataclass(frozen=True)
class AmplitudeEncoding(Encoding):
    r""":math:`x / \lVert x \rVert`, zero-padded to :math:`2^n`, :math:`n = \max(1, \lceil\log_2 d\rceil)`.

    The zero vector, where the map is not continuous, is defined as :math:`|0\ldots0\rangle` with gradient 0.
    """

    name = "amplitude"

    def num_wires(self, num_features: int) -> int:
        return max(1, (num_features - 1).bit_length())

    def num_amplitudes(self, num_features: int) -> int:
        return num_features

    def amplitudes(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch amplitudes"]:
        return normalise(x)

    def prepare(self, x: Float[Tensor, "*batch features"], wires: Sequence[int]) -> None:
        amplitudes = self.amplitudes(x)
        padding = 2 ** len(wires) - amplitudes.shape[-1]
        # normalised above; PennyLane's own check would refuse what float32 rounds
        qml.StatePrep(torch.nn.functional.pad(amplitudes, (0, padding)), wires=wires, validate_norm=False)


@ENCODINGS.register
@dataclass(frozen=True)
class AngleEncoding(Encoding):
    r"""Feature :math:`x_j` rotates wire :math:`j`: :math:`\bigotimes_j R(x_j)|0\rangle`, one qubit per feature.

    Args:
        rotation: `"Y"` or `"X"`; a Z rotation of :math:`|0\rangle` is only a phase and is refused.
    """

    name = "angle"
    uses_gates = True
    rotation: str = "Y"

    def __post_init__(self) -> None:
        if self.rotation not in ("X", "Y"):
            raise ValueError(f"rotation must be 'X' or 'Y'; got {self.rotation!r} (Z leaves |0> as it is)")

    def num_wires(self, num_features: int) -> int:
        return num_features

    def amplitudes(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch amplitudes"]:
        qubits = torch.stack((torch.cos(x / 2), torch.sin(x / 2)), dim=-1)
        state = qubits[..., 0, :]
        for wire in range(1, x.shape[-1]):
            state = (state.unsqueeze(-1) * qubits[..., wire, None, :]).flatten(-2)
        return state

    def phases(self, num_features: int) -> Complex[Tensor, " amplitudes"] | None:
        if self.rotation == "Y":
            return None
        ones = torch.tensor([i.bit_count() for i in range(2**num_features)])
        return torch.tensor([1, -1j, -1, 1j], dtype=torch.complex128)[ones % 4]

    def prepare(self, x: Float[Tensor, "*batch features"], wires: Sequence[int]) -> None:
        qml.AngleEmbedding(x, wires=wires, rotation=self.rotation)


def normalise(x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
    """`x` over its Euclidean norm along the last axis; the zero vector gives the first basis vector, gradient 0."""
    if is_transformed():
        return _unit_and_scale(x)[0]
    if x.requires_grad and torch.is_grad_enabled():
        return _Normalise.apply(x)[0]
    return _normalised(x, with_inverse=False)[0]


def _normalised(x: Tensor, with_inverse: bool) -> tuple[Tensor, Tensor]:
    """The unit vector, and 1 / norm: by a kernel where there is one, which leaves out the second if nobody wants it."""
    if kernels.serve(x):
        unit = torch.empty(x.shape, dtype=x.dtype)
        inverse = torch.empty((*x.shape[:-1], 1) if with_inverse else (0, 1), dtype=x.dtype)
        rows = [t.detach().numpy().reshape(-1, t.shape[-1]) for t in (x, unit, inverse)]
        kernels.run(normalise_rows, len(rows[0]), *rows)
        return unit, inverse
    if cuda_kernels.serve_vectors(x):
        return cuda_kernels.normalise(x)
    return _unit_and_scale(x)[:2]


def _unit_and_scale(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The unit vector, 1 / norm (0 for the zero vector), and which vectors are zero."""
    # Dividing by the largest entry first keeps tiny and huge vectors from under- and overflowing; the result does not
    # depend on that factor, so it needs no gradient.
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    scale = torch.where(zero, torch.ones_like(largest), largest)
    scaled = x / scale
    inverse = (scaled.square().sum(-1, keepdim=True) + zero).rsqrt()
    unit = scaled * inverse
    unit = torch.cat((unit[..., :1] + zero, unit[..., 1:]), dim=-1)
    return unit, inverse / scale * ~zero, zero


class _Normalise(torch.autograd.Function):
    """One node in place of a dozen; the derivative is the projection orthogonal to the result, over the norm.

    It keeps what it gives and not the vector, which nobody else may need: of several tokens joined, that is a long one.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        unit, inverse = _normalised(x, with_inverse=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(unit, inverse)
        return unit, inverse

    @staticmethod
    def backward(ctx, upstream: Tensor | None, of_inverse: Tensor | None) -> Tensor | None:
        unit, inverse = ctx.saved_tensors
        if upstream is not None and of_inverse is None and not torch.is_grad_enabled():
            if kernels.serve(unit, upstream):
                gradient = torch.empty_like(unit, memory_format=torch.contiguous_format)
                rows = [t.reshape(-1, t.shape[-1]) for t in (upstream, unit, inverse, gradient)]
                kernels.run(_normalise_rows_backward, len(rows[0]), *rows)
                return gradient
            if cuda_kernels.serve_vectors(unit, upstream):
                return cuda_kernels.normalise_backward(upstream, unit, inverse)
        gradient = None if upstream is None else (upstream - unit * (unit * upstream).sum(-1, keepdim=True)) * inverse
        if of_inverse is None:  # a second derivative has it
            return gradient
        along = -of_inverse * inverse.square() * unit
        return along if gradient is None else gradient + along


@kernels.compiled
def normalise_rows(x, unit, inverse, first, last):
    """`_unit_and_scale`, row by row; `inverse` may be without rows."""
    with_inverse = len(inverse) > 0
    for row in range(first, last):
        total = x.dtype.type(0)
        for i in range(x.shape[1]):
            total += x[row, i] * x[row, i]
        if 1e-30 < total < 1e30:
            factor = x.dtype.type(1) / np.sqrt(total)
            for i in range(x.shape[1]):
                unit[row, i] = x[row, i] * factor
            if with_inverse:
                inverse[row, 0] = factor
            continue
        scale, is_zero = x.dtype.type(0), True
        for i in range(x.shape[1]):
            is_zero = is_zero and x[row, i] == 0
            scale = max(scale, abs(x[row, i]))
        if is_zero:
            unit[row] = 0
            unit[row, 0] = 1
            if with_inverse:
                inverse[row, 0] = 0
            continue
        total = x.dtype.type(0)
        for i in range(x.shape[1]):
            unit[row, i] = x[row, i] / scale
            total += unit[row, i] * unit[row, i]
        factor = x.dtype.type(1) / np.sqrt(total)
        for i in range(x.shape[1]):
            unit[row, i] *= factor
        if with_inverse:
            inverse[row, 0] = factor / scale


@kernels.compiled
def _normalise_rows_backward(upstream, unit, inverse, gradient, first, last):
    for row in range(first, last):
        along = unit.dtype.type(0)
        for i in range(unit.shape[1]):
            along += unit[row, i] * upstream[row, i]
        for i in range(unit.shape[1]):
            gradient[row, i] = (upstream[row, i] - unit[row, i] * along) * inverse[row, 0]
