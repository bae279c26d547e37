"""Rows in blocks against the formula in one piece, which is written out here."""

import os

import pytest
import torch
from largest_tensor import LargestTensor

from pennylane_qattn import build_attention, double_exponential, kernels
from pennylane_qattn.double_exponential import attend, keys_of, plain_attend, queries_of


def problem(dtype, rng, queries=7, keys=7):
    sizes = (3, 2, queries, 5), (3, 2, keys, 5), (3, 2, keys, 4)
    return [torch.randn(*size, dtype=dtype, generator=rng).requires_grad_() for size in sizes]


def formula(q, k, v, is_causal, visible):
    """Query by query and key by key."""
    rows = []
    offset = k.shape[2] - q.shape[2]
    for i in range(q.shape[2]):
        weights = torch.exp(torch.exp(-(q[:, :, i, None] - k).square().sum(-1)))
        seen = torch.ones(len(k), k.shape[2], dtype=torch.bool) if visible is None else visible.clone()
        if is_causal:
            seen[:, i + offset + 1 :] = False
        weights = weights * seen[:, None]
        rows.append((weights[..., None] * v).sum(2) / weights.sum(-1, keepdim=True).clamp(min=0.5))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("block", [1, 30, 2**18])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("case", ["all", "last queries", "padded"])
def test_blocks_give_the_formula(case, is_causal, block, dtype, close, rng, monkeypatch):
    monkeypatch.setitem(double_exponential.BLOCK_ELEMENTS, "cpu", block)
    q, k, v = problem(dtype, rng, queries=3 if case == "last queries" else 7)
    visible = None
    if case == "padded":
        visible = torch.rand(3, 7, generator=rng) < 0.6
        visible[0], visible[1, 0] = False, False  # queries that see nothing
    upstream = torch.randn(3, 2, q.shape[2], 4, dtype=dtype, generator=rng)
    expected = formula(q, k, v, is_causal, visible)
    wanted = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    ours = attend(q, k, v, is_causal, visible)
    close(ours, expected.detach(), factor=10)
    for gradient, other in zip(torch.autograd.grad((ours * upstream).sum(), (q, k, v)), wanted, strict=True):
        close(gradient, other, factor=100)
    if case == "padded":
        assert (ours[0] == 0).all()


def test_derivatives(rng):
    q, k, v = problem(torch.float64, rng, queries=3, keys=4)

    def whole(q, k, v):
        return attend(q, k, v, True, None)

    assert torch.autograd.gradcheck(whole, (q, k, v))
    assert torch.autograd.gradgradcheck(whole, (q, k, v))
    frozen = q.detach()
    assert torch.autograd.gradgradcheck(lambda v: whole(frozen, k.detach(), v), (v,))


@pytest.mark.parametrize("switch", ["0", "1"])
def test_prepared_sides(switch, dtype, close, rng, monkeypatch):
    monkeypatch.setitem(os.environ, kernels.SWITCH, switch)
    q, k, _ = problem(dtype, rng)
    close(
        (queries_of(q) @ keys_of(k).transpose(-2, -1)).detach(),
        -torch.cdist(q, k).square().detach(),
        factor=100,
    )
    assert queries_of(q.half().float()).shape == (3, 2, 7, 7)


def test_far_keys_leave_no_subnormal_gradients(rng):
    """They are ten times slower to multiply, and there were millions of them at 128 features."""
    q, k, v = (torch.randn(2, 1, 6, 128, generator=rng).requires_grad_() for _ in range(3))
    attend(q, k, v, True, None).square().sum().backward()
    for gradient in (q.grad, k.grad):
        assert ((gradient == 0) | (gradient.abs() > torch.finfo(torch.float32).tiny)).all()
    assert (attend(q, k, v, True, None)[:, :, 0] == v[:, :, 0]).all()


def test_what_is_no_number_stays_so(rng):
    q, k, v = problem(torch.float32, rng)
    k = k.detach().clone()
    k[0, 0, 2] = float("nan")
    out = attend(q, k, v, True, None)
    assert out[0, 0, 2:].isnan().all() and out[0, 0, :2].isfinite().all() and out[1:].isfinite().all()


def test_no_matrix_of_weights(rng):
    """Of 2,048 tokens, none as large as the square is made, forwards or backwards."""
    torch.manual_seed(0)
    attention = build_attention("qisa", 8, 1, 2048)
    x = torch.randn(1, 2048, 8, generator=rng).requires_grad_()
    with LargestTensor() as seen:
        attention(x).square().sum().backward()
    assert seen.numbers <= 2**18


def test_plain_is_the_same(rng):
    q, k, v = problem(torch.float64, rng)
    visible = torch.rand(3, 7, generator=rng) < 0.6
    flat = plain_attend(
        *(t.flatten(0, 1) for t in (queries_of(q), keys_of(k), v)), True, visible.repeat_interleave(2, dim=0)
    )
    torch.testing.assert_close(flat.unflatten(0, (3, 2)), formula(q, k, v, True, visible), rtol=1e-12, atol=1e-12)
