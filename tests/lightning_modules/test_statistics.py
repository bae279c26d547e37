"""Intervals of paired differences: their rate of success, a reference that enumerates, what must not change them."""

import itertools
import math
import statistics

import numpy as np
import pytest

from lightning_modules.statistics import FEWEST_PAIRS, Difference, _studentised, paired_difference

INF = math.inf
A = [2.1314, 2.1177, 2.0971, 2.1202, 2.1093, 2.1258, 2.1029, 2.1111]
B = [2.1142, 2.1153, 2.0912, 2.0897, 2.1101, 2.1207, 2.0883, 2.1048]


def ends(a, b, **options):
    difference = paired_difference(a, b, **options)
    return difference.low, difference.high


def by_enumeration(a, b, confidence):
    """All n^n ordered resamples in plain Python; the ranks are counted from both ends."""
    d = [y - x for x, y in zip(a, b, strict=True)]
    n, mean = len(d), statistics.fmean(d)
    ts = []
    for draw in itertools.product(d, repeat=n):
        rise = statistics.fmean(draw) - mean
        if len(set(draw)) == 1:
            ts.append(math.copysign(INF, rise) if rise else 0.0)
        else:
            ts.append(rise * math.sqrt(n) / statistics.stdev(draw))
    ts.sort()
    rank = math.ceil((1 - confidence) / 2 * n**n)  # never a whole number for the sizes and confidences used here
    error = statistics.stdev(d) / math.sqrt(n)
    return mean - ts[-rank] * error, mean - ts[rank - 1] * error


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_is_that_of_all_resamples(count, confidence):
    a, b = A[:count], B[:count]
    assert ends(a, b, confidence=confidence) == pytest.approx(by_enumeration(a, b, confidence), rel=1e-9)


def test_a_case_by_hand():
    """Differences 0, 0, 0, 4, with mean 1 and standard error 1.

    Of 256 draws 81 are all 0, at t = -inf, and one is all 4, at t = inf. Next below that are 12 draws of three 4s and
    a 0, with mean 3 and standard deviation 2, hence t = 2. The 7 highest and lowest draws are 2.5 % of all.
    """
    difference = paired_difference([1, 2, 3, 5], [1, 2, 3, 9])
    assert (difference.mean, difference.reference, difference.count) == (1, 2.75, 4)
    assert difference.low == pytest.approx(1 - 2) and difference.high == INF
    assert not difference.excludes_zero


def test_draws_of_one_value():
    """Those of the mean itself are at t = 0; at any number of pairs no rounding gives the others a spread."""
    symmetric = [-1.0, 0.0, 0.0, 1.0]
    assert ends(np.zeros(4), symmetric) == pytest.approx(by_enumeration([0] * 4, symmetric, 0.95))
    assert _studentised(np.array(symmetric), np.array([[1, 2, 2, 1], [3, 3, 3, 3], [0] * 4])).tolist() == [0, INF, -INF]
    for count in range(4, 12):
        differences = [0.1] * (count - 1) + [0.7]
        assert ends(np.zeros(count), differences)[1] == INF


@pytest.mark.parametrize("count, runs", [(4, 3000), (5, 3000), (8, 900)])
def test_coverage_of_normal_differences_is_nominal(count, runs):
    """Within four standard deviations of the binomial distribution, sqrt(0.95 * 0.05 / runs) each."""
    assert covered(count, runs, lambda rng: rng.normal(size=count)) == pytest.approx(
        0.95, abs=4 * math.sqrt(0.95 * 0.05 / runs)
    )


def test_coverage_of_skewed_differences():
    """Exponential ones, whose skewness is 2, cost some two points of coverage; allowed are three, and the noise."""
    runs = 3000
    found = covered(5, runs, lambda rng: rng.exponential(size=5) - 1)
    assert 0.92 - 4 * math.sqrt(0.08 * 0.92 / runs) < found < 0.95 + 4 * math.sqrt(0.95 * 0.05 / runs)


def covered(count, runs, draw):
    """How often the interval contains the known difference; what pairs have in common is far larger."""
    rng, true, hits = np.random.default_rng(7), 0.3, 0
    for _ in range(runs):
        common = 5 * rng.normal(size=count)
        low, high = ends(common, common + true + draw(rng))
        hits += low <= true <= high
    return hits / runs


def test_the_confidence_is_what_it_says():
    runs, hits, rng = 3000, 0, np.random.default_rng(3)
    for _ in range(runs):
        low, high = ends(np.zeros(5), rng.normal(size=5), confidence=0.8)
        hits += low <= 0 <= high
    assert hits / runs == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / runs))


def test_shift_scale_and_order():
    a, b = np.array(A), np.array(B)
    low, high = ends(a, b)
    assert ends(a + 3, b + 3) == pytest.approx((low, high))  # what is common
    assert ends(a, b + 3) == pytest.approx((low + 3, high + 3))
    assert ends(7 * a, 7 * b) == pytest.approx((7 * low, 7 * high))
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    assert ends(a[order], b[order]) == pytest.approx((low, high))


