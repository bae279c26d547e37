r"""Attention as a few exact entries in every row and a background: the structured operator :math:`B = B_1 + B_2`.

A search gives row :math:`i`, which may see the :math:`n_i` keys :math:`N_i`, its large entries :math:`S_i`
(arXiv 2307.08045). With :math:`x_{ij} = s_{ij} - c_i`,

.. math::

    B_{ij} = e^{x_{ij}} \ (j \in S_i), \qquad B_{ij} = 1 \ (j \in N_i \setminus S_i), \qquad
    B_1 = e^x - 1 \ \text{on}\ S_i, \quad B_2 = 1 \ \text{on}\ N_i.

:math:`B_1` is sparse. :math:`B_2` is of rank one when all keys are seen; causally it is a triangle of ones, which has
full rank, and what stays cheap is its product, a prefix sum. With `order=2` the background is :math:`1 + x` and
:math:`B_1 = e^x - 1 - x`: rank `d + 1`, causally linear attention (arXiv 2006.16236).

Products cost `O(nd + nkd)`, or `O(nd^2 + nkd)` at order 2, in memory `O(nd + nk)`, forwards and backwards: neither a
square of tokens nor the gathered keys, `n x k x d`, are ever held. We differ from the paper, whose background is of the
same ones, by the shift `c_i`, by order 2, and by normalising without overflow: each row is divided by
:math:`e^{m_i}`, :math:`m_i = \max(0, \max_{S_i} x)`; a row without background needs no ones and takes
:math:`m_i = \max_{S_i} x`.

Which keys are in `S_i`, and the shift, are held fixed when derivatives are taken. Exact attention does
not depend on the shift at all, so a gradient through it would only follow the error of the approximation.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pennylane_qattn.transforms import is_transformed

#: Gathered elements per block, where keys have to be gathered.
GATHER_ELEMENTS = 2**24
#: Scores per block where a whole row has to be looked at.
SCORE_ELEMENTS = 2**20
#: Tokens per chunk of linear attention and of prefix sums.
CHUNK = 64


class ScoreMatrix(ABC):
    r"""The scores :math:`s_{ij}` and who may see whom, read in blocks of rows.

    Attributes:
        shape: `(*batch, queries, keys)`. Queries are the last of the keys where there are fewer of them, as with a
            key/value cache.
        is_causal: query `i` sees the keys `j <= i + keys - queries`.
        visible: `False` for keys that nobody sees, such as padding; `None` where all may be seen.
    """

    shape: torch.Size
    is_causal: bool
    visible: Bool[Tensor, "*batch keys"] | None
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def block(self, rows: slice) -> Float[Tensor, "*batch rows keys"]:
        """The scores of some rows, of disallowed keys too."""

    @property
    def num_queries(self) -> int:
        return self.shape[-2]

    @property
    def num_keys(self) -> int:
        return self.shape[-1]

    @property
    def offset(self) -> int:
        """How many keys the first query sees before its own."""
        return self.num_keys - self.num_queries

    def allowed(self, rows: slice) -> Bool[Tensor, "*#batch rows keys"]:
        """Which keys these rows may see."""
        last = self._last_key(rows)[:, None]
        allowed = torch.arange(self.num_keys, device=self.device) <= last
        return allowed if self.visible is None else allowed & self.visible[..., None, :]

    @cached_property
    def num_allowed(self) -> Int[Tensor, "*batch queries"]:
        """How many keys each row may see, `n_i`."""
        last = self._last_key(slice(None))
        if self.visible is None:
            return (last + 1).expand(self.shape[:-1])
        return self.visible.long().cumsum(-1)[..., last]

    def blocks(self) -> Iterator[slice]:
        """The rows, in pieces of at most `SCORE_ELEMENTS` scores."""
        size = max(1, SCORE_ELEMENTS // max(1, math.prod(self.shape[:-2]) * self.num_keys))
        return (slice(first, first + size) for first in range(0, self.num_queries, size))

    def thresholds(self, tau: float | Float[Tensor, "..."]) -> Float[Tensor, "*batch queries"]:
        """A threshold for every row, in the precision of the scores."""
        tau = torch.as_tensor(tau, dtype=self.dtype, device=self.device)
        if tau.isnan().any():
            raise ValueError("tau must be a number, infinite perhaps; got NaN")
        return tau.expand(self.shape[:-1])

    def _last_key(self, rows: slice) -> Int[Tensor, " rows"]:
        positions = torch.arange(self.num_queries, device=self.device)[rows] + self.offset
        return positions if self.is_causal else torch.full_like(positions, self.num_keys - 1)

    def _check(self) -> None:
        if min(self.shape[-2:]) < 1:
            raise ValueError(f"scores need at least one query and one key; got the shape {tuple(self.shape)}")
        if self.is_causal and self.offset < 0:
            raise ValueError(
                f"causal queries must be no more than the keys; got {self.num_queries} and {self.num_keys}"
            )
        expected = (*self.shape[:-2], self.num_keys)
        if self.visible is not None and tuple(self.visible.shape) != expected:
            raise ValueError(f"visible must have the shape (*batch, keys) {expected}; got {tuple(self.visible.shape)}")


class DotProductScores(ScoreMatrix):
    r""":math:`s_{ij} = \mathrm{scale} \cdot q_i \cdot k_j`, kept as its two factors.

    Args:
        q, k: prepared queries and keys, as `Score.queries` and `Score.keys` give them.
        scale: by default :math:`1/\sqrt{d}`.
        is_causal: a query sees no later key.
        visible: `False` for keys that nobody sees.
    """

    def __init__(
        self,
        q: Float[Tensor, "*batch queries width"],
        k: Float[Tensor, "*batch keys width"],
        scale: float | None = None,
        *,
        is_causal: bool = True,
        visible: Bool[Tensor, "*batch keys"] | None = None,
    ):
        if q.dtype != k.dtype or q.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"q and k must both be float32 or both float64; got {q.dtype} and {k.dtype}")
        if q.ndim < 2 or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
            raise ValueError(f"q and k must agree in batch and width; got {tuple(q.shape)} and {tuple(k.shape)}")
        self.scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite; got {scale}")
        self.q, self.k, self.is_causal, self.visible = q, k, is_causal, visible
        self.device, self.dtype = q.device, q.dtype
        self.shape = torch.Size((*q.shape[:-1], k.shape[-2]))
        self._check()

    def block(self, rows: slice) -> Float[Tensor, "*batch rows keys"]:
        with torch.autocast(self.device.type, enabled=False):
            return self.q[..., rows, :] @ self.k.transpose(-2, -1) * self.scale


class DenseScores(ScoreMatrix):
    """Scores that are there already, such as those of a trained model's head."""

    def __init__(
        self,
        scores: Float[Tensor, "*batch queries keys"],
        *,
        is_causal: bool = True,
        visible: Bool[Tensor, "*batch keys"] | None = None,
    ):
        self.scores, self.is_causal, self.visible = scores, is_causal, visible
        self.shape, self.device, self.dtype = scores.shape, scores.device, scores.dtype
        self._check()

    def block(self, rows: slice) -> Float[Tensor, "*batch rows keys"]:
        return self.scores[..., rows, :]


