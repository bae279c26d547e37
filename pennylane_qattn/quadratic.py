r"""Sums of squares, :math:`v = (A a)^{\circ 2} S`, for many tokens: what every folded circuit comes down to.

The intermediate :math:`Aa` is several times wider than input and output. It is made and used in blocks that fit into
the processor's cache and made again for the gradient, so memory does not grow with it.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn.transforms import is_transformed, without_autocast

#: Fewer tokens, as in generation, are not worth blocks.
FEWEST_TOKENS = 32
#: Elements of the intermediate per block: half a MiB in float32 on a CPU, which its second-level cache holds, for one
#: head at a time. Other devices would wait for so little work: there it is a quarter of a GiB, for all heads together.
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


def learned_quadratic_forms(
    a: Float[Tensor, "#heads tokens amplitudes"],
    rows: Float[Tensor, "heads rows amplitudes"],
    signs: Float[Tensor, "heads rows forms"],
) -> Float[Tensor, "heads tokens forms"]:
    """The same where `signs` are learned and `A` has no more rows than columns, or few: there `Aa` is worth keeping.

    What is kept of it is the product and not its square as well.
    """
    if is_transformed() or not torch.is_grad_enabled():
        return plain_quadratic_forms(a, rows, signs)
    return _Kept.apply(a, rows, signs)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, rows: Tensor, signs: Tensor) -> Tensor:
        with without_autocast(a.device):
            products = torch.bmm(a.expand(len(rows), -1, -1), rows.mT)
            ctx.save_for_backward(a, rows, signs, products)
            return torch.bmm(products.square(), signs)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        a, rows, signs, products = ctx.saved_tensors
        with without_autocast(upstream.device):
            weighted = upstream @ (2 * signs).mT
            if torch.is_grad_enabled():  # a second derivative sees how the product came about
                products = a @ rows.mT
                weighted = weighted * products
            else:
                weighted.mul_(products)
            by_a, by_rows, by_signs = ctx.needs_input_grad
            return (
                (weighted @ rows).sum_to_size(a.shape) if by_a else None,
                weighted.mT @ a if by_rows else None,
                products.square().mT @ upstream if by_signs else None,
            )


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, rows: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(a, rows, signs)
        heads, tokens = rows.shape[0], a.shape[1]
        out = a.new_empty(heads, tokens, signs.shape[2])
        a = a.expand(heads, -1, -1)
        for head, parts in _blocks(a, rows):
            for part in parts:
                out[head, part] = torch.bmm(torch.bmm(a[head, part], rows[head].mT).square_(), signs[head])
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        with without_autocast(upstream.device):
            a, rows, signs = ctx.saved_tensors
            return _Blocked._gradients(a, rows, signs, upstream, ctx.needs_input_grad[1])

    @staticmethod
    def _gradients(a: Tensor, rows: Tensor, signs: Tensor, upstream: Tensor, rows_wanted: bool):
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see the formula
            weighted = 2 * (a @ rows.transpose(1, 2)) * (upstream @ signs.transpose(1, 2))
            by_head = weighted @ rows
            return by_head.sum_to_size(a.shape), weighted.transpose(1, 2) @ a, None
        all_heads = a.expand(len(rows), -1, -1)
        by_head, by_rows = [], []  # nothing is written into, as a batched gradient can only be added to
        for head, parts in _blocks(all_heads, rows):
            pieces, total = [], torch.zeros_like(rows[head])
            for part in parts:
                inputs = all_heads[head, part]
                weighted = torch.bmm(inputs, rows[head].mT) * torch.bmm(upstream[head, part], signs[head].mT)
                pieces.append(torch.bmm(weighted, rows[head]))
                if rows_wanted:
                    total = total + torch.bmm(weighted.mT, inputs)
            by_head.append(torch.cat(pieces, dim=1) if pieces else torch.zeros_like(all_heads[head]))
            by_rows.append(total)
        return 2 * torch.cat(by_head).sum_to_size(a.shape), 2 * torch.cat(by_rows) if rows_wanted else None, None


def _blocks(inputs: Tensor, rows: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Which heads are done together, and for these which of their tokens."""
    heads, tokens, height = len(rows), inputs.shape[1], rows.shape[1]
    at_once = 1 if inputs.device.type in BLOCK_ELEMENTS else heads
    size = max(1, BLOCK_ELEMENTS.get(inputs.device.type, _OTHER_DEVICES) // (at_once * height))
    for head in range(0, heads, at_once):
        yield slice(head, head + at_once), [slice(first, first + size) for first in range(0, tokens, size)]
