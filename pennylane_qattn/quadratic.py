r"""Sums of squares, :math:`v = (A a)^{\circ 2} S`, for many tokens: what every folded circuit comes down to.

The intermediate :math:`Aa` is several times wider than input and output. It is made and used in blocks that fit into
the processor's cache and made again for the gradient, so memory does not grow with it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn.transforms import is_transformed

#: Fewer tokens, as in generation, are not worth blocks.
FEWEST_TOKENS = 32
#: Elements of the intermediate per block: half a MiB in float32 on a CPU, which its second-level cache holds.
BLOCK_ELEMENTS = {"cpu": 2**19}
_OTHER_DEVICES = 2**26


def quadratic_forms(
    a: Float[Tensor, "#heads tokens amplitudes"],
    rows: Float[Tensor, "heads rows amplitudes"],
    signs: Float[Tensor, "heads rows words"],
) -> Float[Tensor, "heads tokens words"]:
    """`(A a)^2 S` for every head and token.

    Args:
        a: vectors, one set for all heads or one for each.
        rows: the matrix `A` of each head.
        signs: the matrix `S` of each head; it gets no gradient.
    """
    # Transformed (torch.func) and compiled calls take the formula as it stands, as they plan their own memory; and so
    # do few tokens, as there is nothing to save.
    if is_transformed() or a.shape[1] < FEWEST_TOKENS:
        return plain_quadratic_forms(a, rows, signs)
    return _Blocked.apply(a, rows, signs)


def plain_quadratic_forms(
    a: Float[Tensor, "#heads tokens amplitudes"],
    rows: Float[Tensor, "heads rows amplitudes"],
    signs: Float[Tensor, "heads rows words"],
) -> Float[Tensor, "heads tokens words"]:
    """The same, in one piece."""
    # not `@`, which picks its kernel by whether gradients are wanted, and so rounds otherwise
    return torch.bmm(torch.bmm(a.expand(len(rows), -1, -1), rows.transpose(1, 2)).square(), signs)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, rows: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(a, rows, signs)
        heads, tokens = rows.shape[0], a.shape[1]
        out = a.new_empty(heads, tokens, signs.shape[2])
        for head, inputs in enumerate(a.expand(heads, -1, -1)):
            for part in _blocks(inputs, rows):
                torch.mm((inputs[part] @ rows[head].T).square_(), signs[head], out=out[head, part])
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        with torch.autocast(upstream.device.type, enabled=False):
            return _Blocked._gradients(*ctx.saved_tensors, upstream, ctx.needs_input_grad[1])

    @staticmethod
    def _gradients(a: Tensor, rows: Tensor, signs: Tensor, upstream: Tensor, rows_wanted: bool):
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see the formula
            weighted = 2 * (a @ rows.transpose(1, 2)) * (upstream @ signs.transpose(1, 2))
            by_head = weighted @ rows
            return by_head.sum_to_size(a.shape), weighted.transpose(1, 2) @ a, None
        by_head, by_rows = [], []
        for head, inputs in enumerate(a.expand(len(rows), -1, -1)):
            pieces, total = [], torch.zeros_like(rows[head]) if rows_wanted else None
            for part in _blocks(inputs, rows):
                weighted = (inputs[part] @ rows[head].T) * (upstream[head, part] @ signs[head].T)
                pieces.append(weighted @ rows[head])
                if rows_wanted:
                    total = total + weighted.T @ inputs[part]
            by_head.append(torch.cat(pieces) if pieces else torch.zeros_like(inputs))
            by_rows.append(total)
        by_rows = 2 * torch.stack(by_rows) if rows_wanted else None
        return 2 * torch.stack(by_head).sum_to_size(a.shape), by_rows, None


def _blocks(inputs: Tensor, rows: Tensor) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS.get(inputs.device.type, _OTHER_DEVICES) // rows.shape[1])
    return [slice(first, first + size) for first in range(0, len(inputs), size)]
