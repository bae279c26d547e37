r"""Pauli words as sums of products, one by one: for CUDA, for `torch.compile`, and for operations of torch.

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

from pennylane_qattn.observables import word_action

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
    def of(
        cls,
        of_sum: np.ndarray,
        left: np.ndarray,
        right: np.ndarray,
        coefficient: np.ndarray,
        number: int,
        dtype: np.dtype,
    ) -> "Terms":
        """The terms of so many sums, filled up with terms of coefficient 0; `of_sum` is to which each one belongs."""
        order = np.argsort(of_sum, kind="stable")
        of_sum = of_sum[order]
        sizes = np.bincount(of_sum, minlength=number)
        starts, firsts = (np.concatenate(([0], np.cumsum(each))) for each in (sizes + -sizes % _AT_ONCE, sizes))
        place = starts[of_sum] + np.arange(len(of_sum)) - firsts[of_sum]
        filled = [np.zeros(starts[-1], kind) for kind in (np.int64, np.int64, dtype)]
        for column, given in zip(filled, (left, right, coefficient), strict=True):
            column[place] = given[order]
        return cls(starts, *filled)

    @classmethod
    def joined(cls, parts: Sequence["Terms"]) -> "Terms":
        """The sums of all parts, one after the other."""
        ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
        starts = [part.starts[:-1] + end for part, end in zip(parts, ends[:-1], strict=True)]
        columns = (np.concatenate(column) for column in zip(*(part[1:] for part in parts), strict=True))
        return cls(np.concatenate([*starts, ends[-1:]]), *columns)

    @property
    def of_sum(self) -> np.ndarray:
        """To which sum each term belongs."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def take(self, sums: np.ndarray) -> "Terms":
        """Some of the sums, in this order; one of them may come twice."""
        sizes = np.diff(self.starts)[sums]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        terms = np.arange(starts[-1]) + np.repeat(self.starts[:-1][sums] - starts[:-1], sizes)
        return Terms(starts, *(column[terms] for column in self[1:]))


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
        products = [_products(word, is_complex) for word in distinct]
        left, right, coefficient = (np.concatenate(column) for column in zip(*products, strict=True))
        number = np.repeat(np.arange(len(distinct)), [len(rows) for rows, _, _ in products])
        upper = left <= right  # the matrix of the form is symmetric
        doubled = coefficient * (1 + (left < right))
        values = Terms.of(number[upper], left[upper], right[upper], doubled[upper], len(distinct), dtype)
        rows = 2 * dim if is_complex else dim
        derivatives = Terms.of(left, number, right, 2 * coefficient, rows, dtype)
        place = np.array([distinct.index(word) for word in words], dtype=np.int64)
        return cls(values, derivatives, place)


def _products(word: str, is_complex: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All entries of the symmetric matrix of a word's form: rows, columns and values."""
    source, phases = word_action(word)
    dim, states = len(source), np.arange(len(source))
    if phases[0].imag:  # an odd number of Y
        if not is_complex:
            return states[:0], states[:0], np.zeros(0)
        # Re(-i c (x_b - i y_b)(x_o + i y_o)) = c (x_b y_o - y_b x_o)
        found = ((states, dim + source, -phases.imag), (dim + states, source, phases.imag))
    else:
        found = ((states, source, phases.real), (dim + states, dim + source, phases.real))
    left, right, coefficient = (np.concatenate(column) for column in zip(*found[: 1 + is_complex], strict=True))
    return left, right, coefficient
