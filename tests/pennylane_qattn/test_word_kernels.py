"""Pauli words by the kernels of the CPU, against dense matrices."""

import numpy as np
import pytest
import torch
from dense_reference import word_matrix

from pennylane_qattn import kernels
from pennylane_qattn.observables import draw_words
from pennylane_qattn.word_kernels import WordPairs, measure, measure_backward, measure_few

pytestmark = pytest.mark.skipif(kernels.numba is None, reason="Numba is not installed")


def heads_of(wires):
    """Two heads: words that share products and such that share none, the identity, one word twice, many Y."""
    heads = [[*draw_words(9, wires, seed, 0.4), "I" * wires, "Y" + "I" * (wires - 1), "Y" * wires] for seed in range(2)]
    heads[0][3] = heads[0][0]
    return heads


def values_of(words, state):
    """The words' values `(tokens, words)` in states `(dim, tokens)`, by dense matrices."""
    return np.array([np.einsum("bt,bc,ct->t", state.conj(), word_matrix(w), state).real for w in words]).T


@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 19, 48])
@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("wires", [1, 2, 3, 5])
def test_values_and_derivatives(wires, is_complex, tokens, dtype, close):
    rng, heads, dim = np.random.default_rng(wires), heads_of(wires), 2**wires
    number = np.dtype(str(dtype).removeprefix("torch."))
    pairs = WordPairs.of(heads, is_complex, number)
    # rows stand apart in memory, as they do in blocks
    states = rng.standard_normal((2, 2 * dim if is_complex else dim, tokens + 5)).astype(number)
    states[:, :, tokens:] = np.nan
    out = np.full((2, tokens, len(heads[0])), np.nan, number)
    kernels.run(measure, tokens, states[:, :, :tokens], *pairs, out)
    for head, words in enumerate(heads):
        own = states[head, :, :tokens].astype(float)
        state = own[:dim] + 1j * own[dim:] if is_complex else own
        close(torch.from_numpy(out[head]), values_of(words, state), factor=10)
        alone = np.full_like(out[:1], np.nan)
        kernels.run(measure, tokens, states[head : head + 1, :, :tokens], *pairs.of_head(head), alone)
        np.testing.assert_array_equal(alone[0], out[head])
        upstream = rng.standard_normal((tokens, len(words))).astype(number)
        slopes = np.full((len(own), tokens + 5), np.nan, number)
        arguments = states[head, :, :tokens], *pairs.of_head(head), upstream, slopes[:, :tokens]
        kernels.run(measure_backward, tokens, *arguments)
        applied = sum(g * (word_matrix(w) @ state) for w, g in zip(words, upstream.T.astype(float), strict=True))
        wanted = 2 * np.concatenate((applied.real, applied.imag)) if is_complex else 2 * applied.real
        close(torch.from_numpy(slopes[:, :tokens]), wanted, factor=10)
        assert np.isnan(slopes[:, tokens:]).all()


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("wires, width", [(1, 1), (2, 3), (4, 16), (5, 19)])
def test_few_tokens(wires, width, is_complex, is_shared, tokens, dtype, close):
    """States are made where they are measured, from inputs that all heads share or that are each head's own."""
    rng, heads, dim = np.random.default_rng(wires), heads_of(wires), 2**wires
    number = np.dtype(str(dtype).removeprefix("torch."))
    a = rng.standard_normal((1 if is_shared else 2, tokens, width)).astype(number)
    matrices = rng.standard_normal((2, 2 * dim if is_complex else dim, width)).astype(number)
    out = np.full((2, tokens, len(heads[0])), np.nan, number)
    kernels.run(measure_few, tokens, a, matrices, *WordPairs.of(heads, is_complex, number), out)
    for head, words in enumerate(heads):
        made = matrices[head].astype(float) @ a[0 if is_shared else head].T.astype(float)
        state = made[:dim] + 1j * made[dim:] if is_complex else made
        close(torch.from_numpy(out[head]), values_of(words, state), factor=30)


def test_words_share_their_products():
    """X, XZ and Y on a wire go over the same pairs of amplitudes, two words at a time; and so does another head."""
    pairs = WordPairs.of([["XI", "XZ", "YI", "ZI"], ["XI", "YI", "XI", "XI"]], True, np.dtype(np.float64))
    rows = [[0, 2], [1, 3], [0, 0], [1, 1], [2, 2], [3, 3]]
    assert pairs.firsts.tolist() == [0, 3, 4] and pairs.rows.tolist() == rows and pairs.most == 4
    assert pairs.words.tolist() == [[0, 1], [2, 4], [3, 4], [0, 1]]
    assert pairs.place.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert pairs.begins.tolist() == [0, 0, 2, 0] and pairs.ends.tolist() == [2, 2, 6, 2]


def test_words_that_vanish_on_real_states():
    pairs = WordPairs.of([["Y"]], False, np.dtype(np.float32))
    assert pairs.firsts.tolist() == [0, 0]
    out = np.full((1, 3, 1), np.nan, np.float32)
    kernels.run(measure, 3, np.ones((1, 2, 3), np.float32), *pairs, out)
    assert (out == 0).all()
