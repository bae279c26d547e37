r"""Quantum search for the marked keys of a row, simulated, and every query of it counted.

On a simulator (`registers.py`) run the search for an unknown number of marked keys (BBHT: Boyer, Brassard, Hoyer, Tapp,
quant-ph/9605034) and the search for a known number. `largest.py` searches without a threshold, and `expectation.py`
says what to expect without drawing anything.

**The unit.** One oracle call is one coherent inner product of a query with the keys in superposition; reading the score
of one key, to verify it, is one inner product as well. Both count 1, as does one inner product of a classical scan.
Computing the score, comparing and uncomputing would be two coherent inner products in gates: counting one favours the
quantum side. Preparing the uniform state, the reflection, loading the keys (QRAM) and the cost of error correction
are not counted. A simulator knows which keys are marked, because it was told; the searches never look at that, but
where a docstring says so, and only report it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from pennylane_qattn.grover.amplification import grover_iterations
from pennylane_qattn.grover.registers import Registers, check_counts

#: What a seed may be. A generator is used as it is and moves on; an integer gives the same draws each time.
Seed = int | np.random.Generator


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
    log = Log(len(caps))
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
    log = Log(len(registers.num_keys))
    rows = np.flatnonzero(registers.num_marked > 0)
    while rows.size:
        log.sample(registers, rows, best_iterations(registers.num_keys[rows], registers.num_marked[rows]), rng)
        rows = rows[registers.num_marked[rows] > 0]
    return log.result(registers)


def best_iterations(
    num_keys: Int[np.ndarray, " rows"], num_marked: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """`grover_iterations` of whole numbers."""
    check_counts(num_keys, num_marked)
    marked, keys = (torch.from_numpy(x.astype(np.float64)) for x in (num_marked, num_keys))
    return grover_iterations(marked, keys).numpy()


def name_places(places: Sequence | np.ndarray, marked: Sequence | np.ndarray) -> list[int]:
    """The keys behind the places that `Counting` reports for a row, given the row's marked keys in order."""
    left = list(marked)
    return [int(left.pop(place)) for place in places]


class Log:
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
