"""Quantum search: three simulators against closed forms and each other, counts against exact means, errors against
their bounds."""

import math

import numpy as np
import pytest
from scipy import stats

from pennylane_qattn.grover.expectation import expected_calls, expected_largest, expected_search, fit_scaling
from pennylane_qattn.grover.largest import count_largest, search_extremes, search_largest
from pennylane_qattn.grover.registers import (
    SIMULATORS,
    STATE_VECTOR_KEYS,
    Counting,
    StateVector,
    Subspace,
    grover_state,
    success_probability,
)
from pennylane_qattn.grover.search import Schedule, best_iterations, name_places, search, search_known

simulators = pytest.mark.parametrize("simulator", SIMULATORS.values(), ids=SIMULATORS)
SIZES = 2 ** np.arange(8, 21, 2)


def ints(*values):
    return np.array(values, dtype=np.int64)


def repeated(count, *values):
    return tuple(np.full(count, value) for value in values)


def some_marks(keys, marked, rows=1, seed=0):
    """The same random keys marked in every row."""
    marks = np.zeros((rows, keys), dtype=bool)
    marks[:, np.random.default_rng(seed).permutation(keys)[:marked]] = True
    return marks


def law(n, k):
    return math.sqrt(n) * sum(t**-0.5 for t in range(1, k + 1))


# ------------------------------------------------------------------------------------------------- states, simulators