@dataclass(frozen=True, eq=False)
class Support:
    """The keys `S_i` of every row whose entries are kept exactly, padded to one width.

    Attributes:
        indices: keys; anything where `mask` is `False`.
        mask: which of the places hold a key.
    """

    indices: Int[Tensor, "*batch queries k"]
    mask: Bool[Tensor, "*batch queries k"]

    def __post_init__(self):
        if self.indices.shape != self.mask.shape or self.indices.ndim < 2:
            shapes = f"{tuple(self.indices.shape)} and {tuple(self.mask.shape)}"
            raise ValueError(f"indices and mask must have one shape (*batch, queries, k); got {shapes}")
        if self.indices.shape[-1] < 1:
            raise ValueError("a support needs room for at least one key a row; got k = 0: mask a place instead")
        # Places that hold no key read key 0, with a weight of zero.
        object.__setattr__(self, "indices", self.indices.long().masked_fill(~self.mask, 0))
        if (self.indices < 0).any():
            raise ValueError(f"keys of a support must be at least 0; got {int(self.indices.min())}")
        ordered = self.indices.masked_fill(~self.mask, -1).sort(-1).values
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
            raise ValueError("a row's support holds one key twice: give every key once")

    @cached_property
    def sizes(self) -> Int[Tensor, "*batch queries"]:
        """How many keys each row holds, `k_i`."""
        return self.mask.sum(-1)

    def dense(self, rows: slice, num_keys: int) -> Bool[Tensor, "*batch rows keys"]:
        """Some rows as a mask over all keys."""
        indices, mask = self.indices[..., rows, :], self.mask[..., rows, :]
        # One place more than there are keys takes what is no key.
        dense = torch.zeros(*indices.shape[:-1], num_keys + 1, dtype=torch.bool, device=mask.device)
        return dense.scatter_(-1, indices.masked_fill(~mask, num_keys), True)[..., :num_keys]

    def check_allowed(self, scores: ScoreMatrix) -> None:
        """Refuses a support that holds keys which its row may not see."""
        if self.indices.shape[:-1] != scores.shape[:-1]:
            raise ValueError(
                f"a support must have the rows of its scores {tuple(scores.shape[:-1])}; "
                f"got {tuple(self.indices.shape[:-1])}"
            )
        if (self.indices >= scores.num_keys).any():
            worst = int(self.indices.max())
            raise ValueError(f"keys of a support must be below the number of keys {scores.num_keys}; got {worst}")
        if (self.mask & (self.indices > scores._last_key(slice(None))[:, None])).any():
            raise ValueError("a causal row's support holds a future key: leave out every key after the row's own")
        if scores.visible is not None:
            seen = scores.visible[..., None, :].expand(scores.shape).gather(-1, self.indices)
            if (self.mask & ~seen).any():
                raise ValueError("a row's support holds a key that is not visible: leave out padded keys")


