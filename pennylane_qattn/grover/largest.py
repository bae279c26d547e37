r"""Quantum search for the largest scores of a row, without a threshold, simulated and counted.

Durr and Hoyer (quant-ph/9607014) find the minimum; for several, Durr, Heiligman, Hoyer and Mhalla (quant-ph/0401091).
Unit and simulators are those of `search.py`.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from pennylane_qattn.grover.expectation import remaining_calls
from pennylane_qattn.grover.registers import Counting, Registers, Subspace, allowed_keys, check_counts
from pennylane_qattn.grover.search import Log, QueryCounts, Schedule, Seed


@dataclass(frozen=True)
class LargestResult:
    """The largest scores of each row, as far as the search got.

    Attributes:
        keys: best first; -1 where a row has fewer keys than were asked for.
        counts: of each row.
        error: a bound on the probability that a row's keys are not the largest; it holds for each row by itself.
        certified: whether they are, by comparison with the truth; known to the simulation only, and nothing is mended.
    """

    keys: Int[np.ndarray, "rows k"]
    counts: QueryCounts
    error: float
    certified: Bool[np.ndarray, " rows"]


@dataclass(frozen=True)
class Extremes:
    """The smallest and the largest score of each row's background, and what it cost to find them.

    Attributes:
        low, high: NaN where a row has no background.
        counts: of each row, both searches together; `calls_to_last` is what each took to its last change, added up.
        error: a bound on the probability that one of the two is wrong; it holds for each row by itself.
        certified: whether both are right; known to the simulation only.
    """

    low: Float[np.ndarray, " rows"]
    high: Float[np.ndarray, " rows"]
    counts: QueryCounts
    error: float
    certified: Bool[np.ndarray, " rows"]

    @property
    def midrange(self) -> Float[np.ndarray, " rows"]:
        """Half way between them: the shift under which the background is flattest."""
        return (self.low + self.high) / 2


def search_largest(
    scores: Float[np.ndarray, "rows keys"],
    k: int,
    *,
    allowed: Bool[np.ndarray, "rows keys"] | None = None,
    simulator: type[Registers] = Subspace,
    error: float = 0.1,
    schedule: Schedule | None = None,
    seed: Seed = 0,
) -> LargestResult:
    r"""The `k` largest scores of each row, equal ones by the lower key, with bounded error and without a threshold.

    It starts with `k` keys drawn at random and read. Marked is every key that beats the worst of those kept; BBHT finds
    one, which takes the place of the worst, and so on. What was drawn is at every moment a uniform subset of the
    keys down to its worst, so the chain of worst ranks passes rank :math:`r` with probability :math:`k/r`, whatever
    the scores are, and with :math:`E(n, t)` of `expected_calls` the mean number of calls until the last key is

    .. math::  \mu = \sum_{t=1}^{n-k} \frac{k}{t + k} E(n, t) = O(\sqrt{k n}).

    It cannot know when that is. With :math:`\mu'`, little above :math:`\mu`, the mean of what remains from the worst
    rank it can be at, it fails in :math:`2\mu'` calls with probability 1/2 at most (Markov), from wherever it starts,
    and in :math:`w` such windows with probability :math:`2^{-w}` at most. Durr and Hoyer give the minimum
    :math:`22.5\sqrt n + 1.4 \log_2^2 n` calls for one window, by estimates where this has the sum.

    Args:
        scores: of every key; those of keys that are not allowed are not read.
        k: how many. A row that may see fewer keys gives them all.
        allowed: keys that each row may see; all of them if not told.
        simulator: `StateVector`, `Subspace` or `Counting`.
        error: the bound on the probability of a wrong result, for each row; of it follow the windows.
        schedule: growth and cap of the searches; its `failures` is not used.
        seed: of everything that is drawn.
    """
    allowed = allowed_keys(scores, allowed)
    check_scores(scores, allowed)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be between 1 and the number of keys, {scores.shape[1]}; got {k}")
    num_keys = allowed.sum(1)
    # The simulation numbers keys by rank. What is measured and what it costs does not depend on the names of keys.
    order = np.argsort(np.where(allowed, -scores, np.inf), axis=1, kind="stable")
    ranks, counts, certified = _climb(simulator, num_keys, num_keys, k, error, schedule or Schedule(), seed)
    keys = np.take_along_axis(order, np.where(ranks < 0, 0, ranks), axis=1)
    return LargestResult(np.where(ranks < 0, -1, keys), counts, error, certified)


def count_largest(
    num_keys: Int[np.ndarray, " rows"],
    k: int,
    *,
    error: float = 0.1,
    schedule: Schedule | None = None,
    seed: Seed = 0,
) -> tuple[QueryCounts, Bool[np.ndarray, " rows"]]:
    """What `search_largest` costs for so many keys, and whether it would be right: its law does not depend on scores.

    No scores are held and nothing is sorted, so `num_keys` may be large. By `Counting`.
    """
    check_counts(num_keys, num_keys)
    if not 1 <= k <= num_keys.max(initial=0):
        raise ValueError(f"k must be between 1 and the number of keys, {num_keys.max(initial=0)}; got {k}")
    _, counts, certified = _climb(Counting, num_keys, num_keys, k, error, schedule or Schedule(), seed)
    return counts, certified


def search_extremes(
    scores: Float[np.ndarray, "rows keys"],
    found: Bool[np.ndarray, "rows keys"],
    *,
    allowed: Bool[np.ndarray, "rows keys"] | None = None,
    simulator: type[Registers] = Subspace,
    error: float = 0.1,
    schedule: Schedule | None = None,
    seed: Seed = 0,
) -> Extremes:
    """The smallest and the largest score of each row's background, the keys that were not found, and their cost.

    Two searches as in `search_largest` with `k` = 1, each with half the error. The register stays uniform over all keys
    that the row may see, and the oracle leaves out those on the list of found ones; the first key is drawn from the
    rest.

    Args:
        scores: of every key.
        found: the keys that are not background.
        allowed: keys that each row may see; all of them if not told.
        simulator: `StateVector`, `Subspace` or `Counting`.
        error: the bound on the probability that either is wrong, for each row.
        schedule: growth and cap of the searches.
        seed: of everything that is drawn.
    """
    allowed = allowed_keys(scores, allowed)
    check_scores(scores, allowed)
    check_error(error)
    rng, background = np.random.default_rng(seed), allowed & ~found
    ends, counts, certified = [], [], np.ones(len(scores), dtype=bool)
    for sign in (-1.0, 1.0):
        ordered = -np.sort(np.where(background, -sign * scores, np.inf), axis=1)
        ranks, cost, right = _climb(
            simulator, allowed.sum(1), background.sum(1), 1, error / 2, schedule or Schedule(), rng
        )
        best = np.take_along_axis(ordered, np.maximum(ranks, 0), axis=1)[:, 0]
        ends.append(np.where(ranks[:, 0] < 0, np.nan, sign * best))
        counts.append(cost)
        certified &= right
    fields = ("iterations", "verifications", "samples", "calls_to_last")
    both = QueryCounts(*(getattr(counts[0], name) + getattr(counts[1], name) for name in fields))
    low, high = ends
    return Extremes(low, high, both, error, certified)


def _climb(
    simulator: type[Registers],
    num_keys: Int[np.ndarray, " rows"],
    num_candidates: Int[np.ndarray, " rows"],
    k: int,
    error: float,
    schedule: Schedule,
    seed: Seed,
) -> tuple[Int[np.ndarray, "rows k"], QueryCounts, Bool[np.ndarray, " rows"]]:
    """The search for the best `k` of candidates that are numbered by rank, 0 the best, among `num_keys` keys."""
    check_error(error)
    rng, windows = np.random.default_rng(seed), math.ceil(-math.log2(error))
    kept_size = np.minimum(k, num_candidates)
    kept = _random_subsets(num_candidates, kept_size, k, rng)  # sorted; behind the end is _NONE
    worst = np.where(kept_size > 0, np.take_along_axis(kept, np.maximum(kept_size - 1, 0)[:, None], axis=1)[:, 0], -1)
    registers = simulator.from_counts(num_keys, np.maximum(worst + 1, 0))
    for column in range(k):
        rows = np.flatnonzero(column < kept_size)
        # from the worst on, so that the places of the others stay what they are
        registers.unmark(rows, kept[rows, kept_size[rows] - 1 - column])
    sizes = zip(num_keys.tolist(), num_candidates.tolist(), kept_size.tolist(), strict=True)
    limit = 2 * np.array([remaining_calls(n, of, size, schedule)[1] if size else 0.0 for n, of, size in sizes])
    caps = schedule.caps(num_keys)
    ceiling, spent, window = np.ones(len(caps)), np.zeros(len(caps)), np.zeros(len(caps), dtype=np.int64)
    log = Log(len(caps), reads=kept_size)
    rows = np.flatnonzero(kept_size < num_candidates)
    while rows.size:
        iterations = rng.integers(np.ceil(ceiling[rows]).astype(np.int64))
        # a sample that would overrun its window is not begun; the next window starts like a new search
        fits = spent[rows] + iterations + 1 <= limit[rows]
        late = rows[~fits]
        window[late] += 1
        spent[late], ceiling[late] = 0, 1
        tried, iterations = rows[fits], iterations[fits]
        spent[tried] += iterations + 1
        hit = log.sample(registers, tried, iterations, rng)
        ceiling[tried] = np.where(hit, 1.0, np.minimum(ceiling[tried] * schedule.growth, caps[tried]))
        better, found = tried[hit], log.last_keys
        if not registers.names_keys:
            found = _rank_of_place(found, kept[better])
        last = kept_size[better] - 1
        kept[better, last] = found
        kept[better] = np.sort(kept[better], axis=1)
        registers.keep_first(better, kept[better, last] - last)
        rows = rows[window[rows] < windows]
    counts = log.result(registers).counts
    ranks = np.where(kept == _NONE, -1, kept)
    return ranks, counts, np.all((ranks == np.arange(k)) | (ranks < 0), axis=1)


#: Larger than any rank.
_NONE = np.iinfo(np.int64).max


def _random_subsets(
    size: Int[np.ndarray, " rows"], count: Int[np.ndarray, " rows"], width: int, rng: np.random.Generator
) -> Int[np.ndarray, "rows width"]:
    """A uniform subset of `count` of the integers below `size`, for each row, sorted, filled up with `_NONE`.

    Floyd's method (Bentley, Communications of the ACM 30, 1987): no row is ever written out.
    """
    chosen = np.full((len(size), width), _NONE)
    for column in range(width):
        rows = np.flatnonzero(column < count)
        top = size[rows] - count[rows] + column
        drawn = rng.integers(top + 1)
        taken = (chosen[rows] == drawn[:, None]).any(1)
        chosen[rows, column] = np.where(taken, top, drawn)
    return np.sort(chosen, axis=1)


def _rank_of_place(place: Int[np.ndarray, " rows"], kept: Int[np.ndarray, "rows k"]) -> Int[np.ndarray, " rows"]:
    """The rank of the marked key at that place, when every rank is marked but those kept (sorted)."""
    rank = place.copy()
    for column in kept.T:
        rank += column <= rank
    return rank


def check_scores(scores: Float[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"]) -> None:
    if not np.isfinite(scores[allowed]).all():
        raise ValueError("scores of allowed keys must be finite; mask the others with `allowed`, not with infinities")


def check_error(error: float) -> None:
    if not 0 < error < 1:
        raise ValueError(f"error must lie between 0 and 1, as in 0.1; got {error}")