@pytest.mark.parametrize("n", [16, 17, 23, 32, 48, 63, 64])
def test_success_probability_of_the_state_vector(n):
    """GROVER.md, check 1: every m and R up to 8; the formula is written out here again."""
    m, iterations = (x.ravel() for x in np.meshgrid(np.arange(n + 1), np.arange(9)))
    marks = np.array([some_marks(n, marked, seed=seed)[0] for seed, marked in enumerate(m)])
    expected = np.sin((2 * iterations + 1) * np.arcsin(np.sqrt(m / n))) ** 2
    found = (grover_state(marks, iterations) ** 2 * marks).sum(1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    rows = np.arange(len(m))
    for simulator in SIMULATORS.values():
        found = simulator.from_marks(marks).success_probability(rows, iterations)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(success_probability(np.full_like(m, n), m, iterations), expected, rtol=0, atol=1e-12)


def test_a_state_by_hand():
    """Four keys, one marked: a single iteration finds it with certainty; six of which two are allowed stay two."""
    state = grover_state(np.array([[False, False, True, False]]), ints(1))
    np.testing.assert_allclose(state, [[0, 0, 1, 0]], atol=1e-15)
    allowed = np.array([[True, False, False, True, False, False]])
    state = grover_state(np.array([[True, True, False, False, True, False]]), ints(1), allowed)
    np.testing.assert_allclose(state**2, [[0.5, 0, 0, 0.5, 0, 0]], atol=1e-15)


def test_iterations_as_matrices():
    """Against the product of the oracle's and the reflection's matrices, unitary, on the allowed keys only."""
    rng = np.random.default_rng(5)
    allowed, marks = rng.random(23) < 0.7, rng.random(23) < 0.3
    u = allowed / math.sqrt(allowed.sum())
    step = (2 * np.outer(u, u) - np.eye(23)) @ np.diag(np.where(marks, -1.0, 1.0))
    np.testing.assert_allclose(step @ step.T, np.eye(23), atol=1e-14)
    for iterations in range(6):
        expected = np.linalg.matrix_power(step, iterations) @ u
        np.testing.assert_allclose(grover_state(marks[None], ints(iterations), allowed[None])[0], expected, atol=1e-14)


@pytest.mark.parametrize("simulator", [StateVector, Subspace])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_measured_keys_follow_the_state(simulator, iterations):
    """Chi-square at a fixed seed, each simulator against the amplitudes; keys that are not allowed never show."""
    rows, rng = 20_000, np.random.default_rng(11)
    marks = some_marks(23, 4, rows)
    allowed = np.ones_like(marks)
    allowed[:, [2, 13, 19]] = False
    registers = simulator.from_marks(marks, allowed)
    keys = registers.measure(np.arange(rows), np.full(rows, iterations), rng)
    expected = grover_state(marks[:1], ints(iterations), allowed[:1])[0] ** 2
    counts = np.bincount(keys, minlength=23)
    assert counts[[2, 13, 19]].sum() == 0
    assert stats.chisquare(counts[allowed[0]], rows * expected[allowed[0]]).pvalue > 0.01
    assert stats.chisquare(counts[allowed[0]], np.full(20, rows / 20)).pvalue < 1e-9 or iterations == 0


def test_measured_places_of_the_counting_model():
    rows, rng = 20_000, np.random.default_rng(3)
    registers = Counting(*repeated(rows, 23, 4))
    places = registers.measure(np.arange(rows), np.full(rows, 1), rng)
    probability = math.sin(3 * math.asin(math.sqrt(4 / 23))) ** 2
    counts = np.bincount(places, minlength=24)
    assert counts[4:23].sum() == 0
    expected = rows * np.array([probability / 4] * 4 + [1 - probability])
    assert stats.chisquare(counts[[0, 1, 2, 3, 23]], expected).pvalue > 0.01


def test_best_iterations_never_do_worse_than_chance_or_its_complement():
    """GROVER.md, check 8, second half: rounded R, all m up to n up to 256."""
    n, m = (x.ravel() for x in np.meshgrid(np.arange(1, 257), np.arange(1, 257)))
    n, m = n[m <= n], m[m <= n]
    iterations = best_iterations(n, m)
    share = m / n
    probability = np.sin((2 * iterations + 1) * np.arcsin(np.sqrt(share))) ** 2
    assert (probability >= np.maximum(share, 1 - share) - 1e-12).all()
    assert (iterations <= math.pi / 4 * np.sqrt(n)).all() and iterations.max() == 12


# ------------------------------------------------------------------------------------------------- with a threshold


def check_search(result, marks):
    """Every reported key is marked and none twice; nothing that is missing is hidden."""
    for row, marked in enumerate(marks):
        keys = result.row(row)
        assert marked[keys].all() and len(set(keys)) == len(keys)
        assert result.missed[row] == marked.sum() - len(keys)
    counts = result.counts
    assert (counts.samples == counts.verifications).all() and (counts.calls_to_last <= counts.calls).all()
    assert (counts.calls == counts.iterations + counts.verifications).all()


@pytest.mark.parametrize("find", [search, search_known])
@pytest.mark.parametrize("simulator", [StateVector, Subspace])
def test_every_reported_key_is_verified(find, simulator):
    rng = np.random.default_rng(1)
    marks = rng.random((40, 31)) < rng.random((40, 1))
    allowed = rng.random((40, 31)) < 0.8
    allowed[:, 7] = True
    result = find(simulator.from_marks(marks, allowed), seed=2)
    check_search(result, marks & allowed)
    assert result.missed.sum() == 0
    # the lie of a simulator that reports a marked key where there is none would not pass the verification
    registers = simulator.from_marks(np.zeros((5, 31), dtype=bool))
    registers.measure = lambda rows, iterations, rng: np.zeros(len(rows), dtype=np.int64)
    assert search(registers).keys.size == 0


def test_state_vector_and_closed_forms_cost_the_same():
    """GROVER.md, check 9: n = 48, k = 3, means within 3 % of each other; and within 2 % of the exact mean."""
    marks = some_marks(48, 3, rows=5000)
    expected = expected_search(48, 3).calls
    to_last = expected_calls(ints(48, 48, 48), ints(1, 2, 3)).sum()
    means = {}
    for name, simulator in SIMULATORS.items():
        result = search(simulator.from_marks(marks), seed=10 + len(name))
        means[name] = result.counts.calls.mean(), result.counts.calls_to_last.mean()
        assert means[name] == pytest.approx((expected, to_last), rel=0.02)
    for column in zip(*means.values(), strict=True):
        assert max(column) / min(column) < 1.03


@simulators
def test_the_stop_has_the_probability_it_is_said_to_have(simulator):
    """With two failures allowed keys are often missed; cost and misses against the exact means."""
    schedule, rows = Schedule(growth=1.5, cap=0.7, failures=2), 4000
    result = search(simulator.from_marks(some_marks(23, 5, rows)), schedule=schedule, seed=4)
    expected = expected_search(23, 5, schedule)
    assert 0.1 < expected.missing < 0.9
    deviation = math.sqrt(expected.missing * (1 - expected.missing) / rows)
    assert (result.missed > 0).mean() == pytest.approx(expected.missing, abs=4 * deviation)
    calls = result.counts.calls
    assert calls.mean() == pytest.approx(expected.calls, abs=4 * calls.std() / math.sqrt(rows))


def test_simulators_of_the_plane_agree_draw_by_draw():
    """The counting model is the subspace without names: with one seed the same calls, and the same keys once named."""
    marks = np.random.default_rng(6).random((50, 37)) < 0.2
    named, counted = (search(simulator.from_marks(marks), seed=8) for simulator in (Subspace, Counting))
    assert (named.counts.calls == counted.counts.calls).all() and (named.offsets == counted.offsets).all()
    for row, marked in enumerate(marks):
        assert name_places(counted.row(row), np.flatnonzero(marked)) == named.row(row).tolist()


@simulators
def test_order_of_finding_is_uniform(simulator):
    marks = some_marks(29, 3, rows=6000)
    result = search_known(simulator.from_marks(marks), seed=5)
    where, orders = np.flatnonzero(marks[0]), {}
    for row in range(6000):
        keys = result.row(row)
        keys = tuple(keys) if simulator is not Counting else tuple(name_places(keys, where))
        orders[keys] = orders.get(keys, 0) + 1
    assert len(orders) == 6 and stats.chisquare(list(orders.values())).pvalue > 0.01


@pytest.mark.parametrize("k", [1, 4, 16])
def test_scaling_with_the_number_of_keys(k):
    """GROVER.md, check 9: exponent between 0.45 and 0.55, C 1.5 to 1.6 over the range, and about pi/4 if k is known."""
    unknown, known = [], []
    for n in SIZES:
        unknown.append(search(Counting(*repeated(400, n, k)), seed=k).counts.calls_to_last.mean())
        known.append(search_known(Counting(*repeated(400, n, k)), seed=k).counts.calls.mean())
    counts = [k] * len(SIZES)
    fit = fit_scaling(SIZES, counts, unknown)
    assert 0.45 < fit.exponent_n < 0.55 and fit.error_n < 0.02
    assert 1.5 < fit.constant < 1.6 and 1.4 < fit.constant_low and fit.constant_high < 1.75
    exact = [expected_calls(np.full(k, n), np.arange(1, k + 1)).sum() for n in SIZES]
    assert unknown == pytest.approx(exact, rel=0.12)
    exact = fit_scaling(SIZES, counts, exact)
    assert 0.484 < exact.exponent_n < 0.492
    assert fit.exponent_n == pytest.approx(exact.exponent_n, abs=0.02)
    fit = fit_scaling(SIZES, counts, known)
    assert 0.45 < fit.exponent_n < 0.55 and 0.75 < fit.constant < 1.05
    assert known[-1] / law(SIZES[-1], k) == pytest.approx(math.pi / 4, rel=0.03)


def test_at_small_sizes_it_loses():
    """GROVER.md: causal, n = 96, 15 % marked; 4,656 inner products in a scan, some 12,400 calls in a search."""
    rng = np.random.default_rng(0)
    scores, allowed = rng.normal(size=(96, 96)), np.tri(96, dtype=bool)
    place = np.where(allowed, -scores, np.inf).argsort(1).argsort(1)
    marks = place < np.round(0.15 * np.arange(1, 97))[:, None]
    result = search(Subspace.from_marks(marks, allowed), seed=1)
    check_search(result, marks)
    scan, calls = allowed.sum(), result.counts.calls.sum()
    assert scan == 4656 < calls
    expected = sum(expected_search(n, int(m)).calls for n, m in enumerate(marks.sum(1), start=1))
    assert calls == pytest.approx(expected, rel=0.05) and expected == pytest.approx(12_393, rel=0.03)


@simulators
def test_nothing_marked(simulator):
    """By hand, n = 17, cap 4.12: ceilings 1, 1.2, ..., 1.2^7 = 3.58 fail 8 times, and then 16 times at the cap."""
    result = search(simulator.from_counts(*repeated(300, 17, 0)), seed=1)
    assert result.keys.size == 0 and (result.counts.samples == 24).all() and (result.counts.calls_to_last == 0).all()
    # draws from 1, 2, 2, 2, 3, 3, 3, 4 values, then 16 times from 5
    expected = 24 + (0 + 3 * 0.5 + 3 * 1 + 1.5) + 16 * 2
    assert expected_search(17, 0).calls == pytest.approx(expected, rel=1e-12)
    assert result.counts.calls.mean() == pytest.approx(expected, rel=0.02)
    assert math.isinf(expected_calls(ints(17), ints(0))[0]) and expected_search(17, 0).missing == 0
    known = search_known(simulator.from_counts(*repeated(3, 17, 0)))
    assert known.counts.calls.sum() == 0 and known.keys.size == 0


@simulators
def test_everything_marked(simulator):
    result = search(simulator.from_counts(ints(13), ints(13)), seed=1)
    assert len(result.keys) == 13 and result.missed == 0 and (result.counts.calls == result.counts.calls_to_last).all()
    # the first sample of each of the 13 searches has no iterations and finds a key with what share is left
    assert expected_calls(ints(13), ints(13))[0] == pytest.approx(1)
    assert expected_search(13, 13).missing < 1e-4


@simulators
def test_one_key(simulator):
    counts = search(simulator.from_counts(ints(1, 1), ints(0, 1))).counts
    assert counts.calls.tolist() == [16, 1] and counts.iterations.tolist() == [0, 0]
    assert search_known(simulator.from_counts(ints(1, 1), ints(0, 1))).counts.calls.tolist() == [0, 1]


def test_a_known_number_by_hand():
    """One of four: one iteration, certain, and its verification."""
    counts = search_known(Subspace.from_counts(ints(4), ints(1))).counts
    assert counts.iterations == 1 and counts.verifications == 1 and counts.samples == 1


# ------------------------------------------------------------------------------------------------- without a threshold


@simulators
@pytest.mark.parametrize("k", [1, 3])
def test_the_largest_scores(simulator, k):
    """Against NumPy, with the largest error that may be asked for; cost until the end against the exact mean."""
    rows, n = 1500, 37
    scores = np.random.default_rng(1).normal(size=(rows, n))
    result = search_largest(scores, k, simulator=simulator, error=0.5, seed=2)
    truth = np.argpartition(-scores, k, axis=1)[:, :k]
    right = (np.sort(truth, axis=1) == np.sort(result.keys, axis=1)).all(1)
    assert (right == result.certified).all() and 0.5 <= right.mean() < 1
    picked = np.take_along_axis(scores, result.keys, axis=1)
    assert (np.diff(picked, axis=1) < 0).all()
    counts = result.counts
    assert (counts.verifications == counts.samples + k).all() and (counts.calls_to_last <= counts.calls).all()
    # runs that are cut off are counted as far as they got, hence a little less than the mean
    assert counts.calls_to_last.mean() - k == pytest.approx(expected_largest(n, k), rel=0.05)
    surer = search_largest(scores, k, simulator=simulator, error=0.01, seed=2)
    assert surer.certified.mean() >= 0.99 and surer.error == 0.01
    assert surer.counts.calls.mean() / counts.calls.mean() == pytest.approx(7, rel=0.15)  # windows: 2^-7 < 0.01


@pytest.mark.parametrize("k, n", [(1, 3), (1, 2), (2, 3), (1, 1000), (7, 64)])
@pytest.mark.parametrize("error", [0.5, 0.25, 0.1])
def test_the_bound_on_the_error_holds(k, n, error):
    rows = 2000
    counts, certified = count_largest(np.full(rows, n), k, error=error, seed=n)
    assert 1 - certified.mean() <= error + 4 * math.sqrt(error * (1 - error) / rows)
    # nothing is spent beyond the windows that are allowed; the mean to the end is within one of them
    windows = math.ceil(-math.log2(error))
    most = windows * 2 * (expected_largest(n, k) + 4) + k
    assert counts.calls.max() <= most


def test_the_mean_of_a_search_for_the_largest_by_simulation():
    """Ranks by brute force: explicit sets of kept keys, thresholds by their worst, and exact means for each."""
    rng, n, k, total = np.random.default_rng(9), 19, 4, []
    each = expected_calls(np.full(n - k, n), np.arange(1, n - k + 1))
    for _ in range(4000):
        kept, spent = set(rng.permutation(n)[:k].tolist()), 0.0
        while marked := [rank for rank in range(max(kept)) if rank not in kept]:
            spent += each[len(marked) - 1]
            kept = kept - {max(kept)} | {int(rng.choice(marked))}
        total.append(spent)
    error = np.std(total) / math.sqrt(len(total))
    assert expected_largest(n, k) == pytest.approx(np.mean(total), abs=4 * error)


@pytest.mark.parametrize("simulator", [Subspace, Counting])
def test_rows_of_all_lengths(simulator):
    """Causal rows, some shorter than k: those give all their keys for as many calls."""
    scores = np.random.default_rng(2).normal(size=(23, 23))
    scores[np.triu_indices(23, 1)] = np.nan  # never read
    result = search_largest(scores, 5, allowed=np.tri(23, dtype=bool), simulator=simulator, error=1e-4)
    assert result.certified.all()
    for row, keys in enumerate(result.keys):
        expected = np.argsort(-scores[row, : row + 1])[:5]
        assert keys.tolist() == expected.tolist() + [-1] * (5 - len(expected))
    assert result.counts.calls[:5].tolist() == [1, 2, 3, 4, 5]


@simulators
def test_equal_scores_go_by_the_lower_key(simulator):
    scores = np.array([[2.0, 5.0, 5.0, 1.0, 5.0, 2.0, 2.0], [3.0] * 7])
    result = search_largest(scores, 4, simulator=simulator, error=1e-6)
    assert result.keys.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]] and result.certified.all()


