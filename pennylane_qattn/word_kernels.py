r"""Pauli words of many states at once on the CPU, and their derivative: kernels for `measurement.py`.

A word takes amplitude :math:`b \oplus x` to :math:`b`, with the sign :math:`(-1)^{z \cdot b}`; :math:`x` marks its X
and Y, :math:`z` its Y and Z. Words of one :math:`x` are sums of the same products, with other signs,

.. math::

    \langle\psi|P_w|\psi\rangle = \sum_b c_{wb}\, \mathrm{Re}(\psi_b^* \psi_{b \oplus x}) \quad\text{or}\quad
    \sum_b c_{wb}\, \mathrm{Im}(\psi_b^* \psi_{b \oplus x}),

the imaginary part where the number of Y is odd; with :math:`x \ne 0` half of the :math:`b` do. Two such words at a time
share what they read. A state is a column of real numbers, real amplitudes and below them, if there are any, imaginary
ones. A word that is given several times is summed up once.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pennylane_qattn.kernels import compiled, inlined
from pennylane_qattn.simd import dot, item, lanes, load, splat, store

#: Which products two words sum up: squares of amplitudes; real parts, imaginary parts, or the first word real and the
#: second imaginary parts of products of two; and of real states squares, and products of two.
_SQUARES, _REAL, _IMAGINARY, _BOTH, _REAL_SQUARES, _REAL_PRODUCTS = range(6)


class WordPairs(NamedTuple):
    """The distinct words of all heads, two at a time.

    Attributes:
        firsts: where the twos of each head begin, and where those of the last one end.
        kinds: what each two of words sum up.
        words: `(twos, 2)`, their numbers within the head; `most` where there is no second.
        begins, ends: which of `rows` they sum up.
        offsets: where their coefficients begin.
        rows: `(products, 2)`, the two amplitudes of each product; those of an `x` after one another.
        coefficients: `(products, 2)`, for each two of words of all their products.
        place: `(heads, words)`, which distinct word stands for each word that was given.
        most: how many distinct words a head has at most.
    """

    firsts: np.ndarray
    kinds: np.ndarray
    words: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    coefficients: np.ndarray
    place: np.ndarray
    most: int

    @classmethod
    def of(cls, heads: Sequence[Sequence[str]], is_complex: bool, dtype: np.dtype) -> "WordPairs":
        """The words of all heads, as many for each.

        Args:
            heads: for each its Pauli words, on the same number of wires.
            is_complex: whether states have imaginary amplitudes.
            dtype: of the states.
        """
        distinct = [list(dict.fromkeys(words)) for words in heads]
        most, wires = max(map(len, distinct)), len(heads[0][0])
        states = np.arange(2**wires)
        signs = (-1) ** ((states[:, None] >> np.arange(wires)) & 1).sum(1)  # by the parity of a state
        ranges: dict[int, tuple[int, int]] = {}  # of each x, in `rows`
        rows, coefficients, twos, firsts, made = [], [], [], [0], 0
        for words in distinct:
            for x, (even, odd) in _grouped(words).items():
                once = states if not x else states[states & (1 << (x.bit_length() - 1)) == 0]
                if x not in ranges:
                    begin = max((end for _, end in ranges.values()), default=0)
                    ranges[x] = begin, begin + len(once)
                    rows.append(np.stack((once, once ^ x), axis=1))
                for kind, members in _by_twos(x, even, odd, is_complex):
                    table = np.zeros((len(once), 2), dtype)
                    for column, (_, z, factor) in enumerate(members):
                        table[:, column] = factor * (2 if x else 1) * signs[once & z]
                    numbers = [number for number, _, _ in members]
                    twos.append((kind, *(numbers + [most])[:2], *ranges[x], made))
                    coefficients.append(table)
                    made += len(table)
            firsts.append(len(twos))
        kinds, one, other, begins, ends, offsets = np.array(twos, np.int64).reshape(-1, 6).T.copy()
        return cls(
            firsts=np.array(firsts),
            kinds=kinds,
            words=np.stack((one, other), axis=1),
            begins=begins,
            ends=ends,
            offsets=offsets,
            rows=np.concatenate([np.zeros((0, 2), np.int64), *rows]),
            coefficients=np.concatenate([np.zeros((0, 2), dtype), *coefficients]),
            place=np.array([[own.index(word) for word in words] for words, own in zip(heads, distinct, strict=True)]),
            most=most,
        )

    def of_head(self, head: int) -> "WordPairs":
        """The same tables, for one head alone."""
        return self._replace(firsts=self.firsts[head : head + 2], place=self.place[head : head + 1])


#: Number of a word, its z, and the sign of (-i)^Y, or of what i it has.
_Member = tuple[int, int, int]


def _grouped(words: Sequence[str]) -> dict[int, tuple[list[_Member], list[_Member]]]:
    """By x: words with an even, and with an odd number of Y."""
    groups: dict[int, tuple[list[_Member], list[_Member]]] = defaultdict(lambda: ([], []))
    for number, word in enumerate(words):
        x, z = (int("".join("01"[letter in which] for letter in word), 2) for which in ("XY", "YZ"))
        turns = word.count("Y")
        groups[x][turns % 2].append((number, z, (-1) ** (turns // 2)))
    return dict(groups)


def _by_twos(
    x: int, even: list[_Member], odd: list[_Member], is_complex: bool
) -> Iterator[tuple[int, Sequence[_Member]]]:
    """The words of an x two by two, with what they sum up; the last may be alone."""
    if not is_complex:
        odd = []  # purely imaginary: 0 on real states
    if is_complex and x and len(even) % 2 and len(odd) % 2:
        yield _BOTH, (even[-1], odd[-1])
        even, odd = even[:-1], odd[:-1]
    of_even = (_REAL if x else _SQUARES) if is_complex else (_REAL_PRODUCTS if x else _REAL_SQUARES)
    for kind, members in ((of_even, even), (_IMAGINARY, odd)):
        for i in range(0, len(members), 2):
            yield kind, members[i : i + 2]


@inlined
def _read(states, begin, tokens, block):
    """The states of so many tokens, as many as there are lanes or fewer."""
    if tokens == lanes(block):
        for row in range(len(block)):
            store(block, row, 0, load(states, row, begin))
    else:
        for row in range(len(block)):
            for t in range(tokens):
                block[row, t] = states[row, begin + t]


@inlined
def sum_up(block, values, head, firsts, kinds, words, begins, ends, offsets, pairs, coefficients):
    """The values `(words, lane)` of a head's distinct words in the states `(rows, lane)` of a block."""
    nothing, dim = splat(block.dtype.type(0)), len(block) // 2
    for two in range(firsts[head], firsts[head + 1]):
        kind, to, a, b = kinds[two], offsets[two] - begins[two], nothing, nothing
        if kind == _SQUARES:
            for p in range(begins[two], ends[two]):
                i = item(pairs, p, 0)
                x, y = load(block, i, 0), load(block, dim + i, 0)
                x = x * x + y * y
                a = a + splat(item(coefficients, to + p, 0)) * x
                b = b + splat(item(coefficients, to + p, 1)) * x
        elif kind == _REAL:
            for p in range(begins[two], ends[two]):
                i, j = item(pairs, p, 0), item(pairs, p, 1)
                x = load(block, i, 0) * load(block, j, 0) + load(block, dim + i, 0) * load(block, dim + j, 0)
                a = a + splat(item(coefficients, to + p, 0)) * x
                b = b + splat(item(coefficients, to + p, 1)) * x
        elif kind == _IMAGINARY:
            for p in range(begins[two], ends[two]):
                i, j = item(pairs, p, 0), item(pairs, p, 1)
                x = load(block, i, 0) * load(block, dim + j, 0) - load(block, dim + i, 0) * load(block, j, 0)
                a = a + splat(item(coefficients, to + p, 0)) * x
                b = b + splat(item(coefficients, to + p, 1)) * x
        elif kind == _BOTH:
            for p in range(begins[two], ends[two]):
                i, j = item(pairs, p, 0), item(pairs, p, 1)
                x, y, u, v = (
                    load(block, i, 0),
                    load(block, dim + i, 0),
                    load(block, j, 0),
                    load(block, dim + j, 0),
                )
                a = a + splat(item(coefficients, to + p, 0)) * (x * u + y * v)
                b = b + splat(item(coefficients, to + p, 1)) * (x * v - y * u)
        else:  # of real states
            for p in range(begins[two], ends[two]):
                x = load(block, item(pairs, p, 0), 0) * load(block, item(pairs, p, 1), 0)
                a = a + splat(item(coefficients, to + p, 0)) * x
                b = b + splat(item(coefficients, to + p, 1)) * x
        store(values, words[two, 0], 0, a)
        store(values, words[two, 1], 0, b)


