"""Attention by distances in one pass, against its formula query by query, and against torch's softmax."""

import itertools
import os

import pytest
import torch
from largest_tensor import LargestTensor
from torch.autograd import forward_ad

from pennylane_qattn import build_attention, distance_attention, kernels
from pennylane_qattn.distance_attention import attend, plain_attend, serve

pytestmark = pytest.mark.skipif(kernels.numba is None, reason="Numba is not installed")

KINDS = ["published", "gaussian"]


def problem(dtype, rng, queries=7, keys=7, width=5, values=4, scale=1.0):
    sizes = (3, 2, queries, width), (3, 2, keys, width), (3, 2, keys, values)
    q, k, v = (torch.randn(*size, dtype=dtype, generator=rng) * scale for size in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def betas(kind, dtype):
    return torch.tensor([0.3, 1.7], dtype=dtype, requires_grad=True) if kind == "gaussian" else None


def formula(q, k, v, beta, is_causal):
    """Query by query."""
    rows, offset = [], k.shape[2] - q.shape[2]
    for i in range(q.shape[2]):
        end = i + offset + 1 if is_causal else k.shape[2]
        distances = (q[:, :, i, None] - k[:, :, :end]).square().sum(-1)
        exponents = torch.exp(-distances) if beta is None else -beta[:, None] * distances
        rows.append((exponents.softmax(-1)[..., None] * v[:, :, :end]).sum(2))
    return torch.stack(rows, dim=2)


def compare(q, k, v, beta, is_causal, close, rng):
    assert serve(q, k, v)
    upstream = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype, generator=rng)
    inputs = [t for t in (q, k, v, beta) if t is not None]
    expected, ours = formula(q, k, v, beta, is_causal), attend(q, k, v, beta, is_causal)
    close(ours.detach(), expected.detach(), factor=10)
    wanted, found = (torch.autograd.grad((out * upstream).sum(), inputs) for out in (expected, ours))
    for gradient, other in zip(found, wanted, strict=True):
        close(gradient, other, factor=100)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 6), (2, 2), (3, 7), (4, 4), (5, 5), (17, 17), (9, 35)])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_tokens(kind, queries, keys, is_causal, dtype, close, rng):
    compare(*problem(dtype, rng, queries, keys), betas(kind, dtype), is_causal, close, rng)


@pytest.mark.parametrize("width, values", list(itertools.product([1, 8, 16, 17], [1, 3, 16, 33])))
@pytest.mark.parametrize("kind", KINDS)
def test_widths(kind, width, values, dtype, close, rng):
    sides = problem(dtype, rng, 6, 6, width, values, scale=width**-0.5)
    compare(*sides, betas(kind, dtype), True, close, rng)


@pytest.mark.parametrize("width, values", list(itertools.product([1, 8, 16, 17], [1, 3, 16, 33])))
@pytest.mark.parametrize("kind", KINDS)
def test_one_query_as_in_generation(kind, width, values, dtype, close, rng, monkeypatch):
    """By a kernel of its own, which training has nothing to do with."""
    q, k, v = problem(dtype, rng, 1, 21, width, values, scale=width**-0.5)
    beta = betas(kind, dtype)
    monkeypatch.setattr(distance_attention, "attend_forward", None)
    with torch.no_grad():
        close(attend(q, k, v, beta, True), formula(q, k, v, beta, True), factor=10)


def token_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def head_first(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def in_a_cache(t):
    held = t.new_full((*t.shape[:2], 40, t.shape[3]), float("nan"))
    held[:, :, : t.shape[2]] = t
    return held[:, :, : t.shape[2]]


def features_first(t):
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def beside_others(t):
    return torch.nn.functional.pad(t, (1, 2))[..., 1:-2]


def negatives(t):
    return torch.complex(torch.zeros_like(t), -t).conj().imag


LAYOUTS = [token_first, head_first, in_a_cache, features_first, beside_others]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind, queries, layout, rng):
    """Wherever the numbers stand, the results are the same to the last bit, and so are the gradients."""
    q, k, v = problem(torch.float32, rng, queries)
    beta = betas(kind, torch.float32)
    inputs = [t for t in (q, k, v, beta) if t is not None]
    upstream = torch.randn(3, 2, queries, 4, generator=rng)
    expected = attend(q, k, v, beta, True)
    ours = attend(*(layout(t) for t in (q, k, v)), beta, True)
    assert torch.equal(ours, expected)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for gradient, other in zip(torch.autograd.grad(ours, inputs, layout(upstream)), wanted, strict=True):
        assert torch.equal(gradient, other)
    with torch.no_grad():
        assert torch.equal(attend(*(layout(t) for t in (q, k, v)), beta, True), attend(q, k, v, beta, True))


