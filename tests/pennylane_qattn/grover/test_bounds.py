import math

import pytest
import torch

from pennylane_qattn.grover.bounds import (
    THEOREMS,
    bound,
    bounds_of_scores,
    goodness,
    goodness_table,
    t1_bound,
    t1_one_sided_bound,
    t2_bound,
    value_range,
)
from pennylane_qattn.grover.sparse import SparseAttention
from pennylane_qattn.grover.support import (
    DenseScores,
    DotProductScores,
    Support,
    midrange_shift,
    threshold_support,
    top_support,
)

FORMS = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
#: What rounding may add to a true error in float64.
ROUNDING = 1e-13
#: As many instances, each of all its rows.
INSTANCES = 1000


def instances(rng, spread, keys=23, width=3, dtype=torch.float64):
    """Queries and keys of many instances, of spreads from nearly flat to wild."""
    q, k = (torch.randn(INSTANCES, keys, width, generator=rng, dtype=dtype) for _ in range(2))
    spreads = spread * torch.rand(INSTANCES, 1, 1, generator=rng, dtype=dtype)
    return spreads * q, k


def exact(s, is_causal):
    """Exact attention and the mask of allowed keys, by torch alone."""
    allowed = torch.ones(s.shape[-2:], dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    return s.masked_fill(~allowed, -math.inf).softmax(-1), allowed


def row_errors(scores, attention, is_causal):
    p, _ = exact(scores.block(slice(None)), is_causal)
    q = attention.to_dense(normalised=True)
    return p, q, (p - q).abs().sum(-1)


def check(found, p, q, true, v, attention):
    assert (found.true_l1 - true).abs().max() <= 1e-12
    assert (true <= found.l1 + ROUNDING).all()
    assert ((p - q).abs().amax(-1) <= found.entrywise + ROUNDING).all()
    assert ((found.true_entrywise - (p - q).abs().amax(-1)).abs() <= 1e-12).all()
    assert (found.true_ratio <= found.ratio + ROUNDING * (1 + found.true_ratio)).all()
    errors = (p @ v - attention.attend(v)).abs()
    assert (errors <= found.output(v, attention.scores) + 1e-12).all()


@FORMS
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("shifted", [True, False])
def test_t1_holds_on_a_thousand_instances(is_causal, spread, shifted, rng):
    q, k = instances(rng, spread)
    v = torch.randn(INSTANCES, 23, 2, generator=rng, dtype=q.dtype)
    scores = DotProductScores(q, k, is_causal=is_causal)
    taus = torch.rand(INSTANCES, 1, generator=rng, dtype=q.dtype)
    support = threshold_support(scores, taus)
    shift = midrange_shift(scores, support) if shifted else None
    attention = SparseAttention(scores, support, shift)
    p, b, true = row_errors(scores, attention, is_causal)
    found = bound(attention)
    check(found, p, b, true, v, attention)
    # Both forms of T1, from eta and beta worked out afresh.
    s = scores.block(slice(None))
    x = s if shift is None else s - shift[..., None]
    off = exact(s, is_causal)[1] & (s < taus[..., None])
    eta = x.abs().masked_fill(~off, 0).amax(-1)
    beta = off.sum(-1) / attention.row_sums()
    assert (found.eta - eta).abs().max() <= 1e-12 and (found.beta - beta).abs().max() <= 1e-12
    assert (true <= 2 * (eta / 2).tanh() + ROUNDING).all()
    assert (true <= 2 * beta * eta.expm1() + ROUNDING).all()
    t1 = t1_bound(eta, beta)
    assert (found.l1 <= t1 + ROUNDING).all() and (t1 <= eta + ROUNDING).all()
    assert set(found.count()) <= {"T1", "T1'"} and sum(found.count().values()) == INSTANCES * 23
    is_t1 = found.theorem == THEOREMS.index("T1")
    assert is_t1.any() and (found.l1 - t1)[is_t1].abs().max() <= ROUNDING
    # The bound says something: half of the rows come within a factor of 20.
    wrong = true > 1e-6
    assert (found.l1 / true)[wrong].median() < 20


@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0])
def test_t1_is_attained_by_the_extremal_row(eta):
    # Nothing kept; a fraction 1/(1 + e^eta) of the row at +eta, the rest at -eta.
    n = 4999
    high = round(n / (1 + math.exp(eta)))
    k = torch.full((n, 1), -eta, dtype=torch.float64)
    k[:high] = eta
    scores = DotProductScores(torch.ones(1, 1, dtype=torch.float64), k)
    nothing = Support(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool))
    found = bound(SparseAttention(scores, nothing))
    assert found.l1.item() == pytest.approx(2 * math.tanh(eta / 2), rel=1e-14)
    assert 0.9999 <= (found.true_l1 / found.l1).item() <= 1 + 1e-12
    # Entrywise the bound is reached by one key that holds all of the plus side.
    if eta == 0.5:
        weights = torch.tensor([1 / (1 + math.exp(eta)), 1 / (1 + math.exp(-eta))], dtype=torch.float64)
        p = weights * torch.tensor([eta, -eta], dtype=torch.float64).exp()
        assert (p / p.sum() - weights)[0].item() == pytest.approx(math.tanh(eta / 2), rel=1e-14)


