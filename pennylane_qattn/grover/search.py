r"""Quantum search over the keys of a row, simulated, and every query of it counted.

A row may see :math:`n` keys, of which :math:`m` are marked, :math:`x_j \geq \tau`. The register is prepared uniform
over those :math:`n` keys alone, whether or not :math:`n` is a power of two; :math:`R` times the marked keys change
sign and the state is reflected about the uniform one; then the register is measured. With :math:`\sin^2\theta = m/n`
it shows a marked key with probability :math:`\sin^2((2R + 1)\theta)` (Boyer, Brassard, Hoyer, Tapp,
quant-ph/9605034).

Three simulators do this for many rows at a time, behind one interface, `Registers`:

- `StateVector`: all :math:`n` amplitudes, iteration by iteration; for small :math:`n`.
- `Subspace`: the state never leaves the plane spanned by the marked and by the unmarked keys, so two numbers are the
  whole state; exact for any :math:`n`.
- `Counting`: no keys at all, only :math:`n` and :math:`m`. What is drawn is how many of the marked keys are left and
  what was paid, by the law of the other two; a key is known by its place among the marked ones alone. Two integers a
  row, so that thousands of searches of :math:`2^{20}` keys fit.

On them run the search for an unknown number of marked keys (BBHT, the same paper), the search for a known number, and
the search for the largest scores without a threshold (Durr, Hoyer, quant-ph/9607014; for several, Durr, Heiligman,
Hoyer, Mhalla, quant-ph/0401091).

**The unit.** One oracle call is one coherent inner product of a query with the keys in superposition; reading the score
of one key, to verify it, is one inner product as well. Both count 1, as does one inner product of a classical scan.
Computing the score, comparing and uncomputing would be two coherent inner products in gates: counting one favours the
quantum side. Preparing the uniform state, the reflection, loading the keys (QRAM) and the cost of error correction
are not counted. A simulator knows which keys are marked, because it was told; the searches never look at that, but
where a docstring says so, and only report it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from pennylane_qattn.grover.amplification import grover_iterations

#: What a seed may be. A generator is used as it is and moves on; an integer gives the same draws each time.
Seed = int | np.random.Generator

#: More keys than that are refused by the state vector.
STATE_VECTOR_KEYS = 4096


@dataclass(frozen=True)
class Schedule:
    r"""How a search for an unknown number of marked keys chooses its iterations, and when it gives up.

    The number of iterations is drawn uniformly from the integers below a ceiling, which starts at 1, grows by a factor
    at each failure, stays at a cap, and starts at 1 again after each key found.

    Args:
        growth: that factor, above 1. Below 4/3 the mean is known to be of order :math:`\sqrt{n/m}`.
        cap: the largest ceiling, in units of :math:`\sqrt n` (and never below 1).
        failures: so many failures in a row at the cap, and the search stops.
    """

    growth: float = 6 / 5
    cap: float = 1.0
    failures: int = 16

    def __post_init__(self):
        if not 1 < self.growth < math.inf:
            raise ValueError(f"growth must be above 1 and finite, as in 6/5; got {self.growth}")
        if not 0 < self.cap < math.inf:
            raise ValueError(f"cap must be positive and finite, in units of sqrt(n); got {self.cap}")
        if self.failures < 1:
            raise ValueError(f"failures must be at least 1, as in 16; got {self.failures}")

    def caps(self, num_keys: Int[np.ndarray, "*rows"]) -> Float[np.ndarray, "*rows"]:
        """The largest ceiling of each row."""
        return np.maximum(self.cap * np.sqrt(num_keys), 1.0)


@dataclass(frozen=True)
class QueryCounts:
    """What each row cost, in inner products of the length of a key (the unit is discussed in this module's docstring).

    Attributes:
        iterations: oracle calls, one for each Grover iteration.
        verifications: scores read of single keys: one for each sample, and the first keys of a search for the largest.
        samples: preparations of the register that were measured.
        calls_to_last: all calls up to the last key that was found; the rest was spent on learning that none is left.
    """

    iterations: Int[np.ndarray, " rows"]
    verifications: Int[np.ndarray, " rows"]
    samples: Int[np.ndarray, " rows"]
    calls_to_last: Int[np.ndarray, " rows"]

    @property
    def calls(self) -> Int[np.ndarray, " rows"]:
        """Everything: iterations and verifications."""
        return self.iterations + self.verifications


@dataclass(frozen=True)
class SearchResult:
    """The keys that a search reports, all verified, and what it cost.

    Attributes:
        keys: of all rows, one row after the other, each in the order of finding. Of `Counting`, a number is the place
            of the key among the marked ones that were left when it was found.
        offsets: row `i` has `keys[offsets[i]:offsets[i + 1]]`.
        counts: of each row.
        missed: marked keys not found, of each row; known to the simulation only.
    """

    keys: Int[np.ndarray, " found"]
    offsets: Int[np.ndarray, " bounds"]
    counts: QueryCounts
    missed: Int[np.ndarray, " rows"]

    def row(self, index: int) -> Int[np.ndarray, " row"]:
        """The keys of one row, in the order of finding."""
        return self.keys[self.offsets[index] : self.offsets[index + 1]]


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


# ---------------------------------------------------------------------------------------------------------------------
# States and simulators


def success_probability(
    num_keys: Int[np.ndarray, "*rows"], num_marked: Int[np.ndarray, "*rows"], iterations: Int[np.ndarray, "*rows"]
) -> Float[np.ndarray, "*rows"]:
    r""":math:`\sin^2((2R + 1)\theta)`, :math:`\sin^2\theta = m/n`: how often a marked key is measured."""
    _check_counts(num_keys, num_marked)
    _check_iterations(iterations)
    return np.sin((2 * iterations + 1) * _angle(num_keys, num_marked)) ** 2


def grover_state(
    marks: Bool[np.ndarray, "rows keys"],
    iterations: Int[np.ndarray, " rows"],
    allowed: Bool[np.ndarray, "rows keys"] | None = None,
) -> Float[np.ndarray, "rows keys"]:
    r"""The amplitudes after so many iterations, each carried out: signs, then the reflection about the uniform state.

    They are real. Keys that are not allowed keep the amplitude 0, and whether they are marked does not matter.
    """
    _check_iterations(iterations)
    allowed = _allowed(marks, allowed)
    num_keys = allowed.sum(1)
    uniform = allowed / np.sqrt(num_keys)[:, None]
    state, signs = uniform.copy(), np.where(marks, -1.0, 1.0)
    for step in range(iterations.max(initial=0)):
        going = np.flatnonzero(iterations > step)
        flipped = signs[going] * state[going]
        along = (uniform[going] * flipped).sum(1, keepdims=True)
        state[going] = 2 * along * uniform[going] - flipped
    return state


class Registers(ABC):
    """One register of keys for each row, which can be prepared, iterated and measured; and which keys are marked.

    Attributes:
        name: of the simulator.
        names_keys: whether what is measured is a key. If not, it is the place of a marked key among the marked ones.
        num_keys: keys that a row may see.
        num_marked: those that are marked now. A search may not look; the simulation must.
    """

    name: str
    names_keys: bool
    num_keys: Int[np.ndarray, " rows"]
    num_marked: Int[np.ndarray, " rows"]

    @classmethod
    @abstractmethod
    def from_marks(
        cls, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None
    ) -> "Registers":
        """Rows with these keys marked; each may see its allowed keys, all of them if not told."""

    @classmethod
    @abstractmethod
    def from_counts(cls, num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]) -> "Registers":
        """Rows with so many keys, of which the first so many are marked."""

    @abstractmethod
    def measure(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"], rng: np.random.Generator
    ) -> Int[np.ndarray, " some"]:
        """Prepares, iterates and measures the registers of these rows, all different; what is found is one key each."""

    @abstractmethod
    def is_marked(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """The verification of a key: its score is read and compared."""

    @abstractmethod
    def unmark(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> None:
        """From now on these marked keys count as not marked."""

    @abstractmethod
    def keep_first(self, rows: Int[np.ndarray, " some"], left: Int[np.ndarray, " some"]) -> None:
        """From now on only so many of the marked keys are, the first ones: a threshold has risen over sorted keys."""

    @abstractmethod
    def success_probability(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        """How often a marked key would be measured."""


class _NamedKeys(Registers):
    """Registers that hold a mark for every key."""

    names_keys = True

    def __init__(self, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None):
        self.allowed = _allowed(marks, allowed)
        self.marks = marks & self.allowed
        self.num_keys = self.allowed.sum(1)
        self.num_marked = self.marks.sum(1)

    @classmethod
    def from_marks(
        cls, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None
    ) -> "Registers":
        return cls(marks, allowed)

    @classmethod
    def from_counts(cls, num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]) -> "Registers":
        _check_counts(num_keys, num_marked)
        place = np.arange(num_keys.max(initial=0))
        return cls(place < num_marked[:, None], place < num_keys[:, None])

    def is_marked(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        return self.marks[rows, keys]

    def unmark(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> None:
        self.num_marked[rows] -= self.marks[rows, keys]
        self.marks[rows, keys] = False

    def keep_first(self, rows: Int[np.ndarray, " some"], left: Int[np.ndarray, " some"]) -> None:
        self.marks[rows] &= self.marks[rows].cumsum(1) <= left[:, None]
        self.num_marked[rows] = self.marks[rows].sum(1)


class StateVector(_NamedKeys):
    """Every amplitude, and every iteration carried out; time of order n times the iterations."""

    name = "state-vector"

    def __init__(self, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None):
        if marks.shape[1] > STATE_VECTOR_KEYS:
            raise ValueError(
                f"a state vector takes at most {STATE_VECTOR_KEYS} keys; got {marks.shape[1]}: use Subspace, also exact"
            )
        super().__init__(marks, allowed)

    def measure(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"], rng: np.random.Generator
    ) -> Int[np.ndarray, " some"]:
        cumulative = self._probabilities(rows, iterations).cumsum(1)
        drawn = rng.random(len(rows)) * cumulative[:, -1]
        return (cumulative > drawn[:, None]).argmax(1)

    def success_probability(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        return (self._probabilities(rows, iterations) * self.marks[rows]).sum(1)

    def _probabilities(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, "some keys"]:
        return grover_state(self.marks[rows], iterations, self.allowed[rows]) ** 2


class Subspace(_NamedKeys):
    """The exact plane of marked and unmarked keys: whether a marked key is found is drawn, then which of its kind."""

    name = "subspace"

    def measure(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"], rng: np.random.Generator
    ) -> Int[np.ndarray, " some"]:
        hit = rng.random(len(rows)) < self.success_probability(rows, iterations)
        kind = self.marks[rows] == hit[:, None]
        kind &= self.allowed[rows]
        cumulative = kind.cumsum(1)
        place = (rng.random(len(rows)) * cumulative[:, -1]).astype(np.int64)
        return (cumulative > place[:, None]).argmax(1)

    def success_probability(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        return _sure(self.num_keys[rows], self.num_marked[rows], iterations)


class Counting(Registers):
    """Two integers a row and no keys.

    A marked key that is measured is given by its place among the marked keys left, uniform below `num_marked`; one that
    is not marked by `num_keys`, a place that no marked key has. Marked keys are alike to the oracle, so the calls
    and the places have the law of the other simulators, and whoever has a list of marked keys can name them.
    """

    name = "counting"
    names_keys = False

    def __init__(self, num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]):
        _check_counts(num_keys, num_marked)
        self.num_keys, self.num_marked = num_keys.astype(np.int64), num_marked.astype(np.int64)

    @classmethod
    def from_marks(
        cls, marks: Bool[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None = None
    ) -> "Registers":
        allowed = _allowed(marks, allowed)
        return cls(allowed.sum(1), (marks & allowed).sum(1))

    @classmethod
    def from_counts(cls, num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]) -> "Registers":
        return cls(num_keys, num_marked)

    def measure(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"], rng: np.random.Generator
    ) -> Int[np.ndarray, " some"]:
        hit = rng.random(len(rows)) < self.success_probability(rows, iterations)
        place = (rng.random(len(rows)) * self.num_marked[rows]).astype(np.int64)
        return np.where(hit, place, self.num_keys[rows])

    def is_marked(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        return keys < self.num_marked[rows]

    def unmark(self, rows: Int[np.ndarray, " some"], keys: Int[np.ndarray, " some"]) -> None:
        self.num_marked[rows] -= keys < self.num_marked[rows]

    def keep_first(self, rows: Int[np.ndarray, " some"], left: Int[np.ndarray, " some"]) -> None:
        self.num_marked[rows] = np.minimum(self.num_marked[rows], left)

    def success_probability(
        self, rows: Int[np.ndarray, " some"], iterations: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        return _sure(self.num_keys[rows], self.num_marked[rows], iterations)


#: The simulators by name.
SIMULATORS: dict[str, type[Registers]] = {kind.name: kind for kind in (StateVector, Subspace, Counting)}


# ---------------------------------------------------------------------------------------------------------------------
# Searches with a threshold


def search(registers: Registers, *, schedule: Schedule | None = None, seed: Seed = 0) -> SearchResult:
    """Finds marked keys, not knowing how many there are (BBHT), until `schedule.failures` samples at the cap failed.

    Each sample is verified. A key found is unmarked and the ceiling starts again at 1, as for a new search. A row of
    which every key was found is done as well. That marked keys remain when the search stops has the probability that
    `expected_search` gives.

    Args:
        registers: the rows; what is found is no longer marked in them afterwards.
        schedule: of the iterations; the default is growth 6/5, cap sqrt(n), 16 failures.
        seed: of everything that is drawn.
    """
    schedule, rng = schedule or Schedule(), np.random.default_rng(seed)
    caps = schedule.caps(registers.num_keys)
    ceiling, failed = np.ones(len(caps)), np.zeros(len(caps), dtype=np.int64)
    log = _Log(len(caps))
    rows = np.arange(len(caps))
    while rows.size:
        iterations = rng.integers(np.ceil(ceiling[rows]).astype(np.int64))
        hit = log.sample(registers, rows, iterations, rng)
        failed[rows] = np.where(hit, 0, failed[rows] + (ceiling[rows] >= caps[rows]))
        ceiling[rows] = np.where(hit, 1.0, np.minimum(ceiling[rows] * schedule.growth, caps[rows]))
        rows = rows[(failed[rows] < schedule.failures) & (log.found[rows] < registers.num_keys[rows])]
    return log.result(registers)


def search_known(registers: Registers, *, seed: Seed = 0) -> SearchResult:
    r"""Finds all marked keys, knowing how many there are, with :math:`\pi/4\,\sqrt{n/m}` iterations a sample.

    The iterations are `grover_iterations` of the marked keys that are left, so each sample finds one with probability
    1/2 at least. Each is verified, and the search ends with the last: it misses nothing.

    Args:
        registers: the rows, of which `num_marked` is read; nothing is marked in them afterwards.
        seed: of everything that is drawn.
    """
    rng = np.random.default_rng(seed)
    log = _Log(len(registers.num_keys))
    rows = np.flatnonzero(registers.num_marked > 0)
    while rows.size:
        log.sample(registers, rows, best_iterations(registers.num_keys[rows], registers.num_marked[rows]), rng)
        rows = rows[registers.num_marked[rows] > 0]
    return log.result(registers)


def best_iterations(
    num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """`grover_iterations` of whole numbers."""
    _check_counts(num_keys, num_marked)
    marked, keys = (torch.from_numpy(x.astype(np.float64)) for x in (num_marked, num_keys))
    return grover_iterations(marked, keys).numpy()


def name_places(places: Sequence | np.ndarray, marked: Sequence | np.ndarray) -> list[int]:
    """The keys behind the places that `Counting` reports for a row, given the row's marked keys in order."""
    left = list(marked)
    return [int(left.pop(place)) for place in places]


# ---------------------------------------------------------------------------------------------------------------------
# The largest scores, without a threshold


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
    allowed = _allowed(scores, allowed)
    _check_scores(scores, allowed)
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
    _check_counts(num_keys, num_keys)
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
    allowed = _allowed(scores, allowed)
    _check_scores(scores, allowed)
    _check_error(error)
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
    return Extremes(*ends, both, error, certified)


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
    _check_error(error)
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
    limit = 2 * np.array([_remaining(n, of, size, schedule)[1] if size else 0.0 for n, of, size in sizes])
    caps = schedule.caps(num_keys)
    ceiling, spent, window = np.ones(len(caps)), np.zeros(len(caps)), np.zeros(len(caps), dtype=np.int64)
    log = _Log(len(caps), reads=kept_size)
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


class _Log:
    """What was found and spent so far, by row."""

    def __init__(self, rows: int, reads: Int[np.ndarray, " rows"] | None = None):
        self.iterations, self.samples, self.found = (np.zeros(rows, dtype=np.int64) for _ in range(3))
        self.reads = np.zeros(rows, dtype=np.int64) if reads is None else reads.astype(np.int64)
        self.calls_to_last = self.reads.copy()
        self.last_keys = np.zeros(0, dtype=np.int64)
        self._rows, self._keys = [], []

    def sample(
        self,
        registers: Registers,
        rows: Int[np.ndarray, " some"],
        iterations: Int[np.ndarray, " some"],
        rng: np.random.Generator,
    ) -> Bool[np.ndarray, " some"]:
        """One sample of each row, verified and paid for; where it is marked the key is noted and unmarked."""
        keys = registers.measure(rows, iterations, rng)
        hit = registers.is_marked(rows, keys)
        self.iterations[rows] += iterations
        self.samples[rows] += 1
        lucky, self.last_keys = rows[hit], keys[hit]
        registers.unmark(lucky, self.last_keys)
        self.found[lucky] += 1
        self.calls_to_last[lucky] = self.iterations[lucky] + self.samples[lucky] + self.reads[lucky]
        self._rows.append(lucky)
        self._keys.append(self.last_keys)
        return hit

    def result(self, registers: Registers) -> SearchResult:
        rows, keys = (np.concatenate(x or [np.zeros(0, dtype=np.int64)]) for x in (self._rows, self._keys))
        keys = keys[np.argsort(rows, kind="stable")]
        offsets = np.concatenate(([0], np.cumsum(self.found)))
        counts = QueryCounts(self.iterations, self.samples + self.reads, self.samples, self.calls_to_last)
        return SearchResult(keys, offsets, counts, registers.num_marked.copy())


# ---------------------------------------------------------------------------------------------------------------------
# What to expect, without drawing anything


@dataclass(frozen=True)
class ExpectedSearch:
    """Means of `search`, over what it draws.

    Attributes:
        calls: iterations and verifications, those after the last key included.
        missing: the probability that marked keys remain when it stops.
    """

    calls: float
    missing: float


def expected_calls(
    num_keys: Int[np.ndarray, "*rows"], num_marked: Int[np.ndarray, "*rows"], schedule: Schedule | None = None
) -> Float[np.ndarray, "*rows"]:
    r"""The mean number of calls, verifications included, until BBHT finds one marked key, if it never gives up.

    Exact: with :math:`c` values to draw the iterations from, a sample succeeds with probability
    :math:`\tfrac12 - \sin(4c\theta)/(4c\sin 2\theta)` (Boyer and others, lemma 2) and costs :math:`(c + 1)/2`.
    Infinite where nothing is marked.
    """
    return _one_key(num_keys, num_marked, schedule or Schedule(), math.inf)[0]


def expected_search(num_keys: int, num_marked: int, schedule: Schedule | None = None) -> ExpectedSearch:
    """The exact means of `search` for a row with so many keys, so many of them marked."""
    schedule = schedule or Schedule()
    # a search that has found every key stops without looking for another
    left = np.arange(num_marked, -1 if num_marked < num_keys else 0, -1)
    calls, stops = _one_key(np.full_like(left, num_keys), left, schedule, schedule.failures)
    reached = np.concatenate(([1.0], np.cumprod(1 - stops)))[: len(left)]
    return ExpectedSearch(float(reached @ calls), float(1 - np.prod(1 - stops[left > 0])))


def expected_largest(
    num_keys: int, k: int, schedule: Schedule | None = None, num_candidates: int | None = None
) -> float:
    """The mean number of calls until `search_largest` has the `k` largest, after the first `k` were read.

    Args:
        num_keys: over which the register is uniform.
        k: how many are wanted.
        schedule: growth and cap.
        num_candidates: keys among which they are wanted; all of them if not told.
    """
    num_candidates = num_keys if num_candidates is None else num_candidates
    if not 1 <= k <= num_candidates <= num_keys:
        raise ValueError(f"k must be between 1 and the number of keys, {num_candidates} of {num_keys}; got {k}")
    return _remaining(num_keys, num_candidates, k, schedule or Schedule())[0]


@lru_cache(maxsize=65536)
def _remaining(num_keys: int, num_candidates: int, k: int, schedule: Schedule) -> tuple[float, float]:
    """The mean calls of a search for the largest: from a random start, and from the worst place it can be at."""
    left = np.arange(1, num_candidates - k + 1)
    if not len(left):
        return 0.0, 0.0
    each, passed = expected_calls(np.full_like(left, num_keys), left, schedule), k / (left + k)
    below = np.cumsum(passed * each)
    return float(below[-1]), float((each + below - passed * each).max())


def _one_key(
    num_keys: Int[np.ndarray, "*rows"], num_marked: Int[np.ndarray, "*rows"], schedule: Schedule, failures: int | float
) -> tuple[Float[np.ndarray, "*rows"], Float[np.ndarray, "*rows"]]:
    """Of a BBHT search for one key: its mean calls, and how often it ends in so many failures at the cap."""
    _check_counts(num_keys, num_marked)
    theta, caps = _angle(num_keys, num_marked), schedule.caps(num_keys)
    ceiling, going = np.ones_like(theta), np.ones_like(theta)
    calls, stops = np.zeros_like(theta), np.zeros_like(theta)
    while going.any():
        choices = np.ceil(ceiling)
        hits, price = _mean_success(theta, choices), (choices + 1) / 2
        last = ceiling >= caps
        with np.errstate(divide="ignore", invalid="ignore"):
            all_fail = (1 - hits) ** failures
            tries = np.where(hits > 0, (1 - all_fail) / hits, failures)
        calls += going * price * np.where(last & (going > 0), tries, 1.0)
        stops += np.where(last, going * all_fail, 0.0)
        going = np.where(last, 0.0, going * (1 - hits))
        ceiling = np.minimum(ceiling * schedule.growth, caps)
    return calls, stops


def _mean_success(theta: Float[np.ndarray, "*rows"], choices: Float[np.ndarray, "*rows"]) -> Float[np.ndarray, "*rows"]:
    r"""The mean of :math:`\sin^2((2j + 1)\theta)` over the integers :math:`0 \leq j <` `choices`."""
    double = np.sin(2 * theta)
    edge = double < 1e-12  # nothing or everything is marked, and j does not matter
    safe = np.where(edge, 1.0, double)
    mean = 0.5 - np.sin(4 * choices * theta) / (4 * choices * safe)
    return np.where(edge, np.round(np.sin(theta) ** 2), mean)


# ---------------------------------------------------------------------------------------------------------------------
# Scaling


@dataclass(frozen=True)
class ScalingFit:
    r"""Of a table of counts: the exponents of :math:`c\, n^a k^b`, and the constant of the law that theory gives.

    Attributes:
        exponent_n, error_n: and its standard error; NaN where the table has one n only.
        exponent_k, error_k: the same for k.
        constant: the mean of calls over :math:`\sqrt n \sum_{t \leq k} t^{-1/2}`.
        constant_low, constant_high: the smallest and the largest of these ratios.
    """

    exponent_n: float
    error_n: float
    exponent_k: float
    error_k: float
    constant: float
    constant_low: float
    constant_high: float


def fit_scaling(
    num_keys: Sequence | np.ndarray, num_marked: Sequence | np.ndarray, calls: Sequence | np.ndarray
) -> ScalingFit:
    """Least squares of the logarithms, one entry for each n and k, each with its (mean) number of calls.

    Standard errors are those of ordinary least squares; they say how far the table is from a power law, not how noisy
    the counts were. With no more entries than parameters they are NaN.
    """
    n, k, y = (np.asarray(x, dtype=np.float64) for x in (num_keys, num_marked, calls))
    if n.ndim != 1 or not n.shape == k.shape == y.shape or not len(n):
        raise ValueError(f"n, k and calls must be lists of one length, at least 1; got {n.shape}, {k.shape}, {y.shape}")
    if not (np.isfinite(y).all() and y.min() > 0 and n.min() >= 1 and k.min() >= 1):
        raise ValueError("n and k must be at least 1 and calls positive and finite; leave other entries out")
    columns = {"one": np.ones_like(n), "n": np.log(n), "k": np.log(k)}
    used = [name for name, column in columns.items() if name == "one" or np.ptp(column) > 0]
    design = np.stack([columns[name] for name in used], axis=1)
    if np.linalg.matrix_rank(design) < len(used):
        raise ValueError("n and k vary together in this table, so their exponents cannot be told apart; add entries")
    solution, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    freedom = len(n) - len(used)
    variance = np.square(np.log(y) - design @ solution).sum() / freedom if freedom > 0 else math.nan
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    fitted = {name: (float(x), float(e)) for name, x, e in zip(used, solution, errors, strict=True)}
    ratios = y / (np.sqrt(n) * np.array([(np.arange(1, int(top) + 1) ** -0.5).sum() for top in k]))
    unknown = (math.nan, math.nan)
    return ScalingFit(
        *fitted.get("n", unknown),
        *fitted.get("k", unknown),
        float(ratios.mean()),
        float(ratios.min()),
        float(ratios.max()),
    )


# ---------------------------------------------------------------------------------------------------------------------


def _angle(num_keys: Int[np.ndarray, "*rows"], num_marked: Int[np.ndarray, "*rows"]) -> Float[np.ndarray, "*rows"]:
    return np.arcsin(np.sqrt(num_marked / num_keys))


def _sure(
    num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"], iterations: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """The success probability, without a remainder of rounding where the outcome is certain."""
    probability = success_probability(num_keys, num_marked, iterations)
    return np.where(num_marked == 0, 0.0, np.where(num_marked == num_keys, 1.0, probability))


def _allowed(
    like: Bool[np.ndarray, "rows keys"] | Float[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"] | None
) -> Bool[np.ndarray, "rows keys"]:
    allowed = np.ones(like.shape, dtype=bool) if allowed is None else allowed
    if not allowed.any(1).all():
        row = int(np.flatnonzero(~allowed.any(1))[0])
        raise ValueError(f"every row must be allowed at least one key; row {row} has none")
    return allowed


def _check_counts(num_keys: np.ndarray, num_marked: np.ndarray) -> None:
    if num_keys.min(initial=1) < 1:
        raise ValueError(f"a row must have at least one key; got n = {num_keys.min()}")
    if num_marked.min(initial=0) < 0 or (num_marked > num_keys).any():
        raise ValueError("marked keys must be between 0 and the number of keys in every row; got some outside")


def _check_iterations(iterations: np.ndarray) -> None:
    if iterations.min(initial=0) < 0:
        raise ValueError(f"the number of iterations must be 0 or more; got R = {iterations.min()}")


def _check_scores(scores: Float[np.ndarray, "rows keys"], allowed: Bool[np.ndarray, "rows keys"]) -> None:
    if not np.isfinite(scores[allowed]).all():
        raise ValueError("scores of allowed keys must be finite; mask the others with `allowed`, not with infinities")


def _check_error(error: float) -> None:
    if not 0 < error < 1:
        raise ValueError(f"error must lie between 0 and 1, as in 0.1; got {error}")
