import math

import pytest
import torch
from largest_tensor import LargestTensor

from pennylane_qattn.grover import products
from pennylane_qattn.grover import support as support_module
from pennylane_qattn.grover.products import causal_linear_attention, prefix_sums
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
ORDERS = pytest.mark.parametrize("order", [1, 2])


def factors(rng, *batch, queries=None, keys=23, width=5, features=7, spread=1.0, dtype=torch.float64):
    def draw(tokens, size):
        return torch.randn(*batch, tokens, size, generator=rng, dtype=torch.float64).to(dtype)

    return spread * draw(queries or keys, width), spread * draw(keys, width), draw(keys, features)


def dense(scores, q, k, support, shift, order):
    """`B` entry by entry from its definition, with nothing of the structure; differentiable."""
    queries, keys = q.shape[-2], k.shape[-2]
    x = scores.scale * torch.einsum("...id,...jd->...ij", q, k)
    if shift is not None:
        x = x - shift[..., None]
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if scores.is_causal:
        allowed = allowed.tril(keys - queries)
    if scores.visible is not None:
        allowed = allowed & scores.visible[..., None, :]
    kept = torch.zeros(*q.shape[:-1], keys, dtype=torch.bool)
    for place in range(support.indices.shape[-1]):
        here = torch.nn.functional.one_hot(support.indices[..., place], keys).bool()
        kept = kept | (here & support.mask[..., place, None])
    background = torch.ones_like(x) if order == 1 else 1 + x
    return torch.where(kept, x.exp(), torch.where(allowed, background, torch.zeros_like(x)))


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@FORMS
@ORDERS
@pytest.mark.parametrize("build", ["threshold", "top"])
def test_structure_agrees_with_the_dense_operator_at_257_tokens(is_causal, order, build, rng):
    q, k, v = factors(rng, 2, 3, keys=257, width=11, features=13)
    scores = DotProductScores(q, k, is_causal=is_causal)
    support = threshold_support(scores, 1.5) if build == "threshold" else top_support(scores, 17)
    shift = midrange_shift(scores, support)
    if order == 2:  # midranges of wide backgrounds may leave sums of 1 + x below zero
        shift = shift - 3
    attention = SparseAttention(scores, support, shift, order=order)
    b = dense(scores, q, k, support, shift, order)
    assert relative(attention.to_dense(), b) <= 1e-13
    assert relative(attention.matmul(v), b @ v) <= 1e-12
    assert relative(attention @ v, b @ v) <= 1e-12
    assert relative(attention.row_sums(), b.sum(-1)) <= 1e-12
    p = b / b.sum(-1, keepdim=True)
    assert (attention.attend(v) - p @ v).abs().max() <= 1e-12
    assert (attention.to_dense(normalised=True) - p).abs().max() <= 1e-13


@FORMS
@ORDERS
def test_single_precision(is_causal, order, dtype, close, rng):
    q, k, v = factors(rng, 3, keys=101, spread=0.5)
    support = top_support(DotProductScores(q, k, is_causal=is_causal), 7)
    scores = DotProductScores(q, k, is_causal=is_causal)
    b = dense(scores, q, k, support, None, order)
    attention = SparseAttention(DotProductScores(q.to(dtype), k.to(dtype), is_causal=is_causal), support, order=order)
    close(attention.attend(v.to(dtype)), (b / b.sum(-1, keepdim=True)) @ v, factor=10)


@ORDERS
def test_fewer_queries_than_keys_are_the_last_ones(order, rng):
    q, k, v = factors(rng, 2, keys=211, spread=0.5)
    scores = DotProductScores(q, k)
    support = top_support(scores, 5)
    every = SparseAttention(scores, support, midrange_shift(scores, support), order=order).attend(v)
    for queries in (1, 83):
        some = DotProductScores(q[:, -queries:], k)
        found = top_support(some, 5)
        last = SparseAttention(some, found, midrange_shift(some, found), order=order).attend(v)
        assert (last - every[:, -queries:]).abs().max() <= 1e-12