def test_the_largest_scale_as_the_root_of_k_n():
    n, k, calls = [], [], []
    for count in (2, 6, 18):
        for size in (2**10, 2**12, 2**14):
            n.append(size)
            k.append(count)
            calls.append(count_largest(np.full(50, size), count, error=0.5, seed=count)[0].calls_to_last.mean())
    fit = fit_scaling(n, k, calls)
    assert fit.exponent_n == pytest.approx(0.5, abs=0.05) and fit.exponent_k == pytest.approx(0.5, abs=0.1)


@simulators
def test_extremes_of_the_background(simulator):
    rng = np.random.default_rng(4)
    scores, found, allowed = rng.normal(size=(300, 23)), rng.random((300, 23)) < 0.3, np.ones((300, 23), dtype=bool)
    scores[:, 20:], allowed[:, 20:] = np.nan, False
    found[0], found[1] = True, np.arange(23) != 4
    found[2:, 5] = False
    result = search_extremes(scores, found, allowed=allowed, simulator=simulator, error=1e-3, seed=5)
    background = np.where(allowed & ~found, scores, np.nan)[1:]
    assert result.certified[1:].mean() > 0.99
    assert ((result.low[1:] == np.nanmin(background, axis=1)) & (result.high[1:] == np.nanmax(background, axis=1)))[
        result.certified[1:]
    ].all()
    middle = (np.nanmin(background, axis=1) + np.nanmax(background, axis=1)) / 2
    assert result.midrange[1:][result.certified[1:]] == pytest.approx(middle[result.certified[1:]])
    # without a background there is nothing to pay; one key is read twice
    assert math.isnan(result.low[0]) and math.isnan(result.high[0]) and result.counts.calls[:2].tolist() == [0, 2]
    assert result.low[1] == result.high[1] == scores[1, 4]


