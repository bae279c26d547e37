"""A whole attention of one token per text on the CPU, as in generation: the kernel for `token_attention.py`.

Query, key and value are made of the embedding, key and value written into the cache, the row is attended, and the heads
are projected: one call, since at the size of one token it is calls that take the time. What is made of a product with a
matrix stands with texts side by side, one in each lane of a vector.
"""

import numpy as np

from pennylane_qattn.distance_kernels import attend_row
from pennylane_qattn.encoding import normalise_rows
from pennylane_qattn.kernels import compiled, inlined
from pennylane_qattn.simd import dot, item, lanes, load, rows_at, splat, store
from pennylane_qattn.word_kernels import sum_up

#: What stands in `places`, all of them addresses, and 0 for what is not there: the embedding; weight and bias, or the
#: features themselves, of the queries, of the keys and of the values; where values are forms, their matrices and what
#: squares are multiplied by, without which they are words; what values are made of; keys and values in the cache;
#: weight and bias of the output projection; the result.
_X, _Q, _Q_BIAS, _Q_GIVEN, _K, _K_BIAS, _K_GIVEN, _V, _V_BIAS, _V_GIVEN = range(10)
_MATRICES, _SQUARES, _INPUTS, _KEYS, _VALUES, _OUT, _OUT_BIAS, _RESULT = range(10, 18)
#: What stands in `sizes`: texts; heads; widths of the embedding, of queries and keys, and of values; tokens in the
#: cache, and for how many it has room; rows of a head's matrix, 0 if values are no forms; how wide what values are made
#: of is, its rows, and how many of them lie between one head, and one text, and the next.
_TEXTS, _HEADS, _EMBED, _FEATURES, _OUTPUTS, _PAST, _ROOM, _ROWS, _WIDTH, _NUMBER, _BY_HEAD, _BY_TEXT = range(12)
#: From so many texts on a product of matrix and vectors is summed up for all of them at once.
_MANY = 5