@inlined
def _write_out(values, place, head, out, begin, tokens):
    """To every word that was given, and so many tokens, the value of the distinct word that stands for it."""
    for t in range(tokens):
        for word in range(place.shape[1]):
            out[head, begin + t, word] = item(values, item(place, head, word), t)


@compiled
def measure(
    states, firsts, kinds, words, begins, ends, offsets, pairs, coefficients, place, most, out, first, last
):  # fmt: skip
    """The value of every word of every head, `out[head, token, word]`, in `states[head, row, token]`."""
    heads, rows, _ = states.shape
    step = lanes(states)
    block, values = np.zeros((rows, step), states.dtype), np.zeros((most + 1, step), states.dtype)
    for head in range(heads):
        values[:] = 0  # of words that no two has
        for begin in range(first, last, step):
            tokens = min(step, last - begin)
            _read(states[head], begin, tokens, block)
            sum_up(block, values, head, firsts, kinds, words, begins, ends, offsets, pairs, coefficients)
            _write_out(values, place, head, out, begin, tokens)


@compiled
def measure_few(
    a, matrices, firsts, kinds, words, begins, ends, offsets, pairs, coefficients, place, most, out, first, last
):  # fmt: skip
    """The same of the states `matrices[head] @ a[head, token]`, or of `a[0, token]` where all heads have the same.

    One call in place of two, for few tokens, whose states are made one by one.
    """
    (heads, rows, _), step = matrices.shape, lanes(matrices)
    block, values = np.zeros((rows, step), a.dtype), np.zeros((most + 1, step), a.dtype)
    nothing = splat(a.dtype.type(0))
    for head in range(heads):
        values[:] = 0
        matrix, inputs = matrices[head], a[head % len(a)]
        for begin in range(first, last, step):
            tokens = min(step, last - begin)
            for t in range(tokens):
                for row in range(rows):
                    block[row, t] = dot(matrix, row, inputs, begin + t, nothing)
            sum_up(block, values, head, firsts, kinds, words, begins, ends, offsets, pairs, coefficients)
            _write_out(values, place, head, out, begin, tokens)


