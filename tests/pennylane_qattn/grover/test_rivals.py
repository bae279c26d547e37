"""Row finders against brute force, and what they say they cost."""

import math
import sys

import numpy as np
import pytest
import torch

from pennylane_qattn.grover.bounds import bound
from pennylane_qattn.grover.registers import Counting, StateVector, Subspace
from pennylane_qattn.grover.rivals import FINDERS, BallTreeIndex, FullScan, QuantumFinder, ScoreRows
from pennylane_qattn.grover.search import Schedule
from pennylane_qattn.grover.sparse import SparseAttention
from pennylane_qattn.grover.support import DotProductScores, midrange_shift

QUANTUM = {kind.name: kind for kind in (StateVector, Subspace, Counting)}


def random_vectors(queries, keys, features, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(queries, features)), rng.normal(size=(keys, features))


def clustered_vectors(queries, keys, features, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(5, features))
    return tuple(centres[rng.integers(5, size=n)] + 0.2 * rng.normal(size=(n, features)) for n in (queries, keys))


def brute(q, k, causal):
    """Scores by matmul, minus infinity where a row may not look."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    return np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf) if causal else scores


def middle_of_a_gap(scores, share):
    """A threshold with about so many scores above it, and none so near that rounding could matter."""
    ordered = np.sort(scores[np.isfinite(scores)])
    place = round((1 - share) * (len(ordered) - 1))
    gap = place + np.diff(ordered)[place : place + 20].argmax()
    return float(ordered[gap : gap + 2].mean())


@pytest.fixture(params=["quantum", "scan", "index", "index of one tree"])
def finder(request):
    if request.param.startswith("index"):
        pytest.importorskip("sklearn")
        return BallTreeIndex(leaf_size=4, one_tree=request.param != "index")
    return QuantumFinder(error=1e-3, schedule=Schedule(failures=24)) if request.param == "quantum" else FullScan()


@pytest.mark.parametrize("vectors", [random_vectors, clustered_vectors])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("features", [1, 3, 11])
def test_found_keys_are_those_of_brute_force(finder, vectors, causal, features):
    q, k = vectors(67 if causal else 29, 67, features)
    rows, scores = ScoreRows.from_vectors(q, k, causal), brute(q, k, causal)
    for share in (0.02, 0.3):
        tau = middle_of_a_gap(scores, share)
        found = finder.above(rows, tau)
        expected_rows, expected_keys = np.nonzero(scores >= tau)
        assert found.rows.tolist() == expected_rows.tolist() and found.keys.tolist() == expected_keys.tolist()
        assert found.row(11).tolist() == np.flatnonzero(scores[11] >= tau).tolist()
    for count in (1, 5):
        found = finder.largest(rows, count)
        for row, values in enumerate(scores):
            size = min(count, row + 1) if causal else count
            assert found.row(row).tolist() == np.argsort(-values, kind="stable")[:size].tolist()
    assert found.cost.shape == (len(q),) and found.total == found.cost.sum() + found.building
    assert finder.exact == (found.certified is None)


def test_ties_at_the_threshold(finder):
    """Whole numbers, so that scores are exact and many equal the threshold; then thresholds that are scores."""
    rng = np.random.default_rng(3)
    q, k = (rng.integers(-2, 3, size=(53, 4)).astype(float) for _ in range(2))
    rows, scores = ScoreRows.from_vectors(q, k, scale=1.0), np.where(np.tri(53, dtype=bool), q @ k.T, -np.inf)
    for tau in (-1.0, 0.0, 2.0, 5.0):
        assert (scores == tau).sum() > 10
        assert finder.above(rows, tau).keys.tolist() == np.nonzero(scores >= tau)[1].tolist()
    # where several are equal any may be reported, but the scores must be right
    found = finder.largest(rows, 6)
    for row in range(53):
        best = np.sort(scores[row, : row + 1])[::-1][:6]
        assert scores[row, found.row(row)].tolist() == best.tolist() and len(set(found.row(row))) == len(best)
    q, k = random_vectors(53, 53, 7)
    rows = ScoreRows.from_vectors(q, k)
    for row, key in ((50, 3), (30, 30), (52, 17)):
        tau = float(rows.of(row)[key])
        assert key in finder.above(rows, tau).row(row)
        assert key not in finder.above(rows, float(np.nextafter(tau, 9))).row(row)


def test_degenerate_vectors(finder):
    """Zero queries, zero keys, equal keys, lengths that underflow when squared; thresholds beyond all scores."""
    q, k = random_vectors(41, 41, 3)
    q[5], q[7], k[2], k[20:30] = 0, 1e-200, 0, k[20]
    k[31] *= 1e-170
    for keys in (k, np.zeros_like(k), np.full_like(k, 0.7)):
        rows, scores = ScoreRows.from_vectors(q, keys, scale=1.0), np.where(np.tri(41, dtype=bool), q @ keys.T, -np.inf)
        for tau in (-math.inf, -50.0, 0.0, 1e-210, 50.0, math.inf):
            expected = np.nonzero((scores >= tau) & np.tri(41, dtype=bool))[1]
            assert finder.above(rows, tau).keys.tolist() == expected.tolist()
        found = finder.largest(rows, 41)
        assert all(sorted(found.row(row)) == list(range(row + 1)) for row in range(41))


def test_one_row(finder):
    rows = ScoreRows.from_vectors(np.ones((1, 2)), np.ones((1, 2)))
    assert finder.above(rows, 1.0).keys.tolist() == [0] and finder.largest(rows, 1).keys.tolist() == [0]


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("features", [1, 2, 5, 8, 17, 64])
def test_a_score_does_not_depend_on_its_company(features):
    """To the last bit: a threshold that is a score must mean the same to every finder."""
    q, k = random_vectors(3, 211, features)
    rows, rng = ScoreRows.from_vectors(q, k, causal=False), np.random.default_rng(1)
    for row in range(3):
        every = rows.of(row)
        np.testing.assert_allclose(every, k @ q[row] / math.sqrt(features), rtol=1e-12, atol=1e-14)
        for size in (1, 2, 7, 100):
            some = rng.choice(211, size, replace=False)
            assert (rows.of(row, some) == every[some]).all()
        assert (rows.of(row, slice(5, 60)) == every[5:60]).all()


def test_given_scores_and_tensors(finder, monkeypatch):
    """Tensors of any precision; rows in several blocks; an index says that scores alone are not enough."""
    monkeypatch.setattr("pennylane_qattn.grover.rivals.BLOCK_SCORES", 200)
    q, k = (torch.from_numpy(x).float().requires_grad_() for x in random_vectors(31, 31, 5))
    scores = brute(*(x.detach().double().numpy() for x in (q, k)), True)
    tau = middle_of_a_gap(scores, 0.2)
    expected = np.nonzero(scores >= tau)[1].tolist()
    assert finder.above(ScoreRows.from_vectors(q, k), tau).keys.tolist() == expected
    given = ScoreRows(torch.from_numpy(scores))
    if finder.needs_vectors:
        with pytest.raises(ValueError, match=r"needs queries and keys; build the rows with ScoreRows.from_vectors"):
            finder.above(given, tau)
    else:
        assert finder.above(given, tau).keys.tolist() == expected
        assert len(finder.largest(given, 3).keys) == 1 + 2 + 29 * 3


# --------------------------------------------------------------------------------------------------------------- costs


def test_a_scan_pays_for_every_score():
    q, k = random_vectors(96, 96, 3)
    assert FullScan().above(ScoreRows.from_vectors(q, k), 0.0).total == 4656
    assert FullScan().largest(ScoreRows.from_vectors(q, k, causal=False), 2).cost.tolist() == [96] * 96


@pytest.mark.parametrize("vectors, pays", [(clustered_vectors, True), (random_vectors, False)])
def test_when_the_index_pays(vectors, pays):
    """With clusters it does, building included; in 16 dimensions without structure it costs a scan, and some more."""
    pytest.importorskip("sklearn")
    q, k = vectors(512, 512, 3 if pays else 16)
    rows = ScoreRows.from_vectors(q, k)
    tau = middle_of_a_gap(brute(q, k, True), 0.02)
    scan, found, one = (f.above(rows, tau) for f in (FullScan(), BallTreeIndex(), BallTreeIndex(one_tree=True)))
    if pays:
        assert one.total < found.total < scan.total / 2
    else:
        assert scan.total < found.total < 1.25 * scan.total and 1.5 * scan.total < one.total
    # every key once for its norm; at least once for each level of the tree
    assert one.building >= 512 + 512 * 5 and found.building > one.building


#: Trees that `NaiveTree` stood in for.
BUILT = []


class NaiveTree:
    """Stands in for scikit-learn's: evaluates every distance, and keeps what it was given."""

    def __init__(self, points, leaf_size):
        self.points, self.calls = points, 0
        BUILT.append(self)

    def distances(self, query):
        self.calls += len(self.points)
        return np.linalg.norm(self.points - query, axis=1)

    def query_radius(self, query, r):
        return [np.flatnonzero(self.distances(query) <= r)]

    def get_n_calls(self):
        return self.calls

    def reset_n_calls(self):
        self.calls = 0