@inlined
def _multiply(matrix, first, rows, x, begin, by_text, texts, columns, nothing, out):
    """`out[row, text] = matrix[first + row] @ x[begin + text * by_text]`; `columns` is room for `x` turned."""
    if texts < _MANY:
        for row in range(rows):
            for text in range(texts):
                out[row, text] = dot(matrix, first + row, x, begin + text * by_text, nothing)
        return
    width = matrix.shape[1]
    for text in range(texts):
        for c in range(width):
            columns[c, text] = item(x, begin + text * by_text, c)
    for row in range(0, rows // 4 * 4, 4):
        a, b, c, d, at = nothing, nothing, nothing, nothing, first + row
        for i in range(width):
            y = load(columns, i, 0)
            a, b = a + splat(item(matrix, at, i)) * y, b + splat(item(matrix, at + 1, i)) * y
            c, d = c + splat(item(matrix, at + 2, i)) * y, d + splat(item(matrix, at + 3, i)) * y
        store(out, row, 0, a)
        store(out, row + 1, 0, b)
        store(out, row + 2, 0, c)
        store(out, row + 3, 0, d)
    for row in range(rows // 4 * 4, rows):
        a = nothing
        for i in range(width):
            a = a + splat(item(matrix, first + row, i)) * load(columns, i, 0)
        store(out, row, 0, a)


@inlined
def _project(weight, bias, given, rows, x, texts, columns, nothing, like, out):
    """`out[row, text] = (weight @ x[text] + bias)[row]`, or what is given, all by their addresses."""
    if given:
        features = rows_at(given, texts, rows, like)
        for text in range(texts):
            for row in range(rows):
                out[row, text] = item(features, text, row)
        return
    _multiply(rows_at(weight, rows, x.shape[1], like), 0, rows, x, 0, 1, texts, columns, nothing, out)
    if bias:
        offsets = rows_at(bias, 1, rows, like)
        for row in range(rows):
            store(out, row, 0, load(out, row, 0) + splat(item(offsets, 0, row)))


@inlined
def _turn(made, texts, heads, width, to, begin, step):
    """Writes what was made of a token, `made[(head, feature), text]`, to every `step`-th row of another array."""
    for text in range(texts):
        for head in range(heads):
            row = begin + (text * heads + head) * step
            for feature in range(width):
                to[row, feature] = item(made, head * width + feature, text)


@inlined
def _sum_squares(block, readout, head, forms, nothing, like, found):
    """The forms `(forms, lane)` of the states `(rows, lane)` of a block, the readout by its address."""
    rows = len(block)
    factors = rows_at(readout, (head + 1) * rows, forms, like)
    for row in range(rows):
        store(block, row, 0, load(block, row, 0) * load(block, row, 0))
    for form in range(forms):
        sums = nothing
        for row in range(rows):
            sums = sums + splat(item(factors, head * rows + row, form)) * load(block, row, 0)
        store(found, form, 0, sums)


@compiled
def attend_token(
    places, sizes, betas, is_double, least, is_product, is_raw,
    firsts, kinds, words, begins, ends, offsets, pairs, coefficients, place, most,
):  # fmt: skip
    """The attention of the next token of every text, its key and value written into the cache.

    Args:
        places, sizes: as listed above; no more texts than a vector has lanes.
        betas: one for each head, or one for all.
        is_double: exponents are exponentials.
        least: exponents below are taken for this one; it has the dtype of all numbers.
        is_product: exponents are of products, not of distances (`distance_kernels.attend_row`).
        is_raw: what forms are made of is still to be divided by its norm.
        firsts, ...: the words (`word_kernels.WordPairs`).
    """
    texts, heads, embed = sizes[_TEXTS], sizes[_HEADS], sizes[_EMBED]
    width, outputs, length, rows = sizes[_FEATURES], sizes[_OUTPUTS], sizes[_ROOM], sizes[_ROWS]
    dtype, nothing, step = betas.dtype, splat(betas.dtype.type(0)), lanes(betas)
    x = rows_at(places[_X], texts, embed, least)
    inputs = rows_at(places[_INPUTS], sizes[_NUMBER], sizes[_WIDTH], least)
    keys = rows_at(places[_KEYS], texts * heads * length, width, least)
    values = rows_at(places[_VALUES], texts * heads * length, outputs, least)
    columns = np.zeros((max(embed, sizes[_WIDTH], heads * outputs), step), dtype)
    made = np.zeros((max(embed, heads * width, heads * outputs), step), dtype)
    near, mixed = np.empty((texts * heads, width), dtype), np.empty((texts * heads, outputs), dtype)

    _project(places[_Q], places[_Q_BIAS], places[_Q_GIVEN], heads * width, x, texts, columns, nothing, least, made)
    _turn(made, texts, heads, width, near, 0, 1)
    _project(places[_K], places[_K_BIAS], places[_K_GIVEN], heads * width, x, texts, columns, nothing, least, made)
    _turn(made, texts, heads, width, keys, sizes[_PAST], length)
    if rows:
        if is_raw:
            unit = np.empty(inputs.shape, dtype)
            normalise_rows(inputs, unit, np.empty((0, 1), dtype), 0, len(inputs))
            inputs = unit
        matrices = rows_at(places[_MATRICES], heads * rows, sizes[_WIDTH], least)
        block, found = np.zeros((rows, step), dtype), np.zeros((max(most + 1, outputs), step), dtype)
        for head in range(heads):
            found[:] = 0  # of words that no two has
            begin = head * sizes[_BY_HEAD]
            _multiply(matrices, head * rows, rows, inputs, begin, sizes[_BY_TEXT], texts, columns, nothing, block)
            if places[_SQUARES]:
                _sum_squares(block, places[_SQUARES], head, outputs, nothing, least, found)
            else:
                sum_up(block, found, head, firsts, kinds, words, begins, ends, offsets, pairs, coefficients)
            for form in range(outputs):
                number = form if places[_SQUARES] else item(place, head, form)
                store(made, head * outputs + form, 0, load(found, number, 0))
    else:
        _project(
            places[_V], places[_V_BIAS], places[_V_GIVEN], heads * outputs, inputs, texts, columns, nothing, least, made
        )
    _turn(made, texts, heads, outputs, values, sizes[_PAST], length)

    seen = sizes[_PAST] + 1
    weights, row = np.zeros((1, -(-seen // step) * step), dtype), np.zeros((1, step), dtype)
    for pair in range(texts * heads):
        begin, beta = pair * length, betas[pair % len(betas)]
        attend_row(
            near, pair, keys, begin, 1, values, begin, 1, seen,
            beta, is_double, least, is_product, weights, row, mixed, pair,
        )  # fmt: skip

    result, joined = rows_at(places[_RESULT], texts, embed, least), mixed.reshape(texts, heads * outputs)
    _project(places[_OUT], places[_OUT_BIAS], 0, embed, joined, texts, columns, nothing, least, made)
    _turn(made, texts, 1, embed, result, 0, 1)