@compiled
def measure_backward(
    states, firsts, kinds, words, begins, ends, offsets, pairs, coefficients, place, most, upstream, out, first, last
):  # fmt: skip
    """The derivative of `sum(upstream * values)` by the states of one head, `out[row, token]`."""
    rows, step = states.shape[0], lanes(states)
    two_, dim = splat(states.dtype.type(2)), rows // 2
    block, slopes = np.zeros((rows, step), states.dtype), np.zeros((rows, step), states.dtype)
    weights = np.zeros((most + 1, step), states.dtype)
    for begin in range(first, last, step):
        tokens = min(step, last - begin)
        _read(states, begin, tokens, block)
        weights[:], slopes[:] = 0, 0
        for t in range(tokens):
            for word in range(place.shape[1]):
                weights[item(place, 0, word), t] += upstream[begin + t, word]
        for two in range(firsts[0], firsts[1]):
            kind, to = kinds[two], offsets[two] - begins[two]
            a, b = load(weights, words[two, 0], 0), load(weights, words[two, 1], 0)
            if kind == _SQUARES:
                a, b = two_ * a, two_ * b
                for p in range(begins[two], ends[two]):
                    i = item(pairs, p, 0)
                    g = splat(item(coefficients, to + p, 0)) * a + splat(item(coefficients, to + p, 1)) * b
                    store(slopes, i, 0, load(slopes, i, 0) + g * load(block, i, 0))
                    store(slopes, dim + i, 0, load(slopes, dim + i, 0) + g * load(block, dim + i, 0))
            elif kind == _REAL:
                for p in range(begins[two], ends[two]):
                    i, j = item(pairs, p, 0), item(pairs, p, 1)
                    g = splat(item(coefficients, to + p, 0)) * a + splat(item(coefficients, to + p, 1)) * b
                    store(slopes, i, 0, load(slopes, i, 0) + g * load(block, j, 0))
                    store(slopes, j, 0, load(slopes, j, 0) + g * load(block, i, 0))
                    store(slopes, dim + i, 0, load(slopes, dim + i, 0) + g * load(block, dim + j, 0))
                    store(slopes, dim + j, 0, load(slopes, dim + j, 0) + g * load(block, dim + i, 0))
            elif kind == _IMAGINARY:
                for p in range(begins[two], ends[two]):
                    i, j = item(pairs, p, 0), item(pairs, p, 1)
                    g = splat(item(coefficients, to + p, 0)) * a + splat(item(coefficients, to + p, 1)) * b
                    store(slopes, i, 0, load(slopes, i, 0) + g * load(block, dim + j, 0))
                    store(slopes, dim + j, 0, load(slopes, dim + j, 0) + g * load(block, i, 0))
                    store(slopes, dim + i, 0, load(slopes, dim + i, 0) - g * load(block, j, 0))
                    store(slopes, j, 0, load(slopes, j, 0) - g * load(block, dim + i, 0))
            elif kind == _BOTH:
                for p in range(begins[two], ends[two]):
                    i, j = item(pairs, p, 0), item(pairs, p, 1)
                    g, h = splat(item(coefficients, to + p, 0)) * a, splat(item(coefficients, to + p, 1)) * b
                    x, y, u, v = load(block, i, 0), load(block, dim + i, 0), load(block, j, 0), load(block, dim + j, 0)
                    store(slopes, i, 0, load(slopes, i, 0) + g * u + h * v)
                    store(slopes, dim + i, 0, load(slopes, dim + i, 0) + g * v - h * u)
                    store(slopes, j, 0, load(slopes, j, 0) + g * x - h * y)
                    store(slopes, dim + j, 0, load(slopes, dim + j, 0) + g * y + h * x)
            elif kind == _REAL_SQUARES:
                a, b = two_ * a, two_ * b
                for p in range(begins[two], ends[two]):
                    i = item(pairs, p, 0)
                    g = splat(item(coefficients, to + p, 0)) * a + splat(item(coefficients, to + p, 1)) * b
                    store(slopes, i, 0, load(slopes, i, 0) + g * load(block, i, 0))
            else:
                for p in range(begins[two], ends[two]):
                    i, j = item(pairs, p, 0), item(pairs, p, 1)
                    g = splat(item(coefficients, to + p, 0)) * a + splat(item(coefficients, to + p, 1)) * b
                    store(slopes, i, 0, load(slopes, i, 0) + g * load(block, j, 0))
                    store(slopes, j, 0, load(slopes, j, 0) + g * load(block, i, 0))
        if tokens == step:
            for row in range(rows):
                store(out, row, begin, load(slopes, row, 0))
        else:
            for row in range(rows):
                for t in range(tokens):
                    out[row, begin + t] = slopes[row, t]