@torch.no_grad()
def threshold_support(scores: ScoreMatrix, tau: float | Float[Tensor, "..."]) -> Support:
    r"""The allowed keys with :math:`s_{ij} \geq \tau`, in blocks of rows: a full scan, `O(n^2 d)`.

    The threshold is on the scores before any shift, since the shift is found from what the support leaves over.

    Args:
        scores: the scores.
        tau: one number, or one for every row in a shape that expands to `(*batch, queries)`.
    """
    tau = scores.thresholds(tau)
    found = []
    for rows in scores.blocks():
        marked = scores.allowed(rows) & (scores.block(rows) >= tau[..., rows, None])
        place = marked.cumsum(-1) - 1
        width = max(1, int(place[..., -1].max()) + 1)
        indices = torch.zeros(*marked.shape[:-1], width + 1, dtype=torch.long, device=scores.device)
        keys = torch.arange(scores.num_keys, device=scores.device).expand(marked.shape)
        indices = indices.scatter_(-1, place.masked_fill(~marked, width), keys)[..., :width]
        found.append((indices, torch.arange(width, device=scores.device) <= place[..., -1:]))
    widest = max(indices.shape[-1] for indices, _ in found)
    indices, mask = (
        torch.cat([F.pad(piece, (0, widest - piece.shape[-1])) for piece in pieces], dim=-2)
        for pieces in zip(*found, strict=True)
    )
    return Support(indices, mask)


@torch.no_grad()
def top_support(scores: ScoreMatrix, count: int) -> Support:
    """The `count` allowed keys of the largest scores, or all of them in shorter rows: a full scan, `O(n^2 d)`."""
    if not 1 <= count <= scores.num_keys:
        raise ValueError(f"k must lie between 1 and the number of keys {scores.num_keys}; got {count}")
    found = []
    for rows in scores.blocks():
        allowed = scores.allowed(rows)
        block = scores.block(rows).masked_fill(~allowed, -math.inf)
        top = block.topk(count, dim=-1, sorted=False).indices
        taken = allowed.expand(block.shape).gather(-1, top)
        # In the order of memory, and what is no key last.
        found.append(top.masked_fill(~taken, scores.num_keys).sort(-1).values)
    indices = torch.cat(found, dim=-2)
    return Support(indices, indices < scores.num_keys)


