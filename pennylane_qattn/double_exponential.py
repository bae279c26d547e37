r"""Attention by the published score, :math:`w_{ij} \propto \exp(\exp(-\lVert q_i - k_j \rVert^2))`, without its matrix.

QISA (arXiv 2603.03318) and QSANN (arXiv 2205.05625) take the softmax of an exponential, which no fused kernel has.
Rows are made in blocks that fit into the cache, used, and made again for the gradient: memory grows with the number of
tokens and not with its square. Exponents lie in (0, 1], so the softmax needs no maximum.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pennylane_qattn.augmentation import Layout, augment
from pennylane_qattn.transforms import is_batched, without_autocast

#: Weights that are made at a time: a MiB in float32 on a CPU.
BLOCK_ELEMENTS = {"cpu": 2**18}
#: Queries at a time, where keys are many: later keys than theirs are left out.
BLOCK_ROWS = 128
_OTHER_DEVICES = 2**26
#: Negative squared distances below which all count as this one, by precision: their exponentials are far below
#: rounding, while gradients through them would be subnormal numbers, many times slower to multiply.
LEAST = {torch.float32: -60.0, torch.float64: -600.0}


def exponentials(negative_distances: Tensor) -> Tensor:
    r""":math:`\exp(-\lVert q - k \rVert^2)` of the negative squared distances.

    Rounding may leave a squared distance below zero, and the exponential would magnify that: it counts as 0.
    """
    return negative_distances.clamp(LEAST[negative_distances.dtype], 0).exp()


def queries_of(q: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
    r""":math:`[2q, -\lVert q \rVert^2, 1]`; its product with a key's is the negative squared distance."""
    return augment(q, 2.0, -1.0, Layout(norm=0, ones=(1,), width=q.shape[-1] + 2))


def keys_of(k: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
    r""":math:`[k, 1, -\lVert k \rVert^2]`."""
    return augment(k, 1.0, -1.0, Layout(norm=1, ones=(0,), width=k.shape[-1] + 2))


def negative_distances(
    q: Float[Tensor, "batch heads queries features"], k: Float[Tensor, "batch heads keys features"]
) -> Float[Tensor, "batch heads queries keys"]:
    r""":math:`-\lVert q_i - k_j \rVert^2`."""
    return queries_of(q) @ keys_of(k).transpose(-2, -1)


def attend(
    q: Float[Tensor, "batch heads queries features"],
    k: Float[Tensor, "batch heads keys features"],
    v: Float[Tensor, "batch heads keys values"],
    is_causal: bool,
    visible: Bool[Tensor, "batch keys"] | None,
) -> Float[Tensor, "batch heads queries values"]:
    """The weighted sums; a query that sees no key gives 0.

    Args:
        q, k: queries and keys; queries are the last of the keys.
        v: values; 0 where nobody sees them.
        is_causal: a query sees no later key.
        visible: `False` for keys that nobody sees.
    """
    q, k = queries_of(q), keys_of(k)
    if q.shape[2] == 1 and visible is None:  # generation: nothing is masked, and there is nothing to save
        weights = exponentials(q @ k.transpose(2, 3)).exp()
        return weights @ v / weights.sum(-1, keepdim=True)
    if visible is not None:  # for each pair of batch and head
        visible = visible.repeat_interleave(q.shape[1], dim=0)
    out = _Attend.apply(*(t.flatten(0, 1) for t in (q, k, v)), is_causal, visible)
    return out.unflatten(0, q.shape[:2])


def plain_attend(
    q: Float[Tensor, "pairs queries prepared"],
    k: Float[Tensor, "pairs keys prepared"],
    v: Float[Tensor, "pairs keys features"],
    is_causal: bool,
    visible: Bool[Tensor, "pairs keys"] | None,
) -> Float[Tensor, "pairs queries features"]:
    """The same in one piece, for pairs of batch and head."""
    whole = _whole(q, k, is_causal, visible)
    weights = whole.masked_(exponentials(q @ k.transpose(1, 2)).exp().clone())
    return weights @ v / whole.totals(weights)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, visible: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[2])
        for block in _blocks(q, k, is_causal, visible):
            inner = _exponentials_(block.rows_of(q) @ block.keys_of(k).transpose(1, 2))
            weights = block.masked_(inner.exp_())
            torch.div(weights @ block.keys_of(v), block.totals(weights), out=block.rows_of(out))
        ctx.save_for_backward(q, k, v, out, visible)
        ctx.is_causal = is_causal
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        q, k, v, out, visible = ctx.saved_tensors
        with without_autocast(upstream.device):
            if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see the formula
                inputs = [t for t, wanted in zip((q, k, v), ctx.needs_input_grad, strict=False) if wanted]
                out = plain_attend(q, k, v, ctx.is_causal, visible)
                found = iter(torch.autograd.grad(out, inputs, upstream, create_graph=True))
                return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), None, None
            if is_batched(upstream):  # one block, since nothing batched can be written into what is not
                return *_gradients(q, k, v, out, upstream, _whole(q, k, ctx.is_causal, visible)), None, None
            by_q, by_k, by_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for block in _blocks(q, k, ctx.is_causal, visible):
                of_q, of_k, of_v = _gradients(q, k, v, out, upstream, block)
                block.rows_of(by_q).copy_(of_q)
                block.keys_of(by_k).add_(of_k)
                block.keys_of(by_v).add_(of_v)
        return by_q, by_k, by_v, None, None


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, upstream: Tensor, block: "_Block"
) -> tuple[Tensor, Tensor, Tensor]:
    """What the queries of a block contribute to the gradients of its queries, keys and values."""
    queries, keys, above = block.rows_of(q), block.keys_of(k), block.rows_of(upstream)
    inner = _exponentials_(queries @ keys.transpose(1, 2))
    weights = block.masked_(inner.exp())
    weights.div_(block.totals(weights))
    slopes = above @ block.keys_of(v).transpose(1, 2)
    slopes = slopes.sub_((above * block.rows_of(out)).sum(-1, keepdim=True)).mul_(weights).mul_(inner)
    return slopes @ keys, slopes.transpose(1, 2) @ queries, weights.transpose(1, 2) @ above


