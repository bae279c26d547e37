r"""Vectors with their squared norm and a one beside them, so that a dot product of two gives their distance.

.. math::

    [2q, -\lVert q \rVert^2, 1] \cdot [k, 1, -\lVert k \rVert^2] = -\lVert q - k \rVert^2

It is what scores of distances need to run as products of matrices. A kernel writes all of it in one pass over memory.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn import cuda_kernels, kernels
from pennylane_qattn.transforms import is_plain

#: Numbers that are prepared faster by the formula as it stands.
FEWEST_NUMBERS = 2**14


@dataclass(frozen=True)
class Layout:
    """What stands where behind the features, counted from their end.

    Attributes:
        norm: the squared norm; `None` leaves it out.
        ones: ones.
        width: of it all; what is not mentioned is 0.
    """

    norm: int | None
    ones: tuple[int, ...]
    width: int


def augment(
    x: Float[Tensor, "batch heads seq features"],
    factor: Float[Tensor, " heads"] | float,
    norm_factor: Float[Tensor, " heads"] | float,
    layout: Layout,
) -> Float[Tensor, "batch heads seq prepared"]:
    """`factor * x`, and behind it ones and `norm_factor` times the squared norm of `x`.

    Args:
        x: vectors, in float32 or better.
        factor, norm_factor: one for all heads, or one for each; `factor` is not 0.
        layout: where things stand.
    """
    on_gpu = cuda_kernels.serve_vectors(x)
    if on_gpu or (kernels.serve(x) and x.numel() >= FEWEST_NUMBERS):  # a traced program asks for no size
        factors = [f if isinstance(f, Tensor) else _of_all_heads(x, f, on_gpu) for f in (factor, norm_factor)]
        if all(f.dtype == x.dtype and is_plain(f) for f in factors):
            return _Augment.apply(x, *factors, layout)
    factor, norm_factor = (f[:, None, None] if isinstance(f, Tensor) else f for f in (factor, norm_factor))
    ends = [x.new_zeros(())] * (layout.width - x.shape[-1])
    for place in layout.ones:
        ends[place] = x.new_ones(())
    shape = (*x.shape[:-1], 1)
    columns = [end.expand(shape) for end in ends]
    if layout.norm is not None:
        columns[layout.norm] = norm_factor * x.square().sum(-1, keepdim=True)
    return torch.cat((factor * x, *columns), dim=-1)


def _of_all_heads(x: Tensor, value: float, on_gpu: bool) -> Tensor:
    if on_gpu:
        return cuda_kernels.constant(x.shape[1], value, x.dtype, x.device)
    return x.new_full((x.shape[1],), value)


class _Augment(torch.autograd.Function):
    """The same by a kernel."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor, norm_factor: Tensor, layout: Layout) -> Tensor:
        if cuda_kernels.serve_vectors(x):
            out = cuda_kernels.augment(x, factor, norm_factor, layout.norm, layout.ones, layout.width)
        else:
            out = _Augment._on_cpu(x, factor, norm_factor, layout)
        # not `x`, since attention keeps `out` anyhow
        ctx.save_for_backward(out, factor, norm_factor)
        ctx.layout, ctx.ends = layout, layout.width - x.shape[-1]
        return out

    @staticmethod
    def _on_cpu(x: Tensor, factor: Tensor, norm_factor: Tensor, layout: Layout) -> Tensor:
        features, heads = x.shape[-1], x.shape[1]
        token_first = x.transpose(1, 2).is_contiguous()  # as linear maps leave them; so does the output
        ordered = x.transpose(1, 2) if token_first else x.contiguous()
        out = x.new_empty(*ordered.shape[:-1], layout.width)
        rows, into = ordered.reshape(-1, features), out.view(-1, layout.width)
        ends = np.zeros(layout.width - features, into.numpy().dtype)
        ends[list(layout.ones)] = 1
        norm = -1 if layout.norm is None else features + layout.norm
        of_one_head = 1 if token_first else x.shape[2]
        kernels.run(_augment, len(rows), rows, of_one_head, heads, factor, norm_factor, norm, ends, into)
        return out.transpose(1, 2) if token_first else out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        out, factor, norm_factor = ctx.saved_tensors
        features = out.shape[-1] - ctx.ends
        by_kernel = None
        if cuda_kernels.serve_vectors(out, upstream) and not torch.is_grad_enabled():
            norm = ctx.layout.norm
            by_kernel = cuda_kernels.augment_backward(out, upstream, factor, norm_factor, norm, features)
            if not any(ctx.needs_input_grad[1:3]):
                return by_kernel, None, None, None
        x = out[..., :features] / factor[:, None, None]
        by_scaled = upstream[..., :features]
        by_x = factor[:, None, None] * by_scaled if by_kernel is None else by_kernel
        by_factor = (x * by_scaled).sum((0, 2, 3)) if ctx.needs_input_grad[1] else None
        by_norm_factor = None
        if ctx.layout.norm is not None:
            by_norm = upstream[..., features + ctx.layout.norm, None]
            if by_kernel is None:
                by_x = torch.addcmul(by_x, x, norm_factor[:, None, None] * by_norm, value=2)
            if ctx.needs_input_grad[2]:
                by_norm_factor = (x.square().sum(-1, keepdim=True) * by_norm).sum((0, 2, 3))
        return by_x, by_factor, by_norm_factor, None


@kernels.compiled
def _augment(rows, of_one_head, heads, factor, norm_factor, norm, ends, out, first, last):
    """Rows of `out` from `rows`; `of_one_head` rows after each other belong to one head."""
    features = rows.shape[1]
    for row in range(first, last):
        head = row // of_one_head % heads if heads > 1 else 0
        total, scale = rows.dtype.type(0), factor[head]
        for i in range(features):
            total += rows[row, i] * rows[row, i]
            out[row, i] = scale * rows[row, i]
        for i in range(len(ends)):
            out[row, features + i] = ends[i]
        if norm >= 0:
            out[row, norm] = norm_factor[head] * total
