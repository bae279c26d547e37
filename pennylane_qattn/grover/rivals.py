r"""Who finds the large scores of every row, at what price: quantum search, a full scan, and an exact index.

All are asked the same two things about :math:`s_{ij} = q_i \cdot k_j / \sqrt d`, with :math:`j \leq i` if causal: the
keys at or above a threshold, and the `k` largest. All are paid in one currency, inner products of the length of a key:

- `QuantumFinder`: one for each coherent oracle call and one for each verification (see `search.py`, which also says
  what is left out, in favour of the quantum side).
- `FullScan`: one for each key that a row may see.
- `BallTreeIndex`: one for each distance that scikit-learn's ball tree evaluates, to points and to the centres of balls,
  and one for each score that is computed to verify a candidate; building is counted as well. A distance is between
  vectors longer by one, and still counts 1, in favour of the index.

The index looks for points in a ball, because a half-space becomes one (Bachrach and others, "Speeding up the Xbox
recommender system using a Euclidean transformation for inner-product spaces", RecSys 2014): with
:math:`M = \max_j \lVert k_j \rVert`, :math:`k'_j = (k_j, \sqrt{M^2 - \lVert k_j \rVert^2})` and :math:`q' = (q, 0)`,

.. math::  \lVert q' - k'_j \rVert^2 = \lVert q \rVert^2 + M^2 - 2\, q \cdot k_j .

We differ in that the radius is a little too large, by what rounding may amount to, and each candidate is verified with
the arithmetic of the scan: the same keys are found, ties at the threshold included.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pennylane_qattn.extras import install
from pennylane_qattn.grover.largest import search_largest
from pennylane_qattn.grover.registers import Registers, Subspace
from pennylane_qattn.grover.search import QueryCounts, Schedule, name_places, search, search_known
from pennylane_qattn.grover.support import Support

#: Rows are taken in blocks of about so many scores.
BLOCK_SCORES = 1 << 22

#: How long the query is made, in lengths of the longest key. Any length is exact. At 1 and 2 the tree prunes best, and
#: far better than at the length that a query comes with.
AIM = 2.0

#: Larger numbers are refused, as their products would overflow.
LARGEST = 1e100

#: Norms outside this range lose digits when squared; such blocks are scanned.
SAFE_NORMS = (1e-120, 1e120)


class ScoreRows:
    """The scores of all rows, and which keys each row may see. Scores are computed when they are asked for.

    Args:
        scores: given ones; an index cannot work on these.
        causal: row `i` may see keys 0 to `i`. Otherwise it may see all.
    """

    def __init__(self, scores: Float[np.ndarray, "rows keys"] | Float[Tensor, "rows keys"], causal: bool = True):
        self.scores: np.ndarray | None = _array(scores)
        self.queries: np.ndarray | None = None
        self.keys: np.ndarray | None = None
        self.scale, self.causal = 1.0, causal
        self.num_rows, self.num_keys = self.scores.shape
        self._check("scores", self.scores)

    @classmethod
    def from_vectors(
        cls,
        queries: Float[np.ndarray, "rows features"] | Float[Tensor, "rows features"],
        keys: Float[np.ndarray, "keys features"] | Float[Tensor, "keys features"],
        causal: bool = True,
        scale: float | None = None,
    ) -> "ScoreRows":
        r"""Scores `scale` :math:`q_i \cdot k_j`, in float64.

        Args:
            queries, keys: their vectors.
            causal: row `i` may see keys 0 to `i`.
            scale: positive; the default is one over the square root of the number of features.
        """
        rows = cls.__new__(cls)
        rows.scores, rows.queries, rows.keys = None, _array(queries), _array(keys)
        rows.scale = rows.queries.shape[1] ** -0.5 if scale is None else scale
        if not 0 < rows.scale < math.inf:
            raise ValueError(f"scale must be positive and finite; got {scale}")
        rows.causal, rows.num_rows, rows.num_keys = causal, len(rows.queries), len(rows.keys)
        rows._check("queries", rows.queries)
        rows._check("keys", rows.keys)
        return rows

    @property
    def sizes(self) -> Int[np.ndarray, " rows"]:
        """Keys that each row may see."""
        return np.arange(1, self.num_rows + 1) if self.causal else np.full(self.num_rows, self.num_keys)

    def of(self, row: int, keys: slice | Int[np.ndarray, " some"] = slice(None)) -> Float[np.ndarray, " some"]:
        """Scores of one row. That of a key is the same to the last bit whichever others are asked for with it."""
        if self.scores is not None:
            return self.scores[row, keys]
        # not by matmul, whose order of summation, and so the last bit, depends on the shape
        return np.einsum("kf,f->k", self.keys[keys], self.queries[row]) * self.scale

    def blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "some keys"], Bool[np.ndarray, "some keys"]]]:
        """Rows in blocks, with their scores and the keys they may see."""
        step, sizes = max(1, BLOCK_SCORES // self.num_keys), self.sizes
        for start in range(0, self.num_rows, step):
            some = slice(start, min(start + step, self.num_rows))
            # the last row of a causal block sees no further than this
            width = int(sizes[some].max())
            scores = np.stack([self.of(row, slice(0, width)) for row in range(some.start, some.stop)])
            yield some, scores, np.arange(width) < sizes[some, None]

    def _check(self, name: str, values: Float[np.ndarray, "rows features"]) -> None:
        if not self.num_rows or not self.num_keys:
            raise ValueError(f"there must be at least one row and one key; got {self.num_rows} and {self.num_keys}")
        if self.causal and self.num_rows != self.num_keys:
            raise ValueError(f"causal rows need one key each; got {self.num_rows} rows and {self.num_keys} keys")
        seen = np.tril(np.ones(values.shape, dtype=bool)) if self.causal and name == "scores" else slice(None)
        if not (np.abs(values[seen]) < LARGEST).all():
            raise ValueError(f"{name} must be finite and below {LARGEST:g} where they are read; got others")


@dataclass(frozen=True)
class FoundKeys:
    """The keys found in each row, and what they cost in inner products of the length of a key.

    Attributes:
        keys: of all rows, one row after the other; ascending for a threshold, best first for the largest.
        offsets: row `i` has `keys[offsets[i]:offsets[i + 1]]`.
        cost: of each row.
        building: paid once, for all rows.
        counts: where `cost` came from, of a quantum search.
        certified: whether a row's keys are the right ones, where a bounded error is possible; by comparison with the
            scores, which only the simulation may do, and nothing is mended. `None` if the finder is exact.
    """

    keys: Int[np.ndarray, " found"]
    offsets: Int[np.ndarray, " bounds"]
    cost: Int[np.ndarray, " rows"]
    building: int = 0
    counts: QueryCounts | None = None
    certified: Bool[np.ndarray, " rows"] | None = None

    @property
    def total(self) -> int:
        """Everything that was paid."""
        return int(self.cost.sum()) + self.building

    @property
    def rows(self) -> Int[np.ndarray, " found"]:
        """The row of each entry of `keys`."""
        return np.repeat(np.arange(len(self.cost)), np.diff(self.offsets))

    def row(self, index: int) -> Int[np.ndarray, " row"]:
        """The keys of one row."""
        return self.keys[self.offsets[index] : self.offsets[index + 1]]

    def support(self) -> Support:
        """What was found as the support of a sparse operator, `(rows, k)`."""
        sizes = np.diff(self.offsets)
        mask = np.arange(max(1, sizes.max(initial=0))) < sizes[:, None]
        indices = np.zeros(mask.shape, dtype=np.int64)
        indices[mask] = self.keys
        return Support(torch.from_numpy(indices), torch.from_numpy(mask))


class RowFinder(ABC):
    """Finds the large scores of rows.

    Attributes:
        name: in tables.
        exact: what it finds is right, always; otherwise with high probability.
        needs_vectors: it needs queries and keys; scores alone are not enough.
    """

    name: str
    exact: bool
    needs_vectors: bool = False

    def above(self, rows: ScoreRows, tau: float) -> FoundKeys:
        """The keys with a score of `tau` or more, of each row."""
        if math.isnan(tau):
            raise ValueError("tau must be a number; got NaN")
        self._check(rows)
        return self._above(rows, tau)

    def largest(self, rows: ScoreRows, k: int) -> FoundKeys:
        """The `k` largest scores of each row, or all of a row that may see fewer; equal ones by the lower key."""
        if not 1 <= k <= rows.num_keys:
            raise ValueError(f"k must be between 1 and the number of keys, {rows.num_keys}; got {k}")
        self._check(rows)
        return self._largest(rows, k)

    @abstractmethod
    def _above(self, rows: ScoreRows, tau: float) -> FoundKeys: ...

    @abstractmethod
    def _largest(self, rows: ScoreRows, k: int) -> FoundKeys: ...

    def _check(self, rows: ScoreRows) -> None:
        if self.needs_vectors and rows.keys is None:
            raise ValueError(f"{self.name} needs queries and keys; build the rows with ScoreRows.from_vectors")


class FullScan(RowFinder):
    """Computes every score."""

    name, exact = "full scan", True

    def _above(self, rows: ScoreRows, tau: float) -> FoundKeys:
        found = [key for _, scores, allowed in rows.blocks() for key in _split((scores >= tau) & allowed)]
        return _gather(found, rows.sizes)

    def _largest(self, rows: ScoreRows, k: int) -> FoundKeys:
        sizes, found = rows.sizes, []
        for some, scores, allowed in rows.blocks():
            order = np.argsort(np.where(allowed, -scores, np.inf), axis=1, kind="stable")[:, :k]
            found += [keys[:size] for keys, size in zip(order, sizes[some], strict=True)]
        return _gather(found, sizes)


class QuantumFinder(RowFinder):
    """Simulated quantum search in each row: BBHT for a threshold, Durr and Hoyer's for the largest.

    Args:
        simulator: `StateVector`, `Subspace` or `Counting`. The last needs the least memory. All have the same law.
        schedule: of the iterations.
        error: the bound on the probability that the largest of a row are wrong. (For a threshold, see
            `expected_search`.)
        knows_number: the number of keys above the threshold is known from elsewhere, and what that cost is not counted.
        seed: of everything that is drawn; each call draws the same.
    """

    exact = False

    def __init__(
        self,
        simulator: type[Registers] = Subspace,
        schedule: Schedule | None = None,
        error: float = 0.1,
        knows_number: bool = False,
        seed: int = 0,
    ):
        if not 0 < error < 1:
            raise ValueError(f"error must lie between 0 and 1, as in 0.1; got {error}")
        self.simulator, self.schedule, self.error = simulator, schedule or Schedule(), error
        self.knows_number, self.seed = knows_number, seed
        self.name = "quantum search, number known" if knows_number else "quantum search"

    def _above(self, rows: ScoreRows, tau: float) -> FoundKeys:
        rng, found, parts, certified = np.random.default_rng(self.seed), [], [], []
        for _, scores, allowed in rows.blocks():
            marks = (scores >= tau) & allowed
            registers = self.simulator.from_marks(marks, allowed)
            if self.knows_number:
                result = search_known(registers, seed=rng)
            else:
                result = search(registers, schedule=self.schedule, seed=rng)
            for index, marked in enumerate(marks):
                keys = result.row(index)
                if not registers.names_keys:
                    keys = np.array(name_places(keys, np.flatnonzero(marked)), dtype=np.int64)
                found.append(np.sort(keys))
            parts.append(result.counts)
            certified.append(result.missed == 0)
        return self._gather(found, parts, certified)

    def _largest(self, rows: ScoreRows, k: int) -> FoundKeys:
        rng, found, parts, certified = np.random.default_rng(self.seed), [], [], []
        for _, scores, allowed in rows.blocks():
            result = search_largest(
                scores,
                min(k, scores.shape[1]),
                allowed=allowed,
                simulator=self.simulator,
                error=self.error,
                schedule=self.schedule,
                seed=rng,
            )
            found += [keys[keys >= 0] for keys in result.keys]
            parts.append(result.counts)
            certified.append(result.certified)
        return self._gather(found, parts, certified)

    def _gather(self, found: list[np.ndarray], parts: list[QueryCounts], certified: list[np.ndarray]) -> FoundKeys:
        fields = ("iterations", "verifications", "samples", "calls_to_last")
        counts = QueryCounts(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
        return _gather(found, counts.calls, counts=counts, certified=np.concatenate(certified))


class BallTreeIndex(RowFinder):
    r"""scikit-learn's `BallTree` over the keys, as an index of half-spaces; exact.

    If rows are causal, one tree over all keys reports those of the future as well. So, as Bentley and Saxe make a
    static structure dynamic (Journal of Algorithms 1, 1980), the first :math:`n` keys are cut into blocks by the binary
    digits of :math:`n`, and each block has a tree: a row asks :math:`\log_2 n` trees at most and never pays for a key
    that is not its own, which keeps its cost near that of a scan at worst. A block is built once; all blocks together
    cost :math:`\log_2 n` times what one level of one tree does. What is left, fewer than `leaf_size`, is scanned.

    `one_tree` asks a single tree over all keys, and drops what belongs to the future before it is verified. For a
    threshold that is cheaper where the keys lie in clusters and the tree prunes well, and some twice a scan where it
    does not. For the largest it asks for twice as many until enough are not of the future, and is dear.

    A threshold finds exactly the keys of a scan. Of the largest, scores that differ by no more than rounding (some
    :math:`10^{-15}` of the largest possible) count as equal, and the tree may choose among equal ones in its own way.

    Args:
        leaf_size: points in a leaf of the tree, at least.
        one_tree: a single tree, for causal rows too.

    Raises:
        ImportError: if scikit-learn is not installed.
    """

    exact, needs_vectors = True, True

    def __init__(self, leaf_size: int = 16, one_tree: bool = False):
        if leaf_size < 1:
            raise ValueError(f"leaf_size must be at least 1, as in 16; got {leaf_size}")
        self.leaf_size, self.one_tree = leaf_size, one_tree
        self.name = "ball tree, one" if one_tree else "ball tree"
        self._ball_tree = _ball_tree()

    def _above(self, rows: ScoreRows, tau: float) -> FoundKeys:
        forest, found, cost = self._forest(rows), [], []
        for row, size in enumerate(rows.sizes.tolist()):
            keys, scores, price = [], [], 1  # 1 for the norm of the query
            for block in forest.blocks(size):
                some, paid = block.candidates(row, tau)
                some = some[some < size]
                keys.append(some)
                scores.append(rows.of(row, some))
                price += paid + len(some)
            keys, scores = np.concatenate(keys), np.concatenate(scores)
            found.append(np.sort(keys[scores >= tau]))
            cost.append(price)
        return _gather(found, np.array(cost), building=forest.building)

    def _largest(self, rows: ScoreRows, k: int) -> FoundKeys:
        forest, found, cost = self._forest(rows), [], []
        for row, size in enumerate(rows.sizes.tolist()):
            keys, scores, price = np.zeros(0, dtype=np.int64), np.zeros(0), 1
            for block in forest.blocks(size):
                # the largest block gives a first k; of the others only what beats the worst of these can matter
                if len(keys) < k:
                    some, paid = block.nearest(row, k, size)
                else:
                    some, paid = block.candidates(row, float(scores[-1]))
                keys, scores = np.concatenate((keys, some)), np.concatenate((scores, rows.of(row, some)))
                best = np.lexsort((keys, -scores))[:k]
                keys, scores = keys[best], scores[best]
                price += paid + len(some)
            found.append(keys)
            cost.append(price)
        return _gather(found, np.array(cost), building=forest.building)

    def _forest(self, rows: ScoreRows) -> "_Forest":
        return _Forest(self._ball_tree, rows, self.leaf_size, self.one_tree or not rows.causal)


@dataclass(frozen=True)
class _Block:
    """Consecutive keys, with a tree over them, or without if they are few."""

    rows: ScoreRows
    start: int
    stop: int
    tree: Any = None
    largest_norm: float = 0.0

    def candidates(self, row: int, tau: float) -> tuple[np.ndarray, int]:
        """Keys among which are all with a score of `tau` or more, and the distances that were evaluated."""
        aim = self._aim(row)
        if aim is None:
            return self._everything()
        query, factor = aim
        reach = (1 + AIM) * self.largest_norm
        # squared distances are wrong by a few roundings of the largest there can be, for each feature
        slack = 16 * (len(query) + 8) * np.finfo(np.float64).eps * reach * reach
        squared = query @ query + self.largest_norm**2 - 2 * factor * (tau / self.rows.scale) + slack
        if squared >= 2 * reach * reach:
            return self._everything()  # and no radius need be infinite
        if squared < 0:
            return np.zeros(0, dtype=np.int64), 0
        self.tree.reset_n_calls()
        (inside,) = self.tree.query_radius(query[None], r=math.sqrt(squared))
        return self.start + inside.astype(np.int64), self.tree.get_n_calls()

    def nearest(self, row: int, k: int, size: int) -> tuple[np.ndarray, int]:
        """Of the keys below `size` the `k` with the largest scores, and the distances that were evaluated."""
        aim = self._aim(row)
        if aim is None:
            some, paid = self._everything()
            return some[some < size], paid
        self.tree.reset_n_calls()
        asked, wanted = k, min(k, min(size, self.stop) - self.start)
        while True:
            asked = min(asked, self.stop - self.start)
            inside = self.start + self.tree.query(aim[0][None], k=asked, return_distance=False)[0].astype(np.int64)
            inside = inside[inside < size][:wanted]
            if len(inside) == wanted:
                return inside, self.tree.get_n_calls()
            asked *= 2  # too many of them were keys of the future

    def _everything(self) -> tuple[np.ndarray, int]:
        return np.arange(self.start, self.stop), 0

    def _aim(self, row: int) -> tuple[np.ndarray, float] | None:
        """The query among the lifted keys, and the factor it was lengthened by; `None` where a scan is as good.

        Its length is free, as only the half-space matters; a short one would be about as far from every key.
        """
        query = self.rows.queries[row]
        norm, (low, high) = math.sqrt(query @ query), SAFE_NORMS
        if self.tree is None or not (low < norm < high and low < self.largest_norm < high):
            return None
        factor = AIM * self.largest_norm / norm
        return np.append(factor * query, 0.0), factor


class _Forest:
    """The blocks that make up any number of first keys, the largest first, and what it cost to build them."""

    def __init__(self, ball_tree: type, rows: ScoreRows, leaf_size: int, one_tree: bool):
        self._ball_tree, self._rows, self._leaf_size, self._one_tree = ball_tree, rows, leaf_size, one_tree
        self._built: dict[tuple[int, int], _Block] = {}
        self._squares = np.einsum("kf,kf->k", rows.keys, rows.keys)
        self.building = len(self._squares)  # for the norms

    def blocks(self, size: int) -> list[_Block]:
        if self._one_tree:
            return [self._block(0, self._rows.num_keys)]
        start, blocks = 0, []
        while size - start > self._leaf_size:
            stop = start + (1 << (size - start).bit_length() - 1)
            blocks.append(self._block(start, stop))
            start = stop
        return blocks + ([_Block(self._rows, start, size)] if start < size else [])

    def _block(self, start: int, stop: int) -> _Block:
        if (start, stop) not in self._built:
            squares = self._squares[start:stop]
            largest = float(squares.max())
            lifted = np.column_stack((self._rows.keys[start:stop], np.sqrt(largest - squares)))
            tree = self._ball_tree(lifted, leaf_size=self._leaf_size)
            self.building += tree.get_n_calls()
            self._built[start, stop] = _Block(self._rows, start, stop, tree, math.sqrt(largest))
        return self._built[start, stop]


def _ball_tree() -> type:
    try:
        from sklearn.neighbors import BallTree
    except ImportError:
        raise ImportError(
            f"the index needs scikit-learn; install it with: {install('index')}", name="sklearn"
        ) from None
    return BallTree


def _array(values: np.ndarray | Tensor) -> Float[np.ndarray, "rows columns"]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.ascontiguousarray(values, dtype=np.float64)


def _split(marks: Bool[np.ndarray, "rows keys"]) -> list[np.ndarray]:
    """The marked keys of each row."""
    rows, keys = np.nonzero(marks)
    return np.split(keys, np.searchsorted(rows, np.arange(1, len(marks))))


def _gather(found: list[np.ndarray], cost: Int[np.ndarray, " rows"], **more: Any) -> FoundKeys:
    offsets = np.concatenate(([0], np.cumsum([len(keys) for keys in found])))
    return FoundKeys(np.concatenate(found).astype(np.int64), offsets, cost, **more)


#: The finders by name, each with its default options.
FINDERS: dict[str, type[RowFinder]] = {"quantum": QuantumFinder, "scan": FullScan, "index": BallTreeIndex}
