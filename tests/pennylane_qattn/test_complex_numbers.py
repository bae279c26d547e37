"""Pairs of real numbers against torch's complex ones."""

import torch

from pennylane_qattn.complex_numbers import as_pairs, from_real, matmul, multiply, real_and_imaginary


def numbers(*shape, rng):
    return torch.randn(*shape, dtype=torch.complex128, generator=rng)


def test_products(rng):
    left, right = numbers(3, 1, 4, 5, rng=rng), numbers(3, 2, 5, 6, rng=rng)
    found = matmul(torch.view_as_real(left), torch.view_as_real(right))
    torch.testing.assert_close(torch.view_as_complex(found), left @ right, rtol=1e-12, atol=1e-12)
    left, right = numbers(3, 1, 4, rng=rng), numbers(2, 4, rng=rng)
    found = multiply(torch.view_as_real(left), torch.view_as_real(right))
    torch.testing.assert_close(torch.view_as_complex(found), left * right, rtol=1e-12, atol=1e-12)
    assert torch.equal(multiply(left, right), left * right) and torch.equal(matmul(left, left.mT), left @ left.mT)


def test_parts(rng):
    values = numbers(2, 3, rng=rng)
    pairs = torch.view_as_real(values)
    assert torch.equal(as_pairs(values), pairs) and torch.equal(as_pairs(pairs), pairs)
    for form in (values, pairs):
        real, imaginary = real_and_imaginary(form)
        assert torch.equal(real, values.real) and torch.equal(imaginary, values.imag)
    assert torch.equal(from_real(values.real), values.real.to(values.dtype))


def test_transformed_calls_have_no_complex_numbers(rng):
    x = torch.randn(4, 3, dtype=torch.float64, generator=rng)
    seen = []

    def function(row):
        seen.append(from_real(row))
        return row

    torch.func.vmap(function)(x)
    assert seen[0].shape == (3, 2) and not seen[0].is_complex()