@FORMS
@ORDERS
def test_invisible_keys_are_as_if_they_were_not_there(is_causal, order, rng):
    q, k, v = factors(rng, 2, keys=41, spread=0.5)
    visible = torch.ones(2, 41, dtype=torch.bool)
    visible[0, :13] = False
    padded = DotProductScores(q, k, is_causal=is_causal, visible=visible)
    support = top_support(padded, 4)
    attention = SparseAttention(padded, support, order=order)
    out = attention.attend(v)
    short = DotProductScores(q[:1, 13:], k[:1, 13:], is_causal=is_causal)
    expected = SparseAttention(short, top_support(short, 4), order=order).attend(v[:1, 13:])
    assert (out[:1, 13:] - expected).abs().max() <= 1e-12
    b = dense(padded, q, k, support, None, order)
    assert relative(attention.matmul(v), b @ v) <= 1e-12
    if is_causal:  # rows that see nothing
        assert out[0, :13].eq(0).all() and attention.row_sums()[0, :13].eq(0).all()


@pytest.mark.parametrize("elements", [1, 150, 2**20])
@FORMS
def test_builders_find_what_a_look_at_all_scores_finds(elements, is_causal, rng, monkeypatch):
    monkeypatch.setattr(support_module, "SCORE_ELEMENTS", elements)
    q, k, _ = factors(rng, 2, 3, keys=17, spread=2.0)
    scores = DotProductScores(q, k, 0.7, is_causal=is_causal)
    s = 0.7 * q @ k.mT
    allowed = torch.ones(17, 17, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    marked = allowed & (s >= 0.3)
    support = threshold_support(scores, 0.3)
    assert support.dense(slice(None), 17).equal(marked)
    assert support.sizes.equal(marked.sum(-1)) and support.indices.shape[-1] == marked.sum(-1).max()
    assert threshold_support(DenseScores(s, is_causal=is_causal), 0.3).dense(slice(None), 17).equal(marked)
    per_head = torch.tensor([0.1, 0.9, 2.0], dtype=s.dtype)[:, None]
    by_head = threshold_support(scores, per_head).dense(slice(None), 17)
    assert by_head.equal(allowed & (s >= per_head[..., None]))
    top = top_support(scores, 5)
    rank = s.masked_fill(~allowed, -math.inf).argsort(-1, descending=True).argsort(-1)
    assert top.dense(slice(None), 17).equal(allowed & (rank < 5))
    rest = allowed & ~marked
    shift = midrange_shift(scores, support)
    x = s - shift[..., None]
    low, high = x.masked_fill(~rest, math.inf).amin(-1), x.masked_fill(~rest, -math.inf).amax(-1)
    some = rest.any(-1)
    assert (low + high)[some].abs().max() <= 1e-12 and shift[~some].eq(0).all()


@FORMS
@ORDERS
@pytest.mark.parametrize("method", ["attend", "matmul", "row_sums"])
def test_gradients_are_those_of_the_dense_formula(is_causal, order, method, rng):
    q, k, v = (t.requires_grad_() for t in factors(rng, 2, 3, queries=131, keys=149, spread=0.6))
    visible = torch.rand(2, 3, 149, generator=rng) > 0.1
    visible[..., 0] = True
    scores = DotProductScores(q, k, is_causal=is_causal, visible=visible)
    support = threshold_support(scores, 0.5)
    shift = midrange_shift(scores, support) - 0.5
    attention = SparseAttention(scores, support, shift, order=order)
    b = dense(scores, q, k, support, shift, order)
    ours, expected, inputs = {
        "attend": lambda: (attention.attend(v), (b / b.sum(-1, keepdim=True)) @ v, (q, k, v)),
        "matmul": lambda: (attention.matmul(v), b @ v, (q, k, v)),
        "row_sums": lambda: (attention.row_sums(), b.sum(-1), (q, k)),
    }[method]()
    upstream = torch.randn(ours.shape, generator=rng, dtype=ours.dtype)
    found = torch.autograd.grad(ours, inputs, upstream)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert relative(gradient, wanted) <= 1e-10


@FORMS
@ORDERS
def test_derivatives_twice(is_causal, order, rng, monkeypatch):
    monkeypatch.setattr(products, "CHUNK", 2)
    q, k, v = (t.requires_grad_() for t in factors(rng, 2, queries=3, keys=4, width=2, features=1, spread=0.5))
    support = top_support(DotProductScores(q, k, is_causal=is_causal), 2)

    def out(q, k, v):
        return SparseAttention(DotProductScores(q, k, is_causal=is_causal), support, order=order).attend(v)

    assert torch.autograd.gradcheck(out, (q, k, v))
    assert torch.autograd.gradgradcheck(out, (q, k, v))


@ORDERS
def test_torch_func_sees_the_same_function(order, rng):
    q, k, v = factors(rng, keys=7, spread=0.5)
    support = top_support(DotProductScores(q, k), 3)

    def out(q):
        return SparseAttention(DotProductScores(q, k), support, order=order).attend(v)

    plain = torch.autograd.functional.jacobian(out, q)
    torch.testing.assert_close(torch.func.jacrev(out)(q), plain)
    torch.testing.assert_close(out(q), SparseAttention(DotProductScores(q, k), support, order=order).attend(v))


def test_gathering_in_blocks_gives_the_same_dots(rng, monkeypatch):
    """Devices other than a CPU take this way."""
    q, k, _ = factors(rng, 2, keys=19)
    support = threshold_support(DotProductScores(q, k), 0.4)
    pattern = products.Pattern(support, 19)
    expected = (q @ k.mT).gather(-1, support.indices).masked_fill(~support.mask, 0.0).flatten(0, 1)
    for elements in (1, 200, 2**20):
        monkeypatch.setattr(products, "GATHER_ELEMENTS", elements)
        for dots in (products._dots_by_gathering, products._dots_by_kernel):
            assert (dots(q.flatten(0, 1), k.flatten(0, 1), pattern) - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 191])