def _exponentials_(negative_distances: Tensor) -> Tensor:
    return negative_distances.clamp_(LEAST[negative_distances.dtype], 0).exp_()


# --- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Some queries of some pairs of batch and head, and the keys that they may see.

    Attributes:
        offset: keys that the first of all queries sees besides its own token's.
        is_whole: it is all there is, and nothing is cut out of anything.
    """

    pairs: slice
    rows: slice
    keys: slice
    offset: int
    is_causal: bool
    visible: Tensor | None
    is_whole: bool = False

    def rows_of(self, tensor: Tensor) -> Tensor:
        return tensor if self.is_whole else tensor[self.pairs, self.rows]

    def keys_of(self, tensor: Tensor) -> Tensor:
        return tensor if self.is_whole else tensor[self.pairs, self.keys]

    def masked_(self, weights: Float[Tensor, "pairs rows keys"]) -> Float[Tensor, "pairs rows keys"]:
        """The same with 0, written in its place, where a query does not see a key."""
        if self.is_causal:
            seen = self.offset + self.rows.start  # by the first of these rows, beside its own token
            weights.tril_(seen)
        if self.visible is not None:
            weights.masked_fill_(~self.keys_of(self.visible)[:, None], 0.0)
        return weights

    @staticmethod
    def totals(weights: Float[Tensor, "pairs rows keys"]) -> Float[Tensor, "pairs rows 1"]:
        """What rows sum up to; not 0 where a query sees no key. A single weight is 1 at least."""
        return weights.sum(-1, keepdim=True).clamp(min=0.5)


def _whole(q: Tensor, k: Tensor, is_causal: bool, visible: Tensor | None) -> _Block:
    return _Block(slice(None), slice(0, None), slice(None), k.shape[1] - q.shape[1], is_causal, visible, True)


def _blocks(q: Tensor, k: Tensor, is_causal: bool, visible: Tensor | None) -> Iterator[_Block]:
    (pairs, queries, _), keys = q.shape, k.shape[1]
    room = BLOCK_ELEMENTS.get(q.device.type, _OTHER_DEVICES)
    rows_at_once = max(1, min(queries, BLOCK_ROWS, room // max(1, keys)))
    pairs_at_once = max(1, room // max(1, rows_at_once * keys))
    for pair in range(0, pairs, pairs_at_once):
        for row in range(0, queries, rows_at_once):
            end = min(row + rows_at_once, queries)
            seen = slice(0, keys - queries + end) if is_causal else slice(0, keys)
            yield _Block(slice(pair, pair + pairs_at_once), slice(row, end), seen, keys - queries, is_causal, visible)
