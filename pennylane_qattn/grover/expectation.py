r"""What simulated searches cost in the mean, exactly and without drawing anything, and how counts of them scale.

Sources as in `search.py` and `largest.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from pennylane_qattn.grover.registers import check_counts, grover_angle
from pennylane_qattn.grover.search import Schedule


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
    :math:`\tfrac{1}{2} - \sin(4c\theta)/(4c\sin 2\theta)` (Boyer and others, lemma 2) and costs :math:`(c + 1)/2`.
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
    return remaining_calls(num_keys, num_candidates, k, schedule or Schedule())[0]


@lru_cache(maxsize=65536)
def remaining_calls(num_keys: int, num_candidates: int, k: int, schedule: Schedule) -> tuple[float, float]:
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
    check_counts(num_keys, num_marked)
    theta, caps = grover_angle(num_keys, num_marked), schedule.caps(num_keys)
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
