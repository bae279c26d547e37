import pytest
import torch

from pennylane_qattn import quadratic
from pennylane_qattn.quadratic import learned_quadratic_forms, plain_quadratic_forms, quadratic_forms


def problem(dtype, rng, vectors=3):
    a = torch.randn(vectors, 11, 5, dtype=dtype, generator=rng).requires_grad_()
    rows = torch.randn(3, 7, 5, dtype=dtype, generator=rng).requires_grad_()
    return a, rows, torch.randn(3, 7, 2, dtype=dtype, generator=rng)


@pytest.mark.parametrize("block", [1, 7 * 4, 2**17])
@pytest.mark.parametrize("vectors", [1, 3])
def test_blocks_give_the_formula(block, vectors, dtype, close, rng, monkeypatch):
    monkeypatch.setitem(quadratic.BLOCK_ELEMENTS, "cpu", block)
    a, rows, signs = problem(dtype, rng, vectors)
    upstream = torch.randn(3, 11, 2, dtype=dtype, generator=rng)
    expected = torch.einsum("hnr,hro->hno", torch.einsum("hnd,hrd->hnr", a.expand(3, -1, -1), rows) ** 2, signs)
    ours = quadratic_forms(a, rows, signs)
    close(ours, expected.detach(), factor=10)
    wanted = torch.autograd.grad((expected * upstream).sum(), (a, rows))
    for ours_gradient, gradient in zip(torch.autograd.grad((ours * upstream).sum(), (a, rows)), wanted, strict=True):
        close(ours_gradient, gradient, factor=100)


def test_derivatives(rng):
    a, rows, signs = problem(torch.float64, rng, vectors=1)
    assert torch.autograd.gradcheck(lambda a, r: quadratic_forms(a, r, signs), (a, rows))
    assert torch.autograd.gradgradcheck(lambda a, r: quadratic_forms(a, r, signs), (a, rows))


def test_vectorised_jacobian_and_torch_func(rng):
    a, rows, signs = problem(torch.float64, rng, vectors=1)
    by_formula = torch.func.jacrev(lambda v: plain_quadratic_forms(v, rows, signs))(a)
    torch.testing.assert_close(torch.func.jacrev(lambda v: quadratic_forms(v, rows, signs))(a), by_formula)
    vectorised = torch.autograd.functional.jacobian(lambda v: quadratic_forms(v, rows, signs), a, vectorize=True)
    torch.testing.assert_close(vectorised, by_formula)


def test_no_tokens(rng):
    _, rows, signs = problem(torch.float64, rng)
    a = torch.zeros(1, 0, 5, dtype=torch.float64, requires_grad=True)
    out = quadratic_forms(a, rows, signs)
    assert out.shape == (3, 0, 2)
    out.sum().backward()
    assert a.grad.shape == a.shape


# --- with learned signs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [1, 3])
def test_learned_signs(vectors, rng):
    a, rows, signs = problem(torch.float64, rng, vectors)
    inputs = a, rows, signs.requires_grad_()
    torch.testing.assert_close(learned_quadratic_forms(*inputs), plain_quadratic_forms(*inputs), rtol=0, atol=0)
    assert torch.autograd.gradcheck(learned_quadratic_forms, inputs)
    assert torch.autograd.gradgradcheck(learned_quadratic_forms, inputs)
    assert torch.autograd.gradcheck(learned_quadratic_forms, inputs, check_batched_grad=True)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen, rng):
    a, rows, signs = problem(torch.float64, rng)
    inputs = [a, rows, signs.requires_grad_()]
    inputs[frozen] = inputs[frozen].detach()
    learned_quadratic_forms(*inputs).sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [number == frozen for number in range(3)]


def test_the_square_is_not_kept(rng):
    a, rows, signs = problem(torch.float32, rng, vectors=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        learned_quadratic_forms(a, rows, signs.requires_grad_())
    assert sorted(tensor.numel() for tensor in kept) == sorted([a.numel(), rows.numel(), signs.numel(), 3 * 11 * 7])