def test_prefix_sums_and_linear_attention_at_the_edges_of_chunks(tokens, rng):
    q, k, v = factors(rng, 2, keys=tokens)
    assert (prefix_sums(v) - v.cumsum(-2)).abs().max() <= 1e-13
    for queries in {1, tokens}:
        expected = torch.einsum("bid,bjd->bij", q[:, -queries:], k).tril(tokens - queries) @ v
        assert relative(causal_linear_attention(q[:, -queries:], k, v), expected) <= 1e-12


@ORDERS
@pytest.mark.parametrize("method", ["attend", "matmul"])
def test_later_tokens_change_nothing_earlier(order, method, rng):
    q, k, v = factors(rng, 2, keys=151, dtype=torch.float32, spread=0.5)
    support = top_support(DotProductScores(q, k), 6)

    def out(q, k, v, order=order):
        scores = DotProductScores(q, k)
        found = top_support(scores, 6)
        return getattr(SparseAttention(scores, found, midrange_shift(scores, found), order=order), method)(v), found

    before, _ = out(q, k, v)
    for cut in (1, 70, 150):
        q2, k2, v2 = q.clone(), k.clone(), v.clone()
        for t in (q2, k2, v2):
            t[:, cut:] = 0.3 * torch.randn(t[:, cut:].shape, generator=rng)
        v2[:, cut:] *= 1e6
        after, found = out(q2, k2, v2)
        assert after[:, :cut].equal(before[:, :cut])
        assert not after[:, cut:].equal(before[:, cut:])
        assert found.indices[:, :cut].equal(support.indices[:, :cut])


