r"""Attention as a few exact entries in every row and a background: the structured operator :math:`B = B_1 + B_2`.

A search gives row :math:`i`, which may see the :math:`n_i` keys :math:`N_i`, its large entries :math:`S_i`
(arXiv 2307.08045). With :math:`x_{ij} = s_{ij} - c_i`,

.. math::

    B_{ij} = e^{x_{ij}} \ (j \in S_i), \qquad B_{ij} = 1 \ (j \in N_i,\ j \notin S_i), \qquad
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
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pennylane_qattn.grover.products import (
    Pattern,
    causal_linear_attention,
    pattern_dots,
    pattern_sums,
    prefix_sums,
)
from pennylane_qattn.grover.support import DotProductScores, Support
from pennylane_qattn.transforms import is_transformed


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
        self._pattern = Pattern(support, scores.num_keys)

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
        dots = pattern_dots(q.flatten(0, -2), k.flatten(0, -2), self._pattern).view(mask.shape)
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
        sparse = pattern_sums(rows.sparse.flatten(0, -2), v.flatten(0, -2), self._pattern)
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