@FORMS
def test_one_sided_t1_holds_on_a_thousand_instances(is_causal, rng):
    q, k = instances(rng, 12.0)
    scores = DotProductScores(q, k, is_causal=is_causal)
    support = threshold_support(scores, 0.4)
    attention = SparseAttention(scores, support)
    p, b, true = row_errors(scores, attention, is_causal)
    s = scores.block(slice(None))
    off = exact(s, is_causal)[1] & (s < 0.4)
    above = s.masked_fill(~off, -math.inf).amax(-1)
    beta = off.sum(-1) / attention.row_sums()
    one_sided = t1_one_sided_bound(above, beta)
    assert (true <= one_sided + ROUNDING).all()
    found = bound(attention)
    check(found, p, b, true, torch.randn(INSTANCES, 23, 2, generator=rng, dtype=q.dtype), attention)
    # Far below the threshold T1 says nothing, and here T1' does.
    is_one_sided = found.theorem == THEOREMS.index("T1'")
    assert is_one_sided.sum() > 100
    assert (found.l1 - one_sided)[is_one_sided].abs().max() <= ROUNDING
    assert (one_sided < t1_bound(found.eta, beta))[is_one_sided].all()


@FORMS
@pytest.mark.parametrize("order", [1, 2])
def test_keys_that_a_search_missed_cost_their_term(is_causal, order, rng):
    q, k = instances(rng, 2.0)
    if order == 2:  # scores above -1, so that no background is negative
        q, k = q.clamp(-0.5, 0.5), k.clamp(-1, 1)
    scores = DotProductScores(q, k, is_causal=is_causal)
    tau = 0.2
    whole = threshold_support(scores, tau)
    found_by_search = torch.rand(whole.mask.shape, generator=rng) > 0.2
    support = Support(whole.indices, whole.mask & found_by_search)
    attention = SparseAttention(scores, support, order=order)
    p, b, true = row_errors(scores, attention, is_causal)
    s = scores.block(slice(None))
    allowed = exact(s, is_causal)[1]
    kept = support.dense(slice(None), 23)
    missed, rest = allowed & ~kept & (s >= tau), allowed & ~kept & (s < tau)
    assert missed.any(-1).double().mean() > 0.1
    z = attention.row_sums()
    background = 1 + s if order == 2 else 1
    term = 2 * (s.exp() - background).masked_fill(~missed, 0).sum(-1) / z
    eta = s.abs().masked_fill(~rest, 0).amax(-1)
    most = eta.expm1() - (eta if order == 2 else 0)
    with_term = 2 * rest.sum(-1) / z * most + term
    assert (true <= with_term + ROUNDING).all()
    found, without = bound(attention, tau=tau), bound(attention)
    check(found, p, b, true, torch.randn(INSTANCES, 23, 2, generator=rng, dtype=q.dtype), attention)
    assert (found.l1 <= with_term + ROUNDING).all() and (found.l1 <= without.l1).all()
    named = found.theorem == THEOREMS.index("T1 missed" if order == 1 else "T2' missed")
    assert named.sum() > 100 and (found.l1 - with_term)[named].abs().max() <= 1e-12
    assert without.true_l1.equal(found.true_l1)


@FORMS
def test_t2_holds_on_a_thousand_instances(is_causal, rng):
    q, k = instances(rng, 0.9)
    v = torch.randn(INSTANCES, 23, 2, generator=rng, dtype=q.dtype)
    scores = DotProductScores(q, k, is_causal=is_causal)
    support = threshold_support(scores, 0.4)
    shift = midrange_shift(scores, support)
    attention = SparseAttention(scores, support, shift, order=2)
    first = SparseAttention(scores, support, shift)
    s = scores.block(slice(None))
    x = s - shift[..., None]
    off = exact(s, is_causal)[1] & (s < 0.4)
    eta = x.abs().masked_fill(~off, 0).amax(-1)
    small = eta < 1
    assert 0.5 < small.double().mean() < 1 or small.all()
    p, b, true = row_errors(scores, attention, is_causal)
    h = -(1 - eta[small]).log() - eta[small]
    assert (true[small] <= 2 * (h / 4).tanh() + ROUNDING).all() and (true[small] <= h / 2 + ROUNDING).all()
    assert (t2_bound(eta[small]) - 2 * (h / 4).tanh()).abs().max() <= 1e-12
    found = bound(attention)
    check(found, p, b, true, v, attention)
    assert found.count().keys() == {"T2", "T2'"}
    assert found.l1.isfinite().all()
    # Second order where first order is small
    flat = (eta > 1e-3) & (eta < 0.1)
    assert found.l1[flat].sum() < 0.2 * bound(first).l1[flat].sum()


