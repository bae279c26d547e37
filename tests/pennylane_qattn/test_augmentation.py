"""The kernel against the formula as it stands, and against distances by subtraction."""

import os

import pytest
import torch

from pennylane_qattn import augmentation, kernels
from pennylane_qattn.augmentation import Layout, augment

NORM_FIRST, ONE_FIRST = Layout(norm=0, ones=(1,), width=7), Layout(norm=1, ones=(0,), width=7)
PADDED, WITHOUT_NORM = Layout(norm=0, ones=(), width=8), Layout(norm=None, ones=(0, 1), width=8)
LAYOUTS = [NORM_FIRST, ONE_FIRST, PADDED, WITHOUT_NORM]


def vectors(dtype, rng, token_first=False):
    shape = (3, 4, 2, 5) if token_first else (3, 2, 4, 5)
    x = torch.randn(shape, dtype=dtype, generator=rng)
    return (x.transpose(1, 2) if token_first else x).requires_grad_()


@pytest.fixture
def by_formula(monkeypatch):
    """The same, without kernels."""

    def plain(*arguments):
        with monkeypatch.context() as patch:
            patch.setitem(os.environ, kernels.SWITCH, "0")
            return augment(*arguments)

    return plain


@pytest.mark.skipif(kernels.numba is None, reason="Numba is not installed")
@pytest.mark.parametrize("token_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_equals_formula(layout, token_first, dtype, close, rng, by_formula):
    x = vectors(dtype, rng, token_first)
    factors = [torch.tensor(two, dtype=dtype, requires_grad=True) for two in ([0.5, 3.0], [-1.0, -0.25])]
    inputs = [x, *factors]
    ours, plain = augment(x, *factors, layout), by_formula(x, *factors, layout)
    assert ours.shape == plain.shape == (3, 2, 4, layout.width)
    assert "_Augment" in ours.grad_fn.name() and "_Augment" not in plain.grad_fn.name()
    close(ours.detach(), plain.detach())
    upstream = torch.randn(ours.shape, dtype=dtype, generator=rng)
    found = torch.autograd.grad(ours, inputs, upstream, allow_unused=True)
    wanted = torch.autograd.grad(plain, inputs, upstream, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other, factor=10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives(layout, rng):
    inputs = (vectors(torch.float64, rng), torch.rand(2, generator=rng, dtype=torch.float64).requires_grad_(), -2.0)
    function = lambda x, factor: augment(x, factor, inputs[2], layout)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs[:2], check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs[:2])


def test_a_product_is_a_distance(dtype, close, rng):
    q, k = vectors(dtype, rng), vectors(dtype, rng)
    product = augment(q, 2.0, -1.0, NORM_FIRST) @ augment(k, 1.0, -1.0, ONE_FIRST).transpose(2, 3)
    close(product.detach(), -(q[:, :, :, None] - k[:, :, None]).square().sum(-1).detach(), factor=10)


def test_few_numbers_take_the_formula(rng, monkeypatch):
    monkeypatch.setattr(augmentation, "FEWEST_NUMBERS", 10**6)
    assert "_Augment" not in augment(vectors(torch.float32, rng), 2.0, -1.0, NORM_FIRST).grad_fn.name()


def test_no_tokens():
    x = torch.zeros(2, 1, 0, 5, requires_grad=True)
    out = augment(x, 2.0, -1.0, NORM_FIRST)
    assert out.shape == (2, 1, 0, 7)
    out.sum().backward()
    assert x.grad.shape == x.shape
