r"""Products that never make a square of tokens: prefix sums, causal linear attention, and sparse rows of one pattern.

Causal linear attention: arXiv 2006.16236. All of them are differentiable twice, in the memory of their inputs.
"""

import warnings
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn.grover.support import Support
from pennylane_qattn.transforms import is_transformed

#: Gathered elements per block, where keys have to be gathered.
GATHER_ELEMENTS = 2**24
#: Tokens per chunk of linear attention and of prefix sums.
CHUNK = 64


def prefix_sums(x: Float[Tensor, "*batch tokens features"]) -> Float[Tensor, "*batch tokens features"]:
    """Sums over each token and those before it; in chunks, which take a tenth of the time of one long sum."""
    tokens = x.shape[-2]
    if tokens <= CHUNK:
        return x.cumsum(-2)
    within = F.pad(x, (0, 0, 0, -tokens % CHUNK)).unflatten(-2, (-1, CHUNK)).cumsum(-2)
    # Chunks before, without this one: to subtract it again would let later tokens into the rounding of earlier ones.
    before = F.pad(within[..., :-1, -1, :].cumsum(-2), (0, 0, 1, 0))
    return (within + before[..., None, :]).flatten(-3, -2)[..., :tokens, :]


def causal_linear_attention(
    q: Float[Tensor, "*batch queries width"],
    k: Float[Tensor, "*batch keys width"],
    v: Float[Tensor, "*batch keys features"],
) -> Float[Tensor, "*batch queries features"]:
    r""":math:`\sum_{j \leq i + o} (q_i \cdot k_j)\, v_j`, with the queries the last of the keys, `o` keys before them.

    `O(n d^2)` in time; memory beyond inputs and output is one state of `d x d` and one chunk, for the gradient too.
    """
    if is_transformed():
        return _plain_linear_attention(q, k, v)
    flat = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    return _Linear.apply(*flat).view(*q.shape[:-1], v.shape[-1])


def _plain_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, square by square: for `torch.func` and compilation."""
    return (q @ k.transpose(-2, -1)).tril(k.shape[-2] - q.shape[-2]) @ v


class _Linear(torch.autograd.Function):
    """Row `i` gathers `(a_i . b_j) c_j` over the keys `j <= i + offset`."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, c)
        offset = b.shape[1] - a.shape[1]
        out = a.new_empty(*a.shape[:2], c.shape[2])
        state = b[:, :offset].transpose(1, 2) @ c[:, :offset]
        for rows, keys in _chunks(a.shape[1], offset):
            torch.bmm(a[:, rows], state, out=out[:, rows])
            out[:, rows].baddbmm_((a[:, rows] @ b[:, keys].transpose(1, 2)).tril_(), c[:, keys])
            state.baddbmm_(b[:, keys].transpose(1, 2), c[:, keys])
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        a, b, c = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            wanted = ctx.needs_input_grad
            return (
                _Linear.apply(upstream, c, b) if wanted[0] else None,
                _ReversedLinear.apply(c, upstream, a) if wanted[1] else None,
                _ReversedLinear.apply(b, a, upstream) if wanted[2] else None,
            )


class _ReversedLinear(torch.autograd.Function):
    """Its transpose: key `j` gathers `(a_j . b_i) c_i` over the rows `i >= j - offset`."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, c)
        offset = a.shape[1] - b.shape[1]
        out = a.new_empty(*a.shape[:2], c.shape[2])
        state = a.new_zeros(a.shape[0], b.shape[2], c.shape[2])
        for rows, keys in reversed(_chunks(b.shape[1], offset)):
            torch.bmm(a[:, keys], state, out=out[:, keys])
            out[:, keys].baddbmm_((a[:, keys] @ b[:, rows].transpose(1, 2)).triu_(), c[:, rows])
            state.baddbmm_(b[:, rows].transpose(1, 2), c[:, rows])
        torch.bmm(a[:, :offset], state, out=out[:, :offset])
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        a, b, c = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            wanted = ctx.needs_input_grad
            return (
                _ReversedLinear.apply(upstream, c, b) if wanted[0] else None,
                _Linear.apply(c, upstream, a) if wanted[1] else None,
                _Linear.apply(b, a, upstream) if wanted[2] else None,
            )


def _chunks(queries: int, offset: int) -> list[tuple[slice, slice]]:
    """Rows, and the keys at their places."""
    ends = [(first, min(first + CHUNK, queries)) for first in range(0, queries, CHUNK)]
    return [(slice(first, end), slice(first + offset, end + offset)) for first, end in ends]


class Pattern:
    """Where the entries of a sparse matrix are, for all of the batch at once: block-diagonal, in rows of one width."""

    def __init__(self, support: Support, num_keys: int):
        queries, width = support.indices.shape[-2:]
        self.mask = support.mask.reshape(-1, width)
        first = num_keys * (torch.arange(len(self.mask), device=self.mask.device) // queries)
        self.indices = support.indices.reshape(-1, width) + first[:, None]
        self.num_columns = num_keys * (len(self.mask) // queries)
        self.empty = ~self.mask
        self.is_filled = not self.empty.any()

    @cached_property
    def _compressed(self) -> tuple[Tensor, Tensor]:
        """Where rows start, and the columns of all entries."""
        starts = F.pad(self.mask.sum(-1).cumsum(0), (1, 0))
        return starts, self.indices.flatten() if self.is_filled else self.indices[self.mask]

    def csr(self, dtype: torch.dtype) -> Tensor:
        """A sparse matrix of zeros with this pattern."""
        starts, columns = self._compressed
        zeros = torch.zeros(len(columns), dtype=dtype, device=columns.device)
        with warnings.catch_warnings():  # the layout announces that it is in beta
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            size = (len(self.mask), self.num_columns)
            return torch.sparse_csr_tensor(starts, columns, zeros, size, check_invariants=False)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries in the order of their columns: their places, their rows, and where each column starts."""
        places = self.mask.flatten().nonzero()[:, 0]
        columns = self.indices.flatten()[places]
        columns, order = columns.sort(stable=True)
        places = places[order]
        starts = torch.searchsorted(columns, torch.arange(self.num_columns + 1, device=columns.device))
        return places, places // self.mask.shape[1], starts