def test_t2_is_attained_where_the_background_is_at_its_edge():
    # Keys at -eta have e^x/(1 + x) = e^h, keys at 0 have 1; weights of B as T2's proof wants them.
    eta, n = 0.6, 9973
    h = -math.log(1 - eta) - eta
    # Q of the keys at -eta is 1/(1 + e^{h/2}), each weighs 1 - eta
    share = 1 / (1 + math.exp(h / 2))
    low = round(n * share / (share + (1 - share) * (1 - eta)))
    k = torch.zeros(n, 1, dtype=torch.float64)
    k[:low] = -eta
    scores = DotProductScores(torch.ones(1, 1, dtype=torch.float64), k)
    nothing = Support(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool))
    found = bound(SparseAttention(scores, nothing, order=2))
    assert found.count() == {"T2": 1}
    assert 0.9999 <= (found.true_l1 / found.l1).item() <= 1 + 1e-12


def test_ones_off_the_support_and_not_zeros(rng):
    """The example of n = 64, k = 4, tau = 3, eta = 0.1."""
    x = 0.2 * torch.rand(200, 64, generator=rng, dtype=torch.float64) - 0.1
    x[:, :4] = 3 + 0.25 * torch.rand(200, 4, generator=rng, dtype=torch.float64)
    scores = DotProductScores(torch.ones(1, 1, dtype=torch.float64).expand(200, 1, 1), x[..., None])
    support = threshold_support(scores, 3.0)
    assert support.sizes.eq(4).all()
    attention = SparseAttention(scores, support)
    p = x.exp() / x.exp().sum(-1, keepdim=True)
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    ones[:, :4] = zeros[:, :4] = x[:, :4].exp()
    with_ones, with_zeros = ((p - b / b.sum(-1, keepdim=True)).abs().sum(-1) for b in (ones, zeros))
    found = bound(attention)
    assert (found.true_l1[:, 0] - with_ones).abs().max() <= 1e-14
    assert (with_zeros - 2 * p[:, 4:].sum(-1)).abs().max() <= 1e-14  # all that is left out, twice
    assert 0.01 < with_ones.mean() < 0.03 and 0.75 < with_zeros.mean() < 0.85
    assert (with_ones <= found.l1[:, 0]).all() and (found.l1 <= 0.1).all() and (with_zeros > 0.7).all()


