r"""Scores that keep a few entries of every row exactly and take the rest for a constant background: `grover-sparse`.

Row :math:`i` keeps the keys :math:`S_i` that a search would find, those of the largest scores or all from a threshold
on, and every other key weighs as one with :math:`x = 0` would (arXiv 2307.08045; `sparse.py` has the operator and
`bounds.py` its error). Here the keys are found by a scan: a simulated search finds the same ones, and what it would
cost is counted by `search.py`. They are chosen anew in every call, and held fixed for its gradient.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pennylane_qattn.grover.sparse import SparseAttention, check_row_sums, dense_rows
from pennylane_qattn.grover.support import (
    DotProductScores,
    ScoreMatrix,
    Support,
    midrange_shift,
    threshold_support,
    top_support,
)
from pennylane_qattn.precision import widened
from pennylane_qattn.scores import GaussianScore, ScaledDotScore, Score
from pennylane_qattn.transforms import is_transformed

#: How the keys of a row are chosen.
SUPPORTS = ("top", "threshold")


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Which entries are kept, and what stands for the others.

    Args:
        support: `"top"`, the keys of the `k` largest scores; or `"threshold"`, those of scores from `tau` on.
        k: how many, with `"top"`; rows that see fewer keys keep them all.
        tau: the threshold, in the unit of the scores, before the shift.
        order: 1, every other entry is 1; or 2, it is :math:`1 + x`, which needs a background within (-1, 1).
        shifted: shift every row by the midrange of its background, so that the error is least.

    Raises:
        ValueError: for a value outside its range.
    """

    support: str = "top"
    k: int = 4
    tau: float = 1.0
    order: int = 1
    shifted: bool = True

    def __post_init__(self) -> None:
        if self.support not in SUPPORTS:
            raise ValueError(f"support must be one of {', '.join(SUPPORTS)}; got {self.support!r}")
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1; got {self.k!r}")
        if not isinstance(self.tau, int | float) or math.isnan(self.tau):
            raise ValueError(f"tau must be a number; got {self.tau!r}")
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 (background 1) or 2 (background 1 + x); got {self.order!r}")

    def find(self, scores: ScoreMatrix) -> Support:
        """The keys that every row keeps, by a full scan."""
        if self.support == "threshold":
            return threshold_support(scores, self.tau)
        return top_support(scores, min(self.k, scores.num_keys))

    def operator(self, scores: DotProductScores, support: Support | None = None) -> SparseAttention:
        """The operator for these scores, with the keys that are given or that `find` finds."""
        support = self.find(scores) if support is None else support
        shift = midrange_shift(scores, support) if self.shifted else None
        return SparseAttention(scores, support, shift, order=self.order)


class SparseScore(Score):
    """Base of scores with a sparse part and a background; a subclass names the dot product that it is made of.

    Attributes:
        sparsity: which entries are kept.
    """

    is_structured = True
    is_dot_product = False
    sparsity: Sparsity

    def set_longest_row(self, block_size: int) -> None:
        if self.sparsity.support == "top" and self.sparsity.k > block_size:
            raise ValueError(f"k must be no more than the {block_size} keys of a row; got {self.sparsity.k}")

    def has_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        return False  # that of the dense score is not this one

    def operator(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        is_causal: bool,
        visible: Bool[Tensor, "batch keys"] | None = None,
    ) -> SparseAttention:
        """The structured operator of prepared queries and keys."""
        shown = None if visible is None else visible[:, None].expand(-1, q.shape[1], -1)
        return self.sparsity.operator(
            DotProductScores(*self.sides(q, k), self.scale, is_causal=is_causal, visible=shown)
        )

    def attend(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        v: Float[Tensor, "batch heads keys features"],
        is_causal: bool,
        visible: Bool[Tensor, "batch keys"] | None,
    ) -> Float[Tensor, "batch heads queries features"]:
        return self.operator(q, k, is_causal, visible).attend(v)

    def normalise(
        self,
        scores: Float[Tensor, "batch heads queries keys"],
        visible: Bool[Tensor, "#batch #heads queries keys"] | None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The weights with every entry: for looking, for dropout, and where positions are no plain triangle."""
        s = widened(scores)
        if not s.numel():
            return s
        allowed = torch.ones_like(s, dtype=torch.bool) if visible is None else visible.expand(s.shape)
        with torch.no_grad():
            kept = self._kept(s, allowed)
            rest = allowed & ~kept
            shift = s.new_zeros(*s.shape[:-1], 1)
            if self.sparsity.shifted:
                low = s.masked_fill(~rest, math.inf).amin(-1, keepdim=True)
                high = s.masked_fill(~rest, -math.inf).amax(-1, keepdim=True)
                shift = torch.where(rest.any(-1, keepdim=True), low + (high - low) / 2, 0.0)
        b, _ = dense_rows(s - shift, allowed, kept, self.sparsity.order)
        sums = b.sum(-1, keepdim=True)
        if self.sparsity.order == 2 and not is_transformed():
            check_row_sums(sums)
        return b / sums

    def _kept(self, s: Tensor, allowed: Tensor) -> Tensor:
        if self.sparsity.support == "threshold":
            return allowed & (s >= self.sparsity.tau)
        top = s.masked_fill(~allowed, -math.inf).topk(min(self.sparsity.k, s.shape[-1]), dim=-1, sorted=False).indices
        return torch.zeros_like(allowed).scatter(-1, top, True) & allowed


class SparseDotScore(SparseScore, ScaledDotScore):
    """Scaled dot products with a sparse part and a background; no parameters, so a classical model's fit."""

    def __init__(self, num_heads: int, features: int, sparsity: Sparsity):
        super().__init__(num_heads, features)
        self.sparsity = sparsity


class SparseGaussianScore(SparseScore, GaussianScore):
    """Gaussian scores likewise; the parameter is the Gaussian score's, by the same name."""

    def __init__(self, num_heads: int, features: int, sparsity: Sparsity, beta: float | None = None):
        super().__init__(num_heads, features, beta)
        self.sparsity = sparsity


#: The scores of `grover-sparse` by what they compare with.
SPARSE_SCORES: dict[str, Any] = {"scaled-dot": SparseDotScore, "gaussian": SparseGaussianScore}