@pytest.mark.parametrize("count", [4, 8, 11])
def test_swapping_the_sides_mirrors_the_interval(count):
    rng = np.random.default_rng(count)
    a, b = rng.normal(size=count), rng.exponential(size=count)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert (back.mean, back.low, back.high) == pytest.approx((-forth.mean, -forth.high, -forth.low))
    turned = -forth
    assert (turned.mean, turned.low, turned.high) == (-forth.mean, -forth.high, -forth.low)
    assert turned.reference == forth.reference == pytest.approx(a.mean())


def test_what_pairs_share_does_not_matter():
    a, b = np.array(A), np.array(B)
    common = 100 * np.random.default_rng(0).normal(size=8)
    assert ends(a + common, b + common) == pytest.approx(ends(a, b), rel=1e-6)


def test_up_to_eight_pairs_nothing_is_drawn():
    assert ends(A, B) == ends(A, B, seed=1) == ends(A, B, resamples=6435)
    assert ends(A, B) != ends(A, B, resamples=6434)


def test_what_is_drawn_follows_the_seed_and_agrees_with_all_resamples():
    rng = np.random.default_rng(5)
    a, b = np.zeros(9), rng.normal(size=9)
    drawn = ends(a, b)
    assert drawn == ends(a, b, seed=0) != ends(a, b, seed=1)
    everything = ends(a, b, resamples=math.comb(17, 9))
    assert drawn != everything
    np.testing.assert_allclose(drawn, everything, atol=0.05 * (everything[1] - everything[0]))


def test_the_rank_of_a_drawn_quantile():
    """Of 1,000 t, the 25th from either end, although 0.025 is not quite that in binary."""
    a, b = np.zeros(11), np.random.default_rng(2).normal(size=11)
    indices = np.random.default_rng(13).integers(11, size=(1000, 11))
    drawn = b[indices]
    t = np.sort((drawn.mean(1) - b.mean()) / drawn.std(1, ddof=1))
    scale = b.std(ddof=1)
    expected = b.mean() - t[-25] * scale, b.mean() - t[24] * scale
    assert ends(a, b, resamples=1000, seed=13) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 2, FEWEST_PAIRS - 1])
def test_few_pairs_have_no_interval(count):
    difference = paired_difference(A[:count], B[:count])
    assert difference.count == count and difference.mean == pytest.approx(np.mean(B[:count]) - np.mean(A[:count]))
    for one in (difference, -difference, difference.percent):
        assert one.low is None and one.high is None and not one.has_interval and not one.excludes_zero
    assert FEWEST_PAIRS == 4 and paired_difference(A[:4], B[:4]).has_interval


def test_no_pairs_at_all():
    difference = paired_difference([], [])
    assert difference.count == 0 and not difference.has_interval
    assert math.isnan(difference.mean) and math.isnan((-difference).percent.mean)


def test_equal_differences_have_an_interval_of_one_point():
    assert ends(A, A) == (0, 0) and not paired_difference(A, A).excludes_zero
    assert "-0" not in str(-paired_difference(A, A))
    low, high = ends(np.zeros(7), [0.1] * 7)
    assert low == high == pytest.approx(0.1)
    difference = paired_difference([1, 2, 3, 5], [1.5, 2.5, 3.5, 5.5])
    assert (difference.mean, difference.low, difference.high) == (0.5, 0.5, 0.5) and difference.excludes_zero


def test_percent_of_the_reference():
    difference = paired_difference(A, B)
    percent, reference = difference.percent, np.mean(A)
    expected = [100 * x / reference for x in (difference.mean, difference.low, difference.high)]
    assert [percent.mean, percent.low, percent.high] == pytest.approx(expected)
    assert percent.reference == pytest.approx(100)
    gain = (-difference).percent
    assert (gain.mean, gain.low, gain.high) == pytest.approx((-percent.mean, -percent.high, -percent.low))
    assert paired_difference([2, 2, 2, 2], [1, 1, 1, 1]).percent.mean == -50
    below = paired_difference([-2, -2, -2, -2], [-1, -2, -3, -1]).percent
    assert below.mean == pytest.approx(-12.5) and below.low < below.mean < below.high
    assert math.isnan(paired_difference([-1, 1], [0, 1]).percent.mean)


@pytest.mark.parametrize(
    "low, high, excludes", [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0, 1, False), (-INF, 1, False)]
)
def test_intervals_and_zero(low, high, excludes):
    assert Difference(0.0, low, high, 5, 1.0).excludes_zero is excludes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1, 2], [1]), r"as two lists of one length; got \(2,\) and \(1,\)"),
        (([[1, 2]], [[1, 2]]), r"got \(1, 2\) and \(1, 2\)"),
        (([1, math.nan], [1, 2]), "values must be finite"),
        (([1, 2], [1, INF]), "values must be finite"),
    ],
    ids=["lengths", "shape", "nan", "inf"],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(*arguments)


@pytest.mark.parametrize("options", [{"confidence": 0}, {"confidence": 1}, {"resamples": 0}], ids=str)
def test_bad_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        paired_difference(A, B, **options)
