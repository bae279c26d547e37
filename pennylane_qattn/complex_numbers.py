"""Arithmetic of complex numbers that torch.compile and torch.export can take.

Inductor has no code for complex numbers and leaves each such operation to torch; nor do other runtimes take them. So
while a call is compiled or transformed, complex tensors are pairs of real numbers, real and imaginary part in a last
axis of size 2; and complex tensors of torch, which are faster, in any other call. What is written in `multiply` and
`matmul` and in changes of shape serves both.
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from pennylane_qattn.transforms import is_transformed


def as_working(pairs: Float[Tensor, "*shape 2"]) -> Num[Tensor, "..."]:
    """Pairs in the form that this call computes in: as they are, or `(*shape)` complex."""
    return pairs if is_transformed() else torch.view_as_complex(pairs)


def as_pairs(numbers: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Back to pairs."""
    return torch.view_as_real(numbers) if numbers.is_complex() else numbers


def multiply(left: Num[Tensor, "..."], right: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
    """The product, element by element."""
    if left.is_complex():
        return left * right
    (a, b), (c, d) = left.unbind(-1), right.unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), dim=-1)


def matmul(left: Num[Tensor, "..."], right: Num[Tensor, "..."]) -> Num[Tensor, "..."]:
    """The product of matrices, which are the last two axes, or of pairs the two before the last."""
    if left.is_complex():
        return left @ right
    (a, b), (c, d) = left.unbind(-1), right.unbind(-1)
    # [a -b; b a] [c; d] is the same product in real numbers, and one call
    stacked = torch.cat((torch.cat((a, -b), dim=-1), torch.cat((b, a), dim=-1)), dim=-2) @ torch.cat((c, d), dim=-2)
    return torch.stack(stacked.chunk(2, dim=-2), dim=-1)


def real_and_imaginary(numbers: Num[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Both parts."""
    real, imaginary = as_pairs(numbers).unbind(-1)
    return real, imaginary


def from_real(numbers: Float[Tensor, "..."]) -> Num[Tensor, "..."]:
    """Real numbers in the form that this call computes in."""
    return as_working(torch.stack((numbers, torch.zeros_like(numbers)), dim=-1))