@FORMS
@ORDERS
def test_no_square_of_tokens_is_ever_made_forwards_or_backwards(is_causal, order, rng, monkeypatch):
    n, kept, width = 2048, 8, 16
    q, k, v = (
        t.requires_grad_() for t in factors(rng, keys=n, width=width, features=width, dtype=torch.float32, spread=0.3)
    )
    scores = DotProductScores(q, k, is_causal=is_causal)
    monkeypatch.setattr(support_module, "SCORE_ELEMENTS", 2**15)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        with LargestTensor() as seen:
            support = top_support(scores, kept)
            shift = midrange_shift(scores, support)
            SparseAttention(scores, support, shift, order=order).attend(v).square().sum().backward()
    # n x d = n x 2k, and gathered keys would be n x k x d
    assert seen.numbers <= n * 2 * width and max(saved) <= n * width
    assert sum(saved) <= 30 * n * width
    assert q.grad.abs().sum() > 0 and k.grad.abs().sum() > 0 and v.grad.abs().sum() > 0


def grads_are_finite(attention, *inputs):
    v = inputs[-1]
    out = attention.attend(v)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), inputs))
    return out


@FORMS
@ORDERS
def test_large_scores_neither_overflow_nor_vanish(is_causal, order, dtype, rng):
    q, k, v = (t.requires_grad_() for t in factors(rng, 2, keys=37, spread=30.0, dtype=dtype))
    scores = DotProductScores(q, k, is_causal=is_causal)
    assert scores.block(slice(None)).abs().max() > 700
    # with a shift that takes the background above -1 every row sum of order 2 is positive
    support = top_support(scores, 5)
    lowest = scores.block(slice(None)).detach().amin(-1)
    out = grads_are_finite(SparseAttention(scores, support, lowest, order=order), q, k, v)
    best = scores.block(slice(None)).masked_fill(~scores.allowed(slice(None)), -math.inf)
    # softmax of such scores is nearly the greatest of them
    assert ((best.softmax(-1) @ v) - out).abs().max() <= 0.05


@ORDERS
def test_rows_of_one_key_of_none_kept_and_of_all_kept(order, rng):
    q, k, v = (t.requires_grad_() for t in factors(rng, 2, keys=11, spread=0.3))
    scores = DotProductScores(q, k)
    nothing = Support(torch.zeros(2, 11, 1, dtype=torch.long), torch.zeros(2, 11, 1, dtype=torch.bool))
    out = grads_are_finite(SparseAttention(scores, nothing, order=order), q, k, v) if order == 2 else None
    flat = SparseAttention(scores, nothing).attend(v)
    assert (flat - v.cumsum(-2) / torch.arange(1, 12)[:, None]).abs().max() <= 1e-14  # uniform
    assert (flat[:, 0] - v[:, 0]).abs().max() <= 1e-15
    assert out is None or (out - flat).abs().max() > 1e-3
    everything = threshold_support(scores, -math.inf)
    exact = scores.block(slice(None)).masked_fill(~scores.allowed(slice(None)), -math.inf).softmax(-1) @ v
    for shift in (0.0, -900.0, 900.0):  # the shift cancels, and neither e^900 nor e^-900 is met
        attention = SparseAttention(scores, everything, torch.full((2, 11), shift, dtype=v.dtype), order=order)
        assert (grads_are_finite(attention, q, k, v) - exact).abs().max() <= 1e-12


def test_a_case_worked_out_by_hand():
    # Row 2 of three: scores ln 4, 0.5, 0.25, of which the first is kept.
    q = torch.tensor([[1.0], [1.0], [1.0]], dtype=torch.float64)
    k = torch.tensor([[math.log(4)], [0.5], [0.25]], dtype=torch.float64)
    v = torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64)
    support = Support(torch.zeros(3, 1, dtype=torch.long), torch.tensor([[False], [False], [True]]))
    scores = DotProductScores(q, k)
    b1, b2 = (SparseAttention(scores, support, order=order) for order in (1, 2))
    assert b1.matmul(v)[2].item() == pytest.approx(4 + 10 + 100, rel=1e-14)
    assert b1.row_sums().tolist() == pytest.approx([1, 2, 6], rel=1e-14)
    assert b2.matmul(v)[2].item() == pytest.approx(4 + 15 + 125, rel=1e-14)
    assert b2.row_sums().tolist() == pytest.approx([1 + math.log(4), 2.5 + math.log(4), 6.75], rel=1e-14)
    assert b2.attend(v)[2].item() == pytest.approx(144 / 6.75, rel=1e-14)


