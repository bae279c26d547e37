r"""Scores that are read in blocks of rows, and the keys of every row that are kept exactly: its support.

A support is what a search finds (arXiv 2307.08045): the keys from a threshold on, or those of the largest scores. It is
fixed on the scores as they are; the shift that makes the background flattest, its midrange, is found after it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: Scores per block where a whole row has to be looked at.
SCORE_ELEMENTS = 2**20


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
        q, k: its two factors, as `Score.sides` gives them.
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

    def __post_init__(self) -> None:
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
