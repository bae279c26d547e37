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

#: Tokens at a time at most: enough to pay for starting a loop, few enough for the second-level cache.
LANES = 128
#: Fewer tokens, as in generation, are filled up to a multiple of this.
_VECTOR = 8
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


@dataclass(frozen=True)
class WordTables:
    """The words of all heads, as many for each.

    Attributes:
        heads: the table of each.
        firsts: where the distinct words of each head begin, and where those of the last one end.
        values: the terms of the distinct words of all heads.
        place: `(heads, words)`, as in `WordTable`.
    """

    heads: tuple[WordTable, ...]
    firsts: np.ndarray
    values: Terms
    place: np.ndarray

    @classmethod
    def of(cls, words: Sequence[Sequence[str]], is_complex: bool, dtype: np.dtype) -> "WordTables":
        """The tables of each head's words; the arguments are those of `WordTable.of`."""
        heads = tuple(WordTable.of(head, is_complex, dtype) for head in words)
        ends = np.cumsum([0, *(head.values.starts[-1] for head in heads)])
        starts = [head.values.starts[:-1] + end for head, end in zip(heads, ends[:-1], strict=True)]
        joined = (np.concatenate(columns) for columns in zip(*(head.values[1:] for head in heads), strict=True))
        firsts = np.cumsum([0, *map(len, starts)])
        values = Terms(np.concatenate([*starts, ends[-1:]]), *joined)
        return cls(heads, firsts, values, np.stack([head.place for head in heads]))


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
def _add_up(total, first, last, left, right, coefficient, a, b, lanes):
    """Adds the terms from `first` to `last` to `total`, `_AT_ONCE` at a time."""
    for e in range(first, last, 4):
        a0, a1, a2, a3 = a[left[e]], a[left[e + 1]], a[left[e + 2]], a[left[e + 3]]
        b0, b1, b2, b3 = b[right[e]], b[right[e + 1]], b[right[e + 2]], b[right[e + 3]]
        c0, c1, c2, c3 = coefficient[e], coefficient[e + 1], coefficient[e + 2], coefficient[e + 3]
        for t in range(lanes):
            total[t] += c0 * a0[t] * b0[t] + c1 * a1[t] * b1[t] + (c2 * a2[t] * b2[t] + c3 * a3[t] * b3[t])


@compiled
def measure(states, firsts, starts, left, right, coefficient, place, out, first, last):
    """The value of every word of every head, `out[head, token, word]`, in `states[head, row, token]`."""
    heads, rows, _ = states.shape
    most = 0
    for head in range(heads):
        most = max(most, firsts[head + 1] - firsts[head])
    block = np.zeros((rows, LANES), states.dtype)
    values = np.zeros((most, LANES), states.dtype)
    for head in range(heads):
        for begin in range(first, last, LANES):
            tokens = min(LANES, last - begin)
            lanes = (tokens + _VECTOR - 1) // _VECTOR * _VECTOR
            for row in range(rows):
                for t in range(tokens):
                    block[row, t] = states[head, row, begin + t]
            for word in range(firsts[head], firsts[head + 1]):
                total = values[word - firsts[head]]
                total[:] = 0
                _add_up(total, starts[word], starts[word + 1], left, right, coefficient, block, block, lanes)
            for t in range(tokens):
                for word in range(place.shape[1]):
                    out[head, begin + t, word] = values[place[head, word], t]


@compiled
def measure_backward(states, starts, left, right, coefficient, place, upstream, words, out, first, last):
    """The derivative of `sum(upstream * values)` by the states of one head, `out[row, token]`."""
    rows = states.shape[0]
    block = np.zeros((rows, LANES), states.dtype)
    weights = np.zeros((words, LANES), states.dtype)
    total = np.zeros(LANES, states.dtype)
    for begin in range(first, last, LANES):
        tokens = min(LANES, last - begin)
        lanes = (tokens + _VECTOR - 1) // _VECTOR * _VECTOR
        for row in range(rows):
            for t in range(tokens):
                block[row, t] = states[row, begin + t]
        weights[:] = 0
        for t in range(tokens):
            for word in range(len(place)):
                weights[place[word], t] += upstream[begin + t, word]
        for row in range(rows):
            total[:] = 0
            _add_up(total, starts[row], starts[row + 1], left, right, coefficient, weights, block, lanes)
            for t in range(tokens):
                out[row, begin + t] = total[t]