def test_wrong_extremes_are_said_to_be_wrong():
    scores = np.random.default_rng(4).normal(size=(3000, 37))
    result = search_extremes(scores, np.zeros((3000, 37), dtype=bool), error=0.99, seed=5)
    right = (result.low == scores.min(1)) & (result.high == scores.max(1))
    assert (right == result.certified).all() and 0 < (~right).mean() < 0.5


# ------------------------------------------------------------------------------------------------- seeds and fits


def test_seeds():
    marks = some_marks(37, 5, rows=20)
    state = np.random.get_state()[1].copy()
    calls = [search(Subspace.from_marks(marks), seed=seed).counts.calls.tolist() for seed in (3, 3, 4)]
    assert calls[0] == calls[1] != calls[2]
    generator = np.random.default_rng(3)
    runs = [search(Subspace.from_marks(marks), seed=generator).counts.calls.tolist() for _ in range(2)]
    assert runs[0] == calls[0] != runs[1]
    assert (np.random.get_state()[1] == state).all()


def test_what_was_handed_in_stays_as_it_was():
    marks, counts = some_marks(37, 5, rows=3), ints(5, 5)
    before = marks.copy()
    search(Subspace.from_marks(marks))
    search(Counting(ints(37, 37), counts))
    assert (marks == before).all() and counts.tolist() == [5, 5]