# Three products with one pattern. The derivatives of each are the other two, so they nest as often as is wanted.


def pattern_dots(a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
    """`a_i . b_j` at the entries of the pattern, 0 at places without one."""
    if is_transformed():
        return (a[:, None] * b[pattern.indices]).sum(-1).masked_fill(pattern.empty, 0.0)
    return _Dots.apply(a, b, pattern)


def pattern_sums(w: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
    """Row `i` sums `w_ij b_j` over its entries."""
    if is_transformed():
        return (w.masked_fill(pattern.empty, 0.0)[..., None] * b[pattern.indices]).sum(-2)
    return _Sums.apply(w, b, pattern)


def _dots_by_kernel(a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
    """By torch's own kernel, which gathers nothing; three times as fast on a CPU."""
    entries = torch.sparse.sampled_addmm(pattern.csr(a.dtype), a, b.T, beta=0.0).values()
    if pattern.is_filled:
        return entries.view(pattern.mask.shape)
    return entries.new_zeros(pattern.mask.shape).masked_scatter_(pattern.mask, entries)


def _dots_by_gathering(a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
    """By gathering a block of rows at a time."""
    rows, width = pattern.indices.shape
    out = a.new_empty(rows, width, 1)
    size = max(1, GATHER_ELEMENTS // max(1, width * a.shape[1]))
    for first in range(0, rows, size):
        part = slice(first, first + size)
        gathered = b.index_select(0, pattern.indices[part].flatten()).view(-1, width, b.shape[1])
        torch.bmm(gathered, a[part, :, None], out=out[part])
    return out[..., 0].masked_fill_(pattern.empty, 0.0)


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.pattern = pattern
        return _dots_by_kernel(a, b, pattern) if a.device.type == "cpu" else _dots_by_gathering(a, b, pattern)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        a, b = ctx.saved_tensors
        for_a = _Sums.apply(upstream, b, ctx.pattern) if ctx.needs_input_grad[0] else None
        for_b = _ColumnSums.apply(upstream, a, ctx.pattern) if ctx.needs_input_grad[1] else None
        return for_a, for_b, None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(w, b)
        ctx.pattern = pattern
        w = w.masked_fill(pattern.empty, 0.0)
        return F.embedding_bag(pattern.indices, b, mode="sum", per_sample_weights=w)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        w, b = ctx.saved_tensors
        for_w = _Dots.apply(upstream, b, ctx.pattern) if ctx.needs_input_grad[0] else None
        for_b = _ColumnSums.apply(w, upstream, ctx.pattern) if ctx.needs_input_grad[1] else None
        return for_w, for_b, None


class _ColumnSums(torch.autograd.Function):
    """Column `j` sums `w_ij a_i` over its entries."""

    @staticmethod
    def forward(ctx, w: Tensor, a: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(w, a)
        ctx.pattern = pattern
        places, rows, starts = pattern.transposed
        w = w.flatten()[places]
        return F.embedding_bag(rows, a, starts, mode="sum", per_sample_weights=w, include_last_offset=True)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        w, a = ctx.saved_tensors
        for_w = _Dots.apply(a, upstream, ctx.pattern) if ctx.needs_input_grad[0] else None
        for_a = _Sums.apply(w, upstream, ctx.pattern) if ctx.needs_input_grad[1] else None
        return for_w, for_a, None