def test_expanded_keys_and_negative_views(close, rng, dtype):
    q, k, v = problem(dtype, rng)
    one = k[:, :1].detach().requires_grad_()
    compare(q, one.expand(-1, 2, -1, -1), v, None, True, close, rng)
    assert not serve(q, negatives(k.detach()), v)
    upstream = torch.randn(3, 2, 7, 4, dtype=dtype, generator=rng)
    given = negatives(upstream)
    assert given.is_neg()
    found, wanted = (torch.autograd.grad(attend(q, k, v, None, True), (q, k, v), g) for g in (given, upstream))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_output_is_as_the_projection_reads_it(rng):
    q, k, v = problem(torch.float32, rng)
    assert attend(q, k, v, None, True).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind, rng):
    q, k, v = problem(torch.float64, rng, queries=3, keys=4)
    beta = betas(kind, torch.float64)
    inputs = [t for t in (q, k, v, beta) if t is not None]

    def whole(q, k, v, beta=None):
        return attend(q, k, v, beta, True)

    assert torch.autograd.gradcheck(whole, inputs)
    assert torch.autograd.gradcheck(whole, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(whole, inputs)
    frozen = q.detach(), k.detach()
    assert torch.autograd.gradgradcheck(lambda v: whole(*frozen, v), (v,))


@pytest.mark.parametrize("kind", KINDS)
def test_many_gradients_at_once(kind, rng):
    q, k, v = problem(torch.float64, rng)
    beta = betas(kind, torch.float64)
    inputs = [t for t in (q, k, v, beta) if t is not None]
    out = attend(q, k, v, beta, True)
    upstreams = torch.randn(3, *out.shape, dtype=out.dtype, generator=rng)
    many = torch.autograd.grad(out, inputs, upstreams, is_grads_batched=True, retain_graph=True)
    for number, upstream in enumerate(upstreams):
        one = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        torch.testing.assert_close([m[number] for m in many], list(one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_is_the_same(kind, rng):
    q, k, v = problem(torch.float64, rng, queries=3)
    beta = betas(kind, torch.float64)
    for is_causal in (True, False):
        torch.testing.assert_close(
            plain_attend(q, k, v, beta, is_causal), formula(q, k, v, beta, is_causal), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind, rng):
    q, k, v = (torch.randn(96, 2, 16, 4, generator=rng).requires_grad_() for _ in range(3))
    beta, found, threads = betas(kind, torch.float32), [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            out = attend(q, k, v, beta, True)
            found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_far_keys(rng):
    """Exponentials that would vanish all together do not, and leave no subnormal gradients."""
    q, k, v = (torch.randn(2, 1, 6, 128, generator=rng).requires_grad_() for _ in range(3))
    out = attend(q, k + 100, v, torch.tensor([5.0]), True)
    torch.testing.assert_close(out, formula(q, k + 100, v, torch.tensor([5.0]), True), rtol=1e-5, atol=1e-5)
    published = attend(q, k, v, None, True)
    assert torch.equal(published[:, :, 0], v[:, :, 0]) and torch.equal(out[:, :, 0], v[:, :, 0])
    for gradient in torch.autograd.grad(published.square().sum(), (q, k)):
        assert ((gradient == 0) | (gradient.abs() > torch.finfo(torch.float32).tiny)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_close_vectors_of_large_norm(kind, rng):
    """A distance is no difference of large numbers: what is 1000 away from the origin loses no digits."""
    q, k, v = (t.detach() for t in problem(torch.float32, rng, scale=0.5))
    q, k = (torch.round(t * 64) / 64 + 1000 for t in (q, k))  # sums that float32 holds exactly
    beta = betas(kind, torch.float32)
    exact = formula(q.double(), k.double(), v.double(), None if beta is None else beta.double(), True)
    torch.testing.assert_close(attend(q, k, v, beta, True).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_no_number_stays_so(kind, grad, rng):
    q, k, v = problem(torch.float32, rng)
    k = k.detach().clone()
    k[0, 0, 2] = float("nan")
    with torch.set_grad_enabled(grad):
        out = attend(q, k, v, betas(kind, torch.float32), True)
        assert out[0, 0, 2:].isnan().all() and out[0, 0, :2].isfinite().all() and out[1:].isfinite().all()
        assert attend(q[:, :, -1:], k, v, betas(kind, torch.float32), True)[0, 0].isnan().all()


def test_nothing_to_do():
    for sizes in [(0, 2, 3), (2, 2, 0)]:
        q, k, v = (torch.ones(*sizes, width, requires_grad=True) for width in (4, 4, 5))
        out = attend(q, k, v, None, True)
        assert out.shape == (*sizes, 5)
        out.sum().backward()
        assert q.grad.shape == q.shape


def test_what_is_served(rng, monkeypatch):
    q, k, v = (torch.ones(1, 1, 8, 16) for _ in range(3))
    assert serve(q, k, v)
    assert not serve(q.half(), k.half(), v.half()) and not serve(q, k, v.double())
    monkeypatch.setattr(distance_attention, "MOST_NUMBERS", 8 * 32 - 1)
    assert not serve(q, k, v) and serve(q[:, :, -1:], k, v)
    monkeypatch.setitem(os.environ, kernels.SWITCH, "0")
    assert not serve(q[:, :, -1:], k, v)


@pytest.mark.parametrize("name", ["qisa", "qsann", "qisa-absorbed", "gaussian"])
def test_mechanisms_run_on_it(name, rng, monkeypatch):
    """In training, inference and generation; and with padding, dropout or without kernels they go their other way."""
    torch.manual_seed(0)
    attention = build_attention(name, 8, 2, 12).double()
    x = torch.randn(3, 12, 8, dtype=torch.float64, generator=rng)
    calls, run = [], kernels.run

    def counted(kernel, *arguments, **options):
        calls.append(kernel)
        run(kernel, *arguments, **options)

    monkeypatch.setattr(kernels, "run", counted)
    ours = attention(x)
    ours.square().sum().backward()
    assert distance_attention.attend_forward in calls and distance_attention.attend_backward in calls
    gradients = [p.grad.clone() for p in attention.parameters()]
    with torch.no_grad():
        cache = attention.new_cache(3)
        steps = torch.cat([attention(x[:, t : t + 1], cache=cache) for t in range(12)], dim=1)
    assert distance_attention.attend_one in calls
    torch.testing.assert_close(steps, ours.detach(), rtol=1e-12, atol=1e-12)
    calls.clear()
    attention.zero_grad()
    monkeypatch.setattr(distance_attention, "serve", lambda q, k, v: False)
    others = attention(x)
    others.square().sum().backward()
    assert not {distance_attention.attend_forward, distance_attention.attend_backward} & set(calls)
    torch.testing.assert_close(others, ours, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([p.grad for p in attention.parameters()], gradients, rtol=1e-10, atol=1e-11)
    monkeypatch.undo()
    nobody = torch.zeros(3, 12, dtype=torch.bool)
    torch.testing.assert_close(attention(x, key_padding_mask=nobody), ours, rtol=1e-12, atol=1e-12)


def test_no_matrix_of_weights(rng):
    torch.manual_seed(0)
    attention = build_attention("qisa", 8, 1, 2048)
    x = torch.randn(1, 2048, 8, generator=rng).requires_grad_()
    with LargestTensor() as seen:
        attention(x).square().sum().backward()
    assert seen.numbers <= 2**18


@pytest.mark.parametrize("name", ["qisa", "qisa-absorbed"])
@pytest.mark.parametrize("length", [1, 5])
def test_forward_mode(name, length, rng):
    """Derivatives in forward mode, which kernels and torch's fused attention do not have, are those of a difference."""
    torch.manual_seed(0)
    attention = build_attention(name, 8, 2, 5).double()
    x, direction = (torch.randn(2, length, 8, dtype=torch.float64, generator=rng) for _ in range(2))
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(attention(forward_ad.make_dual(x, direction))).tangent
    with torch.no_grad():
        difference = (attention(x + 1e-6 * direction) - attention(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(tangent, difference, rtol=1e-7, atol=1e-7)