def test_the_reduction_and_the_counts_by_a_naive_tree():
    """The lifted keys lie on a sphere, the first keys are cut by binary digits, and each row's cost is known."""
    pytest.importorskip("sklearn")
    BUILT.clear()
    q, k = random_vectors(37, 37, 3)
    scores, rows, index = brute(q, k, True), ScoreRows.from_vectors(q, k), BallTreeIndex(leaf_size=4)
    index._ball_tree = NaiveTree
    found = index.above(rows, 0.0)
    assert found.keys.tolist() == np.nonzero(scores >= 0)[1].tolist() and found.building == 37
    for tree in BUILT:
        radii = np.linalg.norm(tree.points, axis=1)
        assert radii == pytest.approx(np.full(len(radii), radii.max()))
        assert any(np.array_equal(tree.points[:, :3], k[start : start + len(tree.points)]) for start in range(37))
    # [0, 32), [0, 16), [0, 8), [16, 24), and where digits are left below them [0, 4), [8, 12), ..., [32, 36)
    assert sorted(len(tree.points) for tree in BUILT) == [4] * 5 + [8] * 2 + [16, 32]
    for row, size in enumerate(range(1, 38)):
        scanned = size if size <= 4 else size % 4 or size & 4
        verified = int((scores[row, : size - scanned] >= 0).sum())
        assert found.cost[row] == 1 + (size - scanned) + verified + scanned


