"""The terms of Pauli words that kernels of CUDA read, summed up in NumPy, against dense matrices."""

import numpy as np
import pytest
import torch
from dense_reference import word_matrix

from pennylane_qattn.cuda_kernels import DeviceWords
from pennylane_qattn.observables import draw_words
from pennylane_qattn.word_tables import Terms, WordTable


def summed(starts, left, right, coefficient, lefts, rights):
    """Each sum of products, `(sums, tokens)`."""
    assert (np.diff(starts) % 4 == 0).all()  # kernels add four at a time
    products = coefficient[:, None] * lefts[left] * rights[right]
    return np.stack([products[a:b].sum(0) for a, b in zip(starts[:-1], starts[1:], strict=True)])


@pytest.mark.parametrize("is_complex", [True, False])
@pytest.mark.parametrize("wires", [1, 2, 3, 5])
def test_tables_are_the_words(wires, is_complex):
    rng = np.random.default_rng(wires)
    heads = [(*draw_words(6, wires, seed, 0.4), "I" * wires, "Y" + "I" * (wires - 1)) for seed in range(2)]
    heads[0] = (*heads[0][:-1], heads[0][0])  # one of them twice
    dim, tokens = 2**wires, 3
    tables = [WordTable.of(head, is_complex, np.dtype(np.float64)) for head in heads]
    on_device = DeviceWords(tables, torch.empty(0, dtype=torch.float64))
    by_word, by_row = ([t.numpy() for t in vars(sums).values()] for sums in (on_device._values, on_device._derivatives))
    joined = by_word[0], by_row[0]
    for head, (words, table) in enumerate(zip(heads, tables, strict=True)):
        states = rng.standard_normal((2 * dim if is_complex else dim, tokens))
        state = states[:dim] + 1j * states[dim:] if is_complex else states
        expected = np.array([np.einsum("bt,bc,ct->t", state.conj(), word_matrix(w), state).real for w in words])
        found = summed(*table.values, states, states)[table.place]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        upstream = rng.standard_normal((len(words), tokens))
        applied = sum(
            np.outer(np.ones(dim), g) * (word_matrix(w) @ state) for w, g in zip(words, upstream, strict=True)
        )
        slopes = 2 * np.concatenate((applied.real, applied.imag)) if is_complex else 2 * applied.real
        distinct = np.zeros((len(table.values.starts) - 1, tokens))
        np.add.at(distinct, table.place, upstream)
        np.testing.assert_allclose(summed(*table.derivatives, distinct, states), slopes, atol=1e-12)
        # on a device, the words as they were given, and those of all heads one after the other
        own = slice(head * len(words), (head + 1) * len(words) + 1)
        np.testing.assert_allclose(summed(joined[0][own], *by_word[1:], states, states), expected, atol=1e-12)
        own = slice(head * len(states), (head + 1) * len(states) + 1)
        np.testing.assert_allclose(summed(joined[1][own], *by_row[1:], upstream, states), slopes, atol=1e-12)


def test_terms_keep_their_order():
    terms = Terms.of(np.array([2, 0, 2]), np.array([7, 8, 9]), np.array([1, 2, 3]), np.ones(3), 4, np.dtype(np.float32))
    assert terms.starts.tolist() == [0, 4, 4, 8, 8] and terms.coefficient.dtype == np.float32
    assert terms.left.tolist() == [8, 0, 0, 0, 7, 9, 0, 0] and terms.right.tolist() == [2, 0, 0, 0, 1, 3, 0, 0]
    assert terms.coefficient.tolist() == [1, 0, 0, 0, 1, 1, 0, 0]
    assert terms.of_sum.tolist() == [0] * 4 + [2] * 4
    twice = terms.take(np.array([2, 1, 2]))
    assert twice.starts.tolist() == [0, 4, 4, 8] and twice.left.tolist() == [7, 9, 0, 0] * 2