@torch.no_grad()
def midrange_shift(scores: ScoreMatrix, support: Support) -> Float[Tensor, "*batch queries"]:
    r"""The middle between the least and the greatest score off the support, which makes :math:`\eta` least.

    0 in rows without background. It is another full scan in blocks of rows: a quantum search for the minimum and the
    maximum costs queries too, and whoever counts queries has to count them.
    """
    support.check_allowed(scores)
    pieces = []
    for rows in scores.blocks():
        block, rest = scores.block(rows), scores.allowed(rows) & ~support.dense(rows, scores.num_keys)
        low, high = block.masked_fill(~rest, math.inf).amin(-1), block.masked_fill(~rest, -math.inf).amax(-1)
        pieces.append(torch.where(rest.any(-1), low + (high - low) / 2, 0.0))
    return torch.cat(pieces, dim=-1)


def row_reference(
    largest: Float[Tensor, "*rows"], sizes: Int[Tensor, "*rows"], counts: Int[Tensor, "*#rows"]
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """What rows are divided by: the exponent `m_i`, and what is left of a background of 1.

    Args:
        largest: the greatest `x` on the support, anything where that is empty.
        sizes: `k_i`.
        counts: `n_i`.
    """
    full = sizes == counts
    m = torch.where(full, largest, largest.clamp(min=0)).masked_fill(sizes == 0, 0.0).detach()
    return m, (-m).exp().masked_fill(full, 0.0)


def dense_rows(
    x: Float[Tensor, "*rows keys"], allowed: Bool[Tensor, "*#rows keys"], kept: Bool[Tensor, "*rows keys"], order: int
) -> tuple[Float[Tensor, "*rows keys"], Float[Tensor, "*rows"]]:
    r"""Rows of :math:`B e^{-m}` over all keys, and their :math:`m`: what the structured products stand for.

    Args:
        x: shifted scores.
        allowed: keys that may be seen.
        kept: keys of the support.
        order: 1 or 2.
    """
    on_support = x.masked_fill(~kept, -math.inf)
    m, base = row_reference(on_support.amax(-1), kept.sum(-1), allowed.sum(-1))
    background = base[..., None] * (1 + x if order == 2 else torch.ones_like(x))
    return torch.where(kept, (on_support - m[..., None]).exp(), background.masked_fill(~allowed, 0.0)), m


class SparseAttention:
    r"""The operator :math:`B`: :math:`e^x` on the support, 1 or :math:`1 + x` elsewhere, as structure.

    Differentiable in queries, keys and values, twice too, with support and shift held fixed; gradients are made with
    the same structure. At order 2 an entry is negative where :math:`x < -1`. The theorem for it, T2, needs
    :math:`|x| < 1` off the support; a row whose *sum* is not positive has no attention, and `attend` refuses it.

    Args:
        scores: queries and keys, and who may see whom.
        support: the keys kept exactly.
        shift: `c_i`, from `midrange_shift` or 0; no gradient passes through it.
        order: 1 for a background of 1, 2 for one of :math:`1 + x`.
    """

    def __init__(
        self,
        scores: DotProductScores,
        support: Support,
        shift: Float[Tensor, "*batch queries"] | None = None,
        *,
        order: int = 1,
    ):
        if order not in (1, 2):
            raise ValueError(f"order must be 1 (background 1) or 2 (background 1 + x); got {order}")
        support.check_allowed(scores)
        if shift is None:
            shift = scores.q.new_zeros(()).expand(scores.shape[:-1])
        elif shift.shape != scores.shape[:-1]:
            raise ValueError(f"shift must have one number a row {tuple(scores.shape[:-1])}; got {tuple(shift.shape)}")
        elif not shift.isfinite().all():
            raise ValueError("shift must be finite; leave it out for no shift")
        self.scores, self.support, self.order = scores, support, order
        self.shift = shift.detach().to(scores.q.dtype)
        self._pattern = _Pattern(support, scores.num_keys)

    def matmul(self, v: Float[Tensor, "*batch keys features"]) -> Float[Tensor, "*batch queries features"]:
        r""":math:`B v`. It overflows where :math:`e^x` does; `attend` does not."""
        rows = self._rows()
        return rows.m.exp()[..., None] * self._product(rows, v)

    __matmul__ = matmul

    def attend(self, v: Float[Tensor, "*batch keys features"]) -> Float[Tensor, "*batch queries features"]:
        r""":math:`D(B)^{-1} B v`; 0 in rows that see no key."""
        rows = self._rows()
        sums = self._sums(rows)
        if self.order == 2 and not is_transformed():
            check_row_sums(sums)
        return self._product(rows, v) / sums[..., None]

    def row_sums(self) -> Float[Tensor, "*batch queries"]:
        r""":math:`Z_B`, which overflows where :math:`e^x` does."""
        rows = self._rows()
        return rows.m.exp() * self._sums(rows).masked_fill(self.scores.num_allowed == 0, 0.0)

    def to_dense(self, normalised: bool = False) -> Float[Tensor, "*batch queries keys"]:
        r""":math:`B`, or :math:`D(B)^{-1}B`, with every entry: for tests and for looking."""
        everything = slice(None)
        x = self.scores.block(everything) - self.shift[..., None]
        kept = self.support.dense(everything, self.scores.num_keys)
        b, m = dense_rows(x, self.scores.allowed(everything), kept, self.order)
        if not normalised:
            return m.exp()[..., None] * b
        sums = b.sum(-1, keepdim=True).masked_fill(self.scores.num_allowed[..., None] == 0, 1.0)
        return b / check_row_sums(sums)

    def __repr__(self) -> str:
        scores = self.scores
        return (
            f"SparseAttention(queries={scores.num_queries}, keys={scores.num_keys}, "
            f"k={self.support.indices.shape[-1]}, order={self.order}, causal={scores.is_causal})"
        )

    def _rows(self) -> "_Rows":
        """`e^x` on the support and what rows are divided by."""
        mask, sizes, counts = self.support.mask, self.support.sizes, self.scores.num_allowed
        q, k = self.scores.q, self.scores.k
        dots = _dots(q.flatten(0, -2), k.flatten(0, -2), self._pattern).view(mask.shape)
        x = (self.scores.scale * dots - self.shift[..., None]).masked_fill(~mask, 0.0)
        m, base = row_reference(x.detach().masked_fill(~mask, -math.inf).amax(-1), sizes, counts)
        exact = (x - m[..., None]).masked_fill(~mask, -math.inf).exp()
        replaced = base[..., None] * (1 + x if self.order == 2 else torch.ones_like(x))
        return _Rows(m, base, exact, (exact - replaced).masked_fill(~mask, 0.0))

    def _product(self, rows: "_Rows", v: Tensor) -> Tensor:
        """`B v` divided by `e^m`: the sparse rows and the background."""
        scores = self.scores
        if v.shape[:-1] != scores.k.shape[:-1] or v.dtype != scores.k.dtype:
            raise ValueError(
                f"v must have the batch, keys and precision of k, {tuple(scores.k.shape[:-1])} {scores.k.dtype}; "
                f"got {tuple(v.shape)} {v.dtype}"
            )
        sparse = _sums(rows.sparse.flatten(0, -2), v.flatten(0, -2), self._pattern)
        v = self._seen(v)
        background = self._prefix_sums(v)
        if self.order == 2:
            linear = self._linear_attention(v)
            background = (1 - self.shift)[..., None] * background + scores.scale * linear
        return sparse.view(*rows.m.shape, v.shape[-1]) + rows.base[..., None] * background

    def _sums(self, rows: "_Rows") -> Tensor:
        """Row sums of `B` divided by `e^m`, 1 where nothing is seen."""
        scores, counts = self.scores, self.scores.num_allowed
        if self.order == 1:
            # The same as n_i plus the sum of B1, with nothing to cancel.
            sums = rows.exact.sum(-1) + rows.base * (counts - self.support.sizes)
        else:
            first = scores.scale * (scores.q * self._prefix_sums(self._seen(scores.k))).sum(-1)
            sums = rows.sparse.sum(-1) + rows.base * ((1 - self.shift) * counts + first)
        return sums.masked_fill(counts == 0, 1.0)

    def _seen(self, keys: Tensor) -> Tensor:
        visible = self.scores.visible
        return keys if visible is None else keys.masked_fill(~visible[..., None], 0.0)

    def _prefix_sums(self, keys: Tensor) -> Tensor:
        """For every query, the sum over the keys it may see."""
        if not self.scores.is_causal:
            return keys.sum(-2, keepdim=True).expand(*keys.shape[:-2], self.scores.num_queries, keys.shape[-1])
        return prefix_sums(keys)[..., self.scores.offset :, :]

    def _linear_attention(self, v: Tensor) -> Tensor:
        q, k = self.scores.q, self.scores.k
        with torch.autocast(q.device.type, enabled=False):
            if not self.scores.is_causal:
                return q @ (k.transpose(-2, -1) @ v)
            return causal_linear_attention(q, k, v)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Everything about the rows that does not depend on values, divided by `e^m`."""

    m: Tensor  # the exponent
    base: Tensor  # of the background
    exact: Tensor  # e^x on the support
    sparse: Tensor  # B1 on the support


def check_row_sums(sums: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Refuses rows that cannot be normalised, as `1 + x` may make them."""
    bad = sums <= 0
    if bad.any():
        raise ValueError(
            f"row sums of order 2 must be positive; got {int(bad.sum())} that are not, the least "
            f"{float(sums.min()):.3g}: shift by midrange_shift, keep more keys, or take order=1"
        )
    return sums


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


class _Pattern:
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


def _dots(a: Tensor, b: Tensor, pattern: _Pattern) -> Tensor:
    """`a_i . b_j` at the entries of the pattern, 0 at places without one."""
    if is_transformed():
        return (a[:, None] * b[pattern.indices]).sum(-1).masked_fill(pattern.empty, 0.0)
    return _Dots.apply(a, b, pattern)


def _sums(w: Tensor, b: Tensor, pattern: _Pattern) -> Tensor:
    """Row `i` sums `w_ij b_j` over its entries."""
    if is_transformed():
        return (w.masked_fill(pattern.empty, 0.0)[..., None] * b[pattern.indices]).sum(-2)
    return _Sums.apply(w, b, pattern)


def _sampled_dots(a: Tensor, b: Tensor, pattern: _Pattern) -> Tensor:
    """By torch's own kernel, which gathers nothing; three times as fast on a CPU."""
    entries = torch.sparse.sampled_addmm(pattern.csr(a.dtype), a, b.T, beta=0.0).values()
    if pattern.is_filled:
        return entries.view(pattern.mask.shape)
    return entries.new_zeros(pattern.mask.shape).masked_scatter_(pattern.mask, entries)


def _gathered_dots(a: Tensor, b: Tensor, pattern: _Pattern) -> Tensor:
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
    def forward(ctx, a: Tensor, b: Tensor, pattern: _Pattern) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.pattern = pattern
        return _sampled_dots(a, b, pattern) if a.device.type == "cpu" else _gathered_dots(a, b, pattern)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        a, b = ctx.saved_tensors
        for_a = _Sums.apply(upstream, b, ctx.pattern) if ctx.needs_input_grad[0] else None
        for_b = _ColumnSums.apply(upstream, a, ctx.pattern) if ctx.needs_input_grad[1] else None
        return for_a, for_b, None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: Tensor, b: Tensor, pattern: _Pattern) -> Tensor:
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
    def forward(ctx, w: Tensor, a: Tensor, pattern: _Pattern) -> Tensor:
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