def test_bounds_of_what_is_exact_and_of_what_overflows(rng):
    q, k = (torch.randn(11, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    scores = DotProductScores(q, k)
    for order in (1, 2):
        found = bound(SparseAttention(scores, threshold_support(scores, -math.inf), order=order))
        assert found.l1.eq(0).all() and found.true_l1.max() <= 1e-15 and found.eta.eq(0).all()
        assert found.true_ratio.max() <= 1e-14
    wild = DotProductScores(1e4 * q, k)
    found = bound(SparseAttention(wild, top_support(wild, 3)), tau=1.0)
    for values in (found.l1, found.true_l1, found.entrywise, found.true_entrywise):
        assert values.isfinite().all() and (values >= 0).all()
    assert (found.true_l1 <= found.l1 + ROUNDING).all() and (found.l1 <= 2).all()


def test_rows_that_see_nothing_have_no_error(rng):
    q, k, v = (torch.randn(1, 7, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    visible = torch.tensor([[False, False, True, True, False, True, True]])
    scores = DotProductScores(q, k, visible=visible)
    attention = SparseAttention(scores, top_support(scores, 1))
    found = bound(attention)
    assert found.l1[0, :3].eq(0).all() and found.true_l1[0, :3].eq(0).all() and found.l1[0, 6] > 0
    spread = value_range(v, scores)
    assert spread[0, :3].eq(0).all()
    seen = v[0, [2, 3, 5]]
    assert spread[0, 5].equal(seen.amax(0) - seen.amin(0))
    assert goodness(scores, 0.1)[0].rows == 5


@FORMS
def test_goodness_by_head(is_causal, rng, monkeypatch):
    from pennylane_qattn.grover import support

    monkeypatch.setattr(support, "SCORE_ELEMENTS", 2 * 3 * 17 * 4)
    s = torch.randn(2, 3, 17, 17, generator=rng, dtype=torch.float64) * torch.tensor([0.2, 1.0, 3.0])[:, None, None]
    reports = goodness(DenseScores(s, is_causal=is_causal), 0.25)
    assert [report.head for report in reports] == [0, 1, 2]
    _, allowed = exact(s, is_causal)
    for head, report in enumerate(reports):
        rows = s[:, head].flatten(0, 1)
        seen = allowed.repeat(2, 1)
        sizes, etas, kept_x = [], [], []
        for row, mask in zip(rows, seen, strict=True):
            row = row[mask]
            kept, rest = row[row >= 0.25], row[row < 0.25]
            sizes.append(len(kept))
            middle = (rest.min() + rest.max()) / 2 if len(rest) else 0.0
            etas.append(float((rest - middle).abs().max()) if len(rest) else 0.0)
            kept_x += (kept - middle).tolist()
        assert (report.rows, report.keys, report.k_max) == (34, 17, max(sizes))
        assert report.k_mean == pytest.approx(sum(sizes) / 34)
        assert report.k_median == sorted(sizes)[16] and report.k_90 == sorted(sizes)[30]
        assert report.eta_max == pytest.approx(max(etas)) and report.eta_mean == pytest.approx(sum(etas) / 34)
        assert report.eta_90 == pytest.approx(sorted(etas)[30])
        assert report.flat == pytest.approx(sum(eta < 1 for eta in etas) / 34)
        assert report.tau_shifted == pytest.approx(min(kept_x))
        assert 0 < report.error_mean <= report.bound_mean and report.error_max <= report.bound_max
        found = bounds_of_scores(
            DenseScores(s[:, head], is_causal=is_causal),
            (support := threshold_support(DenseScores(s[:, head], is_causal=is_causal), 0.25)),
            midrange_shift(DenseScores(s[:, head], is_causal=is_causal), support),
        )
        assert report.error_max == pytest.approx(found.true_l1.max().item())
    table = goodness_table(reports).splitlines()
    assert len(table) == 4 and table[0].split()[:4] == ["head", "rows", "keys", "tau"]
    assert len({len(line) for line in table}) == 1 and table[3].split()[0] == "2"
    assert reports[0].as_dict()["k_max"] == reports[0].k_max and str(reports[0]).count("\n") == 1
    assert len(goodness(DenseScores(s[0, 0], is_causal=is_causal), 0.25)) == 1
    unshifted = goodness(DenseScores(s, is_causal=is_causal), 0.25, shifted=False)
    assert all(one.eta_max <= other.eta_max for one, other in zip(reports, unshifted, strict=True))


def test_scores_in_single_precision_give_the_same_bounds(rng):
    q, k = (torch.randn(2, 31, 4, generator=rng) for _ in range(2))
    single, double = DotProductScores(q, k), DotProductScores(q.double(), k.double())
    support = top_support(double, 5)
    a, b = (bound(SparseAttention(s, support, midrange_shift(s, support))) for s in (single, double))
    assert (a.true_l1 - b.true_l1).abs().max() <= 1e-5 and (a.l1 - b.l1).abs().max() <= 1e-5
    assert (a.true_l1 <= a.l1 + ROUNDING).all()
    assert "T1" in str(a)


def test_bad_input_is_refused_in_one_line(rng):
    q, k = (torch.randn(5, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    scores = DotProductScores(q, k)
    support = top_support(scores, 1)
    one, half = torch.tensor([0.3, 1.0]), torch.tensor([0.5, 0.5])
    hidden = DotProductScores(q[None], k[None], visible=torch.zeros(1, 5, dtype=torch.bool))
    refused = [
        (lambda: t2_bound(one), "T2 needs eta < 1; got 1"),
        (lambda: t2_bound(-one), "eta must be a number of at least 0"),
        (lambda: t1_bound(-one), "eta must be a number of at least 0"),
        (lambda: t1_bound(torch.tensor([math.nan])), "eta must be a number"),
        (lambda: t1_one_sided_bound(torch.tensor([0.1, math.nan]), half), "eta must be a number"),
        (lambda: bounds_of_scores(scores, support, order=3), "order must be 1"),
        (lambda: bounds_of_scores(scores, support, tau=math.nan), "tau must be a number"),
        (lambda: goodness(scores, math.nan), "tau must be a number"),
        (lambda: goodness(hidden, 0.1), "head 0 has no row that sees a key"),
        (lambda: bounds_of_scores(DenseScores(scores.block(slice(None))[:3, :3]), support), "must have the rows"),
        (
            lambda: bounds_of_scores(scores, support, torch.full((5,), 50.0, dtype=q.dtype), order=2),
            "row sums of order 2 must be positive",
        ),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