def test_fit_of_a_law_and_its_standard_error():
    n, k = (x.ravel() for x in np.meshgrid(SIZES, [1, 4, 16]))
    fit = fit_scaling(n, k, 3.0 * n**0.45 * k**0.6)
    assert (fit.exponent_n, fit.exponent_k) == pytest.approx((0.45, 0.6)) and fit.error_n < 1e-12
    exact = [1.25 * law(*pair) for pair in zip(n, k, strict=True)]
    assert fit_scaling(n, k, exact).constant == pytest.approx(1.25)
    one = fit_scaling(SIZES, [4] * 7, noisy := SIZES**0.5 * np.exp([0.1, -0.2, 0, 0.3, 0.1, -0.1, 0.2]))
    reference = stats.linregress(np.log(SIZES), np.log(noisy))
    assert (one.exponent_n, one.error_n) == pytest.approx((reference.slope, reference.stderr))
    assert math.isnan(one.exponent_k) and math.isnan(fit_scaling([4, 16], [1, 1], [2, 4]).error_n)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Schedule(growth=1.0), "growth must be above 1"),
        (lambda: Schedule(growth=math.nan), "growth must be above 1"),
        (lambda: Schedule(cap=0.0), "cap must be positive"),
        (lambda: Schedule(failures=0), "failures must be at least 1"),
        (lambda: Counting(ints(0), ints(0)), "at least one key; got n = 0"),
        (lambda: Counting(ints(5), ints(6)), "between 0 and the number of keys"),
        (lambda: Counting(ints(5), ints(-1)), "between 0 and the number of keys"),
        (lambda: Subspace.from_marks(np.ones((2, 3), bool), np.array([[1, 1, 1], [0, 0, 0]], bool)), "row 1 has none"),
        (lambda: StateVector.from_counts(ints(STATE_VECTOR_KEYS + 1), ints(1)), "use Subspace"),
        (lambda: success_probability(ints(5), ints(1), ints(-1)), "got R = -1"),
        (lambda: grover_state(np.ones((1, 3), bool), ints(-2)), "got R = -2"),
        (lambda: search_largest(np.ones((2, 5)), 0), "k must be between 1 and the number of keys, 5; got 0"),
        (lambda: search_largest(np.ones((2, 5)), 6), "got 6"),
        (lambda: count_largest(ints(5), 6), "got 6"),
        (lambda: expected_largest(5, 0), "got 0"),
        (lambda: search_largest(np.array([[1.0, math.nan]]), 1), "scores of allowed keys must be finite"),
        (lambda: search_largest(np.array([[1.0, -math.inf]]), 1), "scores of allowed keys must be finite"),
        (lambda: search_largest(np.ones((2, 5)), 1, error=0.0), "error must lie between 0 and 1"),
        (lambda: search_extremes(np.ones((1, 5)), np.zeros((1, 5), bool), error=1.0), "error must lie between 0 and 1"),
        (lambda: fit_scaling([4, 16], [1], [2, 4]), "lists of one length"),
        (lambda: fit_scaling([4, 16], [1, 1], [2, 0]), "calls positive"),
        (lambda: fit_scaling([4, 16, 64], [2, 4, 8], [2, 4, 8]), "cannot be told apart"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
