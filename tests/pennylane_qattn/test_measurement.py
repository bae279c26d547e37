"""Kernels against dense matrices, and against the same values by torch alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reference import word_matrix

from pennylane_qattn import CircuitFeatureMap, QuadraticFeatureMap, kernels, measurement
from pennylane_qattn.encoding import normalise
from pennylane_qattn.measurement import WordMeasurement, plain_words
from pennylane_qattn.observables import draw_words

pytestmark = pytest.mark.skipif(kernels.numba is None, reason="Numba is not installed")
HEADS, TOKENS = 2, 131


def problem(wires, is_complex, dtype, rng, vectors=HEADS, width=None):
    words = [(*draw_words(6, wires, seed, 0.4), "I" * wires, "Z" * wires) for seed in range(HEADS)]
    words[0] = (*words[0][:-1], words[0][0])  # one of them twice
    rows = 2**wires * (2 if is_complex else 1)
    width = width or 2**wires - 1
    a = torch.randn(vectors, TOKENS, width, dtype=dtype, generator=rng).requires_grad_()
    matrix = torch.randn(HEADS, rows, width, dtype=dtype, generator=rng) / rows**0.5
    return words, a, matrix.requires_grad_()


def dense(words, a, matrix, is_complex):
    """Expectation values by the words' whole matrices."""
    states = torch.einsum("hrd,hnd->hnr", matrix, a.expand(HEADS, -1, -1))
    real, imaginary = states.chunk(2, dim=-1) if is_complex else (states, torch.zeros_like(states))
    state = torch.complex(real, imaginary)
    matrices = torch.as_tensor(np.array([[word_matrix(word) for word in head] for head in words])).to(state.dtype)
    return torch.einsum("hnb,hwbc,hnc->hnw", state.conj(), matrices, state).real


@pytest.mark.parametrize("block", [1, 2**18])
@pytest.mark.parametrize("vectors", [1, HEADS])
@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("wires", [1, 2, 3, 5])
def test_equals_dense_matrices(wires, is_complex, vectors, block, dtype, close, rng, monkeypatch):
    monkeypatch.setattr(measurement, "BLOCK_ELEMENTS", block)
    words, a, matrix = problem(wires, is_complex, dtype, rng, vectors)
    upstream = torch.randn(HEADS, TOKENS, len(words[0]), dtype=dtype, generator=rng)
    expected = dense(words, a, matrix, is_complex)
    measured = WordMeasurement(words, is_complex)
    ours = measured(a, matrix)
    close(ours, expected.detach(), factor=10)
    close(plain_words(a, matrix, measured.tables(dtype)), expected.detach(), factor=10)
    wanted = torch.autograd.grad((expected * upstream).sum(), (a, matrix))
    found = torch.autograd.grad((ours * upstream).sum(), (a, matrix))
    for gradient, other in zip(found, wanted, strict=True):
        close(gradient, other, factor=100)


@pytest.mark.parametrize("is_complex", [True, False])
def test_derivatives(is_complex, rng):
    words, a, matrix = problem(2, is_complex, torch.float64, rng, vectors=1)
    a = a[:, :3].detach().requires_grad_()
    measured = WordMeasurement(words, is_complex)
    assert torch.autograd.gradcheck(measured, (a, matrix))
    assert torch.autograd.gradgradcheck(measured, (a, matrix))
    frozen = matrix.detach()
    assert torch.autograd.gradgradcheck(lambda v: measured(v, frozen), (a,))


def test_words_that_vanish_on_real_states(rng):
    """An odd number of Y: no term at all."""
    a, rows = torch.randn(1, 5, 4, generator=rng), torch.randn(1, 4, 4, generator=rng).requires_grad_()
    values = WordMeasurement([("YI", "XY", "YI")], is_complex=False)(a, rows)
    assert torch.equal(values, torch.zeros(1, 5, 3))
    values.sum().backward()
    assert (rows.grad == 0).all()


def test_no_tokens(rng):
    words, _, matrix = problem(2, True, torch.float64, rng)
    a = torch.zeros(1, 0, 3, dtype=torch.float64, requires_grad=True)
    out = WordMeasurement(words, True)(a, matrix)
    assert out.shape == (HEADS, 0, len(words[0]))
    out.sum().backward()
    assert a.grad.shape == a.shape