def test_no_gradient_passes_the_shift(rng):
    q, k, v = factors(rng, keys=13)
    scores = DotProductScores(q, k)
    shift = torch.randn(13, dtype=q.dtype, generator=rng).requires_grad_()
    out = SparseAttention(scores, top_support(scores, 2), shift).attend(v)
    assert not out.requires_grad


def one_row(indices, mask=None):
    indices = torch.tensor([indices])
    return Support(indices, torch.ones_like(indices, dtype=torch.bool) if mask is None else torch.tensor([mask]))


def test_bad_input_is_refused_in_one_line(rng):
    q, k, v = factors(rng, keys=5)
    scores = DotProductScores(q, k)
    support = top_support(scores, 2)
    last = DotProductScores(q[-1:], k)
    ahead = Support(torch.tensor([[0], [2], [0], [0], [0]]), torch.ones(5, 1, dtype=torch.bool))
    far_below = SparseAttention(scores, support, torch.full((5,), 50.0, dtype=q.dtype), order=2)
    visible = torch.tensor([True, True, True, False, True])
    refused = [
        (lambda: threshold_support(scores, math.nan), "tau must be a number"),
        (lambda: top_support(scores, 0), "k must lie between 1 and the number of keys 5; got 0"),
        (lambda: top_support(scores, 6), "k must lie between 1 and the number of keys 5; got 6"),
        (lambda: DotProductScores(q, k, math.inf), "scale must be finite"),
        (lambda: DotProductScores(q, k, math.nan), "scale must be finite"),
        (lambda: DotProductScores(q, k.float()), "q and k must both be float32"),
        (lambda: DotProductScores(q.half(), k.half()), "q and k must both be float32"),
        (lambda: DotProductScores(q, k[:3]), "causal queries must be no more than the keys; got 5 and 3"),
        (lambda: SparseAttention(scores, support, order=3), "order must be 1"),
        (lambda: SparseAttention(scores, support, order=0), "order must be 1"),
        (lambda: SparseAttention(scores, ahead), "a future key"),
        (lambda: SparseAttention(last, one_row([5])), "below the number of keys 5; got 5"),
        (lambda: SparseAttention(last, support), "must have the rows of its scores"),
        (lambda: SparseAttention(DotProductScores(q[-1:], k, visible=visible), one_row([3])), "not visible"),
        (lambda: one_row([1, -1]), "at least 0; got -1"),
        (lambda: one_row([3, 1, 3]), "holds one key twice"),
        (lambda: Support(torch.zeros(5, 0, dtype=torch.long), torch.zeros(5, 0, dtype=torch.bool)), "got k = 0"),
        (lambda: SparseAttention(scores, support, torch.full((5,), math.nan, dtype=q.dtype)), "shift must be finite"),
        (lambda: SparseAttention(scores, support, torch.zeros(1, 5)), "shift must have one number a row"),
        (lambda: SparseAttention(scores, support).attend(v[:4]), "v must have the batch, keys and precision of k"),
        (lambda: SparseAttention(scores, support).attend(v.float()), "v must have the batch, keys and precision of k"),
        (lambda: far_below.attend(v), "row sums of order 2 must be positive; got 3"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    # The same key in places that hold none is no repetition, and of all keys any may be kept where all are seen.
    assert one_row([3, 3, 9], [True, False, False]).sizes.tolist() == [1]
    SparseAttention(DotProductScores(q, k, is_causal=False), ahead).attend(v)
    assert far_below.matmul(v).isfinite().all()


def test_an_operator_says_what_it_is(rng):
    q, k, _ = factors(rng, keys=5)
    scores = DotProductScores(q, k)
    assert repr(SparseAttention(scores, top_support(scores, 2))) == (
        "SparseAttention(queries=5, keys=5, k=2, order=1, causal=True)"
    )
