"""Vectors in kernels, against NumPy lane by lane."""

import numpy as np
import pytest

from pennylane_qattn import kernels, simd

pytestmark = pytest.mark.skipif(kernels.numba is None, reason="Numba is not installed")

if kernels.numba is not None:

    @kernels.numba.njit
    def exponentials(numbers, out):
        for i in range(0, numbers.shape[1], simd.lanes(numbers)):
            simd.store(out, 0, i, simd.exp(simd.load(numbers, 0, i)))

    @kernels.numba.njit
    def arithmetic(a, b, out):
        x, y = simd.load(a, 0, 0), simd.load(b, 0, 0)
        simd.store(out, 0, 0, x * y - x + simd.splat(a[0, 1]))
        simd.store(out, 1, 0, simd.maximum(x, y))
        return simd.total(x), simd.largest(x), simd.lanes(a)

    @kernels.numba.njit
    def chosen(a, number, out):
        x = simd.load(a, 0, 0)
        simd.store(out, 0, 0, simd.where_first(number, x, simd.splat(a[0, 0]) - x))


@pytest.fixture(params=[np.float32, np.float64])
def dtype(request):
    return request.param


def vector(dtype, seed=0):
    return np.random.default_rng(seed).standard_normal((1, simd.BITS // (8 * np.dtype(dtype).itemsize))).astype(dtype)


def test_exp_is_exact_to_two_bits(dtype):
    """At every exponent of which the exponential is a normal number, against extended precision."""
    end = {np.float32: 87, np.float64: 708}[dtype]
    numbers = np.linspace(-end, end, 2**16).astype(dtype)[None]
    numbers[0, :3] = 0, np.log(2) / 2, -np.log(2) / 2
    out = np.empty_like(numbers)
    exponentials(numbers, out)
    expected = np.exp(numbers.astype(np.longdouble))
    assert np.abs(out / expected - 1).max() < 3 * np.finfo(dtype).eps
    assert out[0, 0] == 1


def test_exp_of_what_is_no_number(dtype):
    numbers = np.full((1, 16), np.nan, dtype)
    exponentials(numbers, out := np.zeros_like(numbers))
    assert np.isnan(out).all()


def test_arithmetic(dtype):
    a, b = vector(dtype), vector(dtype, seed=1)
    out = np.empty((2, a.shape[1]), dtype)
    total, largest, lanes = arithmetic(a, b, out)
    np.testing.assert_allclose(out[0], a[0] * b[0] - a[0] + a[0, 1], rtol=1e-5)
    np.testing.assert_array_equal(out[1], np.maximum(a[0], b[0]))
    np.testing.assert_allclose(total, a.sum(), rtol=1e-5)
    assert largest == a.max() and lanes == a.shape[1] == 64 // a.itemsize


@pytest.mark.parametrize("number", [-3, 0, 1, 5, 8, 16, 17, 2**40])
def test_where_first(number, dtype):
    a = vector(dtype)
    chosen(a, number, out := np.empty_like(a))
    np.testing.assert_array_equal(out, np.where(np.arange(a.shape[1]) < number, a, a[0, 0] - a))