@pytest.mark.parametrize("vectors", [1, HEADS])
@pytest.mark.parametrize("is_complex", [True, False])
def test_batched_gradients(is_complex, vectors, rng):
    words, a, matrix = problem(3, is_complex, torch.float64, rng, vectors)
    measured = WordMeasurement(words, is_complex)
    upstream = torch.randn(3, HEADS, TOKENS, len(words[0]), dtype=torch.float64, generator=rng)
    out = measured(a, matrix)
    batched = torch.autograd.grad(out, (a, matrix), upstream, is_grads_batched=True, retain_graph=True)
    expected = dense(words, a, matrix, is_complex)
    for row, each in enumerate(upstream):
        wanted = torch.autograd.grad(expected, (a, matrix), each, retain_graph=True)
        for one, all_of_them in zip(wanted, batched, strict=True):
            torch.testing.assert_close(all_of_them[row], one, rtol=1e-10, atol=1e-10)


def test_a_forked_process_has_threads_of_its_own():
    """A pool is not forked with its threads: a child that used it would wait for ever."""
    program = """
import os, signal, torch
from pennylane_qattn.encoding import normalise
torch.set_num_threads(2)
x = torch.ones(4096, 8)
normalise(x)
child = os.fork()
if child == 0:
    signal.alarm(20)
    normalise(x)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_threads_change_no_bit(rng):
    words, _, matrix = problem(3, True, torch.float32, rng)
    a = torch.randn(1, 4001, 7, generator=rng).requires_grad_()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            values = WordMeasurement(words, True)(a, matrix)
            found.append((values, *torch.autograd.grad(values.square().sum(), (a,)), normalise(a)))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [CircuitFeatureMap, QuadraticFeatureMap])
def test_feature_maps_use_them_and_can_do_without(kind, dtype, close, rng, monkeypatch):
    torch.manual_seed(0)
    feature_map = kind(16, 2, 16).to(dtype)
    x = torch.randn(2, 40, 16, dtype=dtype, generator=rng).requires_grad_()
    calls = []
    monkeypatch.setattr(kernels, "run", lambda *a, run=kernels.run: (calls.append(a[0]), run(*a)))
    found = {}
    for switch in ("1", "0"):
        monkeypatch.setitem(os.environ, kernels.SWITCH, switch)
        values = feature_map(x)
        found[switch] = (values, *torch.autograd.grad(values.square().sum(), (x, *feature_map.parameters())))
        assert bool(calls) == (switch == "1")
        calls.clear()
    for one, other in zip(found["1"], found["0"], strict=True):
        close(one, other.detach(), factor=100)


def test_words_of_one_setting_are_measured_by_a_product():
    """All words of I and Z at once: one change of basis is less than a kernel's many sums."""
    words = draw_words(255, 8, 0, 0.5)
    a = torch.zeros(1, 3, 256)
    assert WordMeasurement([words], True).serves(a)
    diagonal = tuple(word.replace("X", "Z").replace("Y", "Z") for word in words)
    assert not WordMeasurement([diagonal], True).serves(a)


@pytest.mark.parametrize("width", [1, 5, 16])
def test_rows_of_length_one(width, dtype, close, rng, monkeypatch):
    x = torch.randn(9, width, dtype=dtype, generator=rng)
    tiny = 1e-30 if dtype == torch.float32 else 1e-200
    x[1], x[2], x[3], x[4] = 0, x[2] * tiny, x[3] / tiny, -0.0
    x[5, -1], x[6, 0] = float("nan"), float("inf")
    x[7] *= 1e-25
    upstream = torch.randn(9, width, dtype=dtype, generator=rng)
    found = {}
    for switch in ("1", "0"):
        monkeypatch.setitem(os.environ, kernels.SWITCH, switch)
        leaf = x.clone().requires_grad_()
        unit = normalise(leaf)
        found[switch] = unit.detach(), torch.autograd.grad((unit * upstream).sum(), leaf)[0]
    for one, other in zip(found["1"], found["0"], strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6, equal_nan=True
        )
