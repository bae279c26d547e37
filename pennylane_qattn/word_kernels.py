r"""Pauli words of many states at once on the CPU, and their derivative: kernels for `measurement.py`.

A state is a column :math:`s` of real numbers, real amplitudes and below them, if there are any, imaginary ones. A word
is a signed permutation of amplitudes, so its value is a short sum of products of two rows,

.. math::

    \langle\psi|P_w|\psi\rangle = \sum_{(l, r, c) \in w} c\, s_l s_r, \qquad
    \frac{\partial}{\partial s_l} \sum_w g_w \langle P_w \rangle = \sum_{(w, r, c) \in l} c\, g_w s_r,

with as many terms as there are rows, at most: no change of basis. A word that is given several times is summed up once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pennylane_qattn.kernels import compiled, inlined
from pennylane_qattn.observables import word_action

#: Tokens at a time: enough to pay for starting a loop, few enough for the second-level cache.
LANES = 128
#: Terms that are added at a time, so that a sum is read and written once for all of them.
_AT_ONCE = 4


class Terms(NamedTuple):
    """Sums of products, one after the other, in the order in which kernels take them.

    Attributes:
        starts: where the terms of each sum begin, and where the last one ends; each has a multiple of `_AT_ONCE`.
        left, right: the two factors of each term.
        coefficient: what their product is multiplied by.
    """

    starts: np.ndarray
    left: np.ndarray
    right: np.ndarray
    coefficient: np.ndarray

    @classmethod
    def of(cls, sums: Sequence[Sequence[tuple[int, int, float]]], dtype: np.dtype) -> "Terms":
        """The sums of `(left, right, coefficient)`, filled up with terms of coefficient 0."""
        filled = [[*terms, *[(0, 0, 0.0)] * (-len(terms) % _AT_ONCE)] for terms in sums]
        terms = np.array([term for terms in filled for term in terms], dtype=np.float64).reshape(-1, 3)
        starts = np.cumsum([0, *map(len, filled)])
        left, right = (np.ascontiguousarray(column, dtype=np.int64) for column in terms.T[:2])
        return cls(starts.astype(np.int64), left, right, np.ascontiguousarray(terms[:, 2], dtype=dtype))


@dataclass(frozen=True)
class WordTable:
    """The words of one head, each distinct word once.

    Attributes:
        values: of each distinct word, its terms: `(row, row)`.
        derivatives: of each row, its terms: `(word, row)`.
        place: which distinct word stands for each word that was given.
    """

    values: Terms
    derivatives: Terms
    place: np.ndarray

    @classmethod
    def of(cls, words: Sequence[str], is_complex: bool, dtype: np.dtype) -> "WordTable":
        """The table of these words.

        Args:
            words: Pauli words on the same number of wires.
            is_complex: whether states have imaginary amplitudes.
            dtype: of the states.
        """
        distinct = list(dict.fromkeys(words))
        dim = 2 ** len(distinct[0])
        sums: list[list] = []
        rows: list[list] = [[] for _ in range(2 * dim if is_complex else dim)]
        for number, word in enumerate(distinct):
            sums.append([])
            for left, right, coefficient in _products(word, is_complex):
                rows[left].append((number, right, 2 * coefficient))
                if left <= right:  # the matrix of the form is symmetric
                    sums[-1].append((left, right, coefficient * (1 + (left < right))))
        place = np.array([distinct.index(word) for word in words], dtype=np.int64)
        return cls(Terms.of(sums, dtype), Terms.of(rows, dtype), place)


def _products(word: str, is_complex: bool) -> list[tuple[int, int, float]]:
    """All entries `(row, row, c)` of the symmetric matrix of a word's form."""
    source, phases = word_action(word)
    dim = len(source)
    entries = [(b, int(source[b]), phases[b]) for b in range(dim)]
    found = [(b, other, phase.real) for b, other, phase in entries if phase.real]
    if is_complex:
        found += [(dim + b, dim + other, c) for b, other, c in found]
        for b, other, phase in entries:  # Re(-i c (x_b - i y_b)(x_o + i y_o)) = c (x_b y_o - y_b x_o)
            if phase.imag:
                found += [(b, dim + other, -phase.imag), (dim + b, other, phase.imag)]
    return found


@inlined
def _add_up(total, first, last, left, right, coefficient, a, b):
    """Adds the terms from `first` to `last` to `total`, `_AT_ONCE` at a time."""
    for e in range(first, last, 4):
        a0, a1, a2, a3 = a[left[e]], a[left[e + 1]], a[left[e + 2]], a[left[e + 3]]
        b0, b1, b2, b3 = b[right[e]], b[right[e + 1]], b[right[e + 2]], b[right[e + 3]]
        c0, c1, c2, c3 = coefficient[e], coefficient[e + 1], coefficient[e + 2], coefficient[e + 3]
        for t in range(LANES):
            total[t] += c0 * a0[t] * b0[t] + c1 * a1[t] * b1[t] + (c2 * a2[t] * b2[t] + c3 * a3[t] * b3[t])


@compiled
def measure(states, starts, left, right, coefficient, place, out, first, last):
    """The value of every word, `out[token, word]`, in `states[row, token]`."""
    rows, words = states.shape[0], len(starts) - 1
    block = np.zeros((rows, LANES), states.dtype)
    values = np.zeros((words, LANES), states.dtype)
    for begin in range(first, last, LANES):
        lanes = min(LANES, last - begin)
        for row in range(rows):
            for t in range(lanes):
                block[row, t] = states[row, begin + t]
        for word in range(words):
            total = values[word]
            total[:] = 0
            _add_up(total, starts[word], starts[word + 1], left, right, coefficient, block, block)
        for t in range(lanes):
            for word in range(len(place)):
                out[begin + t, word] = values[place[word], t]


@compiled
def measure_backward(states, starts, left, right, coefficient, place, upstream, words, out, first, last):
    """The derivative of `sum(upstream * measure(states))` by the states, `out[row, token]`."""
    rows = states.shape[0]
    block = np.zeros((rows, LANES), states.dtype)
    weights = np.zeros((words, LANES), states.dtype)
    total = np.zeros(LANES, states.dtype)
    for begin in range(first, last, LANES):
        lanes = min(LANES, last - begin)
        for row in range(rows):
            for t in range(lanes):
                block[row, t] = states[row, begin + t]
        weights[:] = 0
        for t in range(lanes):
            for word in range(len(place)):
                weights[place[word], t] += upstream[begin + t, word]
        for row in range(rows):
            total[:] = 0
            _add_up(total, starts[row], starts[row + 1], left, right, coefficient, weights, block)
            for t in range(lanes):
                out[row, begin + t] = total[t]