def test_counts_are_never_taken_for_truth(monkeypatch):
    """A tree that says it did nothing changes what is reported as the cost, and nothing else."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    q, k = clustered_vectors(61, 61, 3)
    rows, tau = ScoreRows.from_vectors(q, k), middle_of_a_gap(brute(q, k, True), 0.1)
    honest = BallTreeIndex(leaf_size=4)
    silent = BallTreeIndex(leaf_size=4)

    class Silent(neighbors.BallTree):
        def get_n_calls(self):
            return 0

    silent._ball_tree = Silent
    for ask in (lambda index: index.above(rows, tau), lambda index: index.largest(rows, 3)):
        ours, theirs = ask(honest), ask(silent)
        assert ours.keys.tolist() == theirs.keys.tolist() and theirs.total < ours.total
        assert theirs.building == 61 < ours.building


def test_a_causal_index_never_looks_at_the_future():
    """Later keys may be anything: neither what an earlier row finds nor what it pays changes."""
    pytest.importorskip("sklearn")
    q, k = random_vectors(48, 48, 3)
    other = k.copy()
    other[30:] *= 100
    for ask in (lambda rows: BallTreeIndex(4).above(rows, 0.5), lambda rows: BallTreeIndex(4).largest(rows, 5)):
        first, second = (ask(ScoreRows.from_vectors(q, keys)) for keys in (k, other))
        assert first.cost[:30].tolist() == second.cost[:30].tolist()
        assert all((first.row(row) == second.row(row)).all() for row in range(30))


# ------------------------------------------------------------------------------------------------------------- quantum


@pytest.mark.parametrize("simulator", QUANTUM.values(), ids=QUANTUM)
@pytest.mark.parametrize("knows", [False, True])
def test_quantum_costs_are_its_calls(simulator, knows):
    scores = np.random.default_rng(2).normal(size=(43, 43))
    finder = QuantumFinder(simulator, knows_number=knows, seed=4)
    found = finder.above(ScoreRows(scores), 1.0)
    assert (found.cost == found.counts.iterations + found.counts.verifications).all() and found.building == 0
    assert found.certified.all() and "known" in finder.name or not knows
    again = finder.above(ScoreRows(scores), 1.0)
    assert again.cost.tolist() == found.cost.tolist()
    assert QuantumFinder(simulator, knows_number=knows, seed=5).above(ScoreRows(scores), 1.0).total != found.total


def test_simulators_find_the_same_at_the_same_price():
    scores = np.random.default_rng(2).normal(size=(43, 43))
    named, counted = (QuantumFinder(kind).above(ScoreRows(scores), 1.0) for kind in (Subspace, Counting))
    assert named.cost.tolist() == counted.cost.tolist() and named.keys.tolist() == counted.keys.tolist()
    # not draw by draw, but in the mean
    exact = np.mean([QuantumFinder(StateVector, seed=s).above(ScoreRows(scores), 1.0).total for s in range(12)])
    assert np.mean([QuantumFinder(Counting, seed=s).above(ScoreRows(scores), 1.0).total for s in range(12)]) == (
        pytest.approx(exact, rel=0.05)
    )


@pytest.mark.parametrize("simulator", QUANTUM.values(), ids=QUANTUM)
def test_misses_are_reported_and_not_mended(simulator):
    """One failure allowed, and an error of 1/2: rows lack keys, and exactly those rows are not certified."""
    scores = np.random.default_rng(3).normal(size=(61, 61))
    rows, truth = ScoreRows(scores), FullScan()
    hasty = QuantumFinder(simulator, Schedule(cap=0.5, failures=1), error=0.5)
    found, expected = hasty.above(rows, 0.8), truth.above(rows, 0.8)
    right = np.array([found.row(row).tolist() == expected.row(row).tolist() for row in range(61)])
    assert (right == found.certified).all() and 0 < right.sum() < 61
    assert all(set(found.row(row)) <= set(expected.row(row)) for row in range(61))
    totals = 0
    for seed in range(8):
        found, expected = QuantumFinder(simulator, error=0.5, seed=seed).largest(rows, 1), truth.largest(rows, 1)
        assert ((found.keys == expected.keys) == found.certified).all()
        totals += found.certified.mean() / 8
    assert 0.5 <= totals < 1


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.neighbors", None)
    with pytest.raises(
        ImportError, match=r"scikit-learn; install it with: pip install 'pennylane-qattn\[index\]'"
    ) as e:
        BallTreeIndex()
    assert "\n" not in str(e.value) and e.value.name == "sklearn"
    assert set(FINDERS) == {"quantum", "scan", "index"}


SQUARE = ScoreRows(np.zeros((5, 5)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FullScan().above(SQUARE, math.nan), "tau must be a number; got NaN"),
        (lambda: QuantumFinder().above(SQUARE, math.nan), "tau must be a number; got NaN"),
        (lambda: FullScan().largest(SQUARE, 0), "k must be between 1 and the number of keys, 5; got 0"),
        (lambda: QuantumFinder().largest(SQUARE, 6), "got 6"),
        (lambda: QuantumFinder(error=1.5), "error must lie between 0 and 1"),
        (lambda: ScoreRows(np.zeros((4, 5))), "causal rows need one key each; got 4 rows and 5 keys"),
        (lambda: ScoreRows(np.zeros((0, 5)), causal=False), "at least one row and one key"),
        (lambda: ScoreRows(np.array([[math.nan]])), "scores must be finite"),
        (lambda: ScoreRows(np.array([[0.0, 1.0], [-math.inf, 1.0]])), "scores must be finite"),
        (lambda: ScoreRows.from_vectors(np.ones((2, 3)), np.full((2, 3), 1e101)), "keys must be finite and below"),
        (lambda: ScoreRows.from_vectors(np.full((2, 3), math.inf), np.ones((2, 3))), "queries must be finite"),
        (lambda: ScoreRows.from_vectors(np.ones((2, 3)), np.ones((2, 3)), scale=0.0), "scale must be positive"),
        (lambda: ScoreRows.from_vectors(np.ones((2, 3)), np.ones((2, 3)), scale=math.nan), "scale must be positive"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bad_leaf_size():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="leaf_size must be at least 1"):
        BallTreeIndex(leaf_size=0)


# --- from a search to attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("finder", [FullScan(), QuantumFinder(seed=3), QuantumFinder(Counting, seed=4)])
@pytest.mark.parametrize("causal", [True, False])
def test_what_a_search_finds_becomes_attention_within_its_bound(finder, causal):
    rng = np.random.default_rng(8)
    q, k, v = (torch.from_numpy(rng.normal(size=(61, 7))) for _ in range(3))
    tau = 1.0
    found = finder.above(ScoreRows.from_vectors(q, k, causal=causal), tau)
    scores = DotProductScores(q, k, is_causal=causal)
    operator = SparseAttention(scores, found.support(), midrange_shift(scores, found.support()))
    assert operator.support.sizes.tolist() == np.diff(found.offsets).tolist()
    dense = (q @ k.T) / 7**0.5
    allowed = torch.ones(61, 61, dtype=torch.bool).tril() if causal else torch.ones(61, 61, dtype=torch.bool)
    exact = dense.masked_fill(~allowed, float("-inf")).softmax(-1)
    certificate = bound(operator, tau=tau)
    error = (operator.to_dense(normalised=True) - exact).abs().sum(-1)
    torch.testing.assert_close(error, certificate.true_l1, rtol=0, atol=1e-12)
    assert (error <= certificate.l1 + 1e-12).all()
    assert (operator.attend(v) - exact @ v).abs().max() <= certificate.output(v, scores).max() + 1e-12
    marked = (dense >= tau) & allowed
    if finder.exact:
        assert torch.equal(operator.support.dense(slice(None), 61), marked)
    assert not (operator.support.dense(slice(None), 61) & ~marked).any()  # every key was verified
