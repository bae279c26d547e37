r"""Attention by distances on the CPU, and its derivative: kernels for `distance_attention.py`.

With :math:`d_{ij} = \lVert q_i - k_j \rVert^2`, the exponents :math:`a_{ij}` are :math:`\exp(-d_{ij})` or
:math:`-\beta d_{ij}`, and

.. math::

    w_{ij} = \exp(a_{ij} - l_i), \qquad \mathrm{out}_i = \sum_j w_{ij} v_j, \qquad
    \frac{\partial L}{\partial a_{ij}} = w_{ij}\, g_i \cdot (v_j - \mathrm{out}_i),

:math:`l_i` being the logarithm of the sum of a row's exponentials and :math:`g` the derivative by `out`. A head of one
sequence stays in the processor's cache while four queries at a time go over its keys; nothing is made of queries times
keys. Distances are sums of squared differences, which lose no digits where two vectors are close.
"""

import numpy as np

from pennylane_qattn.kernels import compiled, inlined
from pennylane_qattn.simd import dot, exp, lanes, largest, load, maximum, rows_at, splat, store, total, where_first

#: What stands in each row of a kernel's `places`: where a tensor's first row is in memory, how many rows there are and
#: how wide they are, and how many lie between one batch, head and token and the next.
_ADDRESS, _NUMBER, _WIDTH, _BATCH, _HEAD, _TOKEN = range(6)


@inlined
def _tensor(places, i, like):
    """The rows of a tensor."""
    return rows_at(places[i, _ADDRESS], places[i, _NUMBER], places[i, _WIDTH], like)


@inlined
def _place(pair, heads, place):
    """The row of the first token of a pair of batch and head."""
    return pair // heads * place[_BATCH] + pair % heads * place[_HEAD]


@inlined
def _copy(rows, first, step, number, into):
    """So many rows of an array, `step` apart, into the first columns of another's."""
    width = rows.shape[1]
    if width % lanes(rows) == 0:
        for i in range(number):
            for c in range(0, width, lanes(rows)):
                store(into, i, c, load(rows, first + i * step, c))
    else:
        for i in range(number):
            for c in range(width):
                into[i, c] = rows[first + i * step, c]


@inlined
def _give(row, number, out, first, step):
    """So many rows of an array to where another has them, `step` apart, without what fills them up."""
    width = out.shape[1]
    if width % lanes(out) == 0:
        for i in range(number):
            for c in range(0, width, lanes(out)):
                store(out, first + i * step, c, load(row, i, c))
    else:
        for i in range(number):
            for c in range(width):
                out[first + i * step, c] = row[i, c]


@inlined
def _transpose(rows, first, step, number, into):
    for i in range(number):
        for c in range(rows.shape[1]):
            into[c, i] = rows[first + i * step, c]


@inlined
def _distances(columns, j, q, width, nothing):
    """Negative squared distances of four queries to a vector of keys."""
    d0, d1, d2, d3 = nothing, nothing, nothing, nothing
    for c in range(width):
        k = load(columns, c, j)
        e0, e1, e2, e3 = k - splat(q[0, c]), k - splat(q[1, c]), k - splat(q[2, c]), k - splat(q[3, c])
        d0, d1, d2, d3 = d0 - e0 * e0, d1 - e1 * e1, d2 - e2 * e2, d3 - e3 * e3
    return d0, d1, d2, d3


@inlined
def _exponents(distances, is_double, beta, least):
    """Of the softmax, from negative squared distances."""
    if is_double:
        return exp(maximum(distances, least))
    return splat(beta) * distances


@compiled
def attend_forward(places, logarithms, sizes, betas, is_double, least, is_causal, first, last):
    """The weighted sums of pairs `first` to `last` of batch and head.

    Args:
        places: of queries, keys, values and results.
        logarithms: `(pairs, queries)`, the :math:`l_i`; `(pairs, 0)` where nobody wants them.
        sizes: heads, queries, keys; queries are the last of the keys.
        betas: one for each head, or one for all.
        is_double: exponents are exponentials.
        least: exponents below are taken for this one.
        is_causal: a query sees no later key.
    """
    q, k = _tensor(places, 0, least), _tensor(places, 1, least)
    v, out = _tensor(places, 2, least), _tensor(places, 3, least)
    heads, queries, keys = sizes[0], sizes[1], sizes[2]
    dtype, width, values, step = q.dtype, q.shape[1], v.shape[1], lanes(q)
    room, wide = -(-keys // step) * step, -(-values // step) * step
    nothing, lowest, far = splat(dtype.type(0)), splat(least), splat(dtype.type(-np.inf))
    columns, held = np.zeros((width, room), dtype), np.zeros((keys, wide), dtype)
    near, weights, row = np.zeros((4, width), dtype), np.zeros((4, room), dtype), np.zeros((4, wide), dtype)
    tops, sums = np.zeros(4, dtype), np.zeros(4, dtype)
    for pair in range(first, last):
        beta, place = betas[pair % len(betas)], _place(pair, heads, places[3])
        _transpose(k, _place(pair, heads, places[1]), places[1, _TOKEN], keys, columns)
        _copy(v, _place(pair, heads, places[2]), places[2, _TOKEN], keys, held)
        for begin in range(0, queries, 4):
            rows = min(4, queries - begin)
            _copy(q, _place(pair, heads, places[0]) + begin * places[0, _TOKEN], places[0, _TOKEN], rows, near)
            seen = keys - queries + begin + 1 if is_causal else keys  # by the first of these queries
            more = 1 if is_causal else 0
            most = seen + more * (rows - 1)
            m0, m1, m2, m3 = far, far, far, far
            for j in range(0, most, step):
                x0, x1, x2, x3 = _distances(columns, j, near, width, nothing)
                left = seen - j
                x0 = where_first(left, _exponents(x0, is_double, beta, lowest), far)
                x1 = where_first(left + more, _exponents(x1, is_double, beta, lowest), far)
                x2 = where_first(left + 2 * more, _exponents(x2, is_double, beta, lowest), far)
                x3 = where_first(left + 3 * more, _exponents(x3, is_double, beta, lowest), far)
                m0, m1, m2, m3 = maximum(m0, x0), maximum(m1, x1), maximum(m2, x2), maximum(m3, x3)
                store(weights, 0, j, x0)
                store(weights, 1, j, x1)
                store(weights, 2, j, x2)
                store(weights, 3, j, x3)
            tops[0], tops[1], tops[2], tops[3] = largest(m0), largest(m1), largest(m2), largest(m3)
            for i in range(4):
                part = nothing
                for j in range(0, most, step):
                    x = exp(maximum(load(weights, i, j) - splat(tops[i]), lowest))
                    x = where_first(seen + i * more - j, x, nothing)
                    part = part + x
                    store(weights, i, j, x)
                sums[i] = total(part)
            for c in range(0, wide, step):
                o0, o1, o2, o3 = nothing, nothing, nothing, nothing
                for j in range(most):
                    x = load(held, j, c)
                    o0, o1 = o0 + splat(weights[0, j]) * x, o1 + splat(weights[1, j]) * x
                    o2, o3 = o2 + splat(weights[2, j]) * x, o3 + splat(weights[3, j]) * x
                store(row, 0, c, o0 / splat(sums[0]))
                store(row, 1, c, o1 / splat(sums[1]))
                store(row, 2, c, o2 / splat(sums[2]))
                store(row, 3, c, o3 / splat(sums[3]))
            _give(row, rows, out, place + begin * places[3, _TOKEN], places[3, _TOKEN])
            for i in range(min(rows, logarithms.shape[1] - begin)):
                logarithms[pair, begin + i] = tops[i] + np.log(sums[i])


@inlined
def attend_row(
    q, query, k, key, key_step, v, value, value_step, keys, beta, is_double, least, is_product, weights, row, out, place
):  # fmt: skip
    """The weighted sum of one query's row into a row of `out`; `weights` and `row` are room for numbers.

    With `is_product`, products of query and keys stand for the negative squares of their distances.
    """
    width, values, step = q.shape[1], v.shape[1], lanes(q)
    room, whole, wide = weights.shape[1], width // step * step, values // step * step
    nothing, lowest, far = splat(q.dtype.type(0)), splat(least), splat(q.dtype.type(-np.inf))
    for j in range(keys):
        at, sums = key + j * key_step, nothing
        if is_product:
            weights[0, j] = dot(q, query, k, at, nothing)
            continue
        for c in range(0, whole, step):
            e = load(q, query, c) - load(k, at, c)
            sums = sums - e * e
        distance = total(sums)
        for c in range(whole, width):
            distance -= (q[query, c] - k[at, c]) ** 2
        weights[0, j] = distance
    top = far
    for j in range(0, room, step):
        x = where_first(keys - j, _exponents(load(weights, 0, j), is_double, beta, lowest), far)
        top = maximum(top, x)
        store(weights, 0, j, x)
    highest, part = splat(largest(top)), nothing
    for j in range(0, room, step):
        x = where_first(keys - j, exp(maximum(load(weights, 0, j) - highest, lowest)), nothing)
        part = part + x
        store(weights, 0, j, x)
    sums = total(part)
    for c in range(0, wide, step):
        o = nothing
        for j in range(keys):
            o = o + splat(weights[0, j]) * load(v, value + j * value_step, c)
        store(row, 0, 0, o)
        for i in range(step):
            out[place, c + i] = row[0, i] / sums
    for c in range(wide, values):
        o = q.dtype.type(0)
        for j in range(keys):
            o += weights[0, j] * v[value + j * value_step, c]
        out[place, c] = o / sums


@compiled
def attend_one(places, sizes, betas, is_double, least, first, last):
    """The same for a single query that sees every key, as in generation; a key is read once and copied nowhere."""
    q, k = _tensor(places, 0, least), _tensor(places, 1, least)
    v, out = _tensor(places, 2, least), _tensor(places, 3, least)
    heads, keys = sizes[0], sizes[2]
    dtype, step = q.dtype, lanes(q)
    weights, row = np.zeros((1, -(-keys // step) * step), dtype), np.zeros((1, step), dtype)
    for pair in range(first, last):
        beta, place = betas[pair % len(betas)], _place(pair, heads, places[3])
        query, key, value = (
            _place(pair, heads, places[0]),
            _place(pair, heads, places[1]),
            _place(pair, heads, places[2]),
        )
        key_step, value_step = places[1, _TOKEN], places[2, _TOKEN]
        attend_row(
            q, query, k, key, key_step, v, value, value_step, keys,
            beta, is_double, least, False, weights, row, out, place,
        )  # fmt: skip


@compiled
def attend_backward(places, logarithms, by_beta, sizes, betas, is_double, least, is_causal, first, last):
    """The derivatives of `sum(upstream * out)` by queries, keys, values and, for each pair, beta.

    Args:
        places: of queries, keys, values, results, upstream, and the derivatives by the first three.
        logarithms: as `attend_forward` left them.
        by_beta: one number for each pair; left alone where exponents are exponentials.
        sizes, betas, is_double, is_causal, least: as there.
    """
    q, k = _tensor(places, 0, least), _tensor(places, 1, least)
    v, out = _tensor(places, 2, least), _tensor(places, 3, least)
    upstream, by_q = _tensor(places, 4, least), _tensor(places, 5, least)
    by_k, by_v = _tensor(places, 6, least), _tensor(places, 7, least)
    heads, queries, keys = sizes[0], sizes[1], sizes[2]
    dtype, width, values, step = q.dtype, q.shape[1], v.shape[1], lanes(q)
    room, broad, wide = -(-keys // step) * step, -(-width // step) * step, -(-values // step) * step
    nothing, lowest, two = splat(dtype.type(0)), splat(least), splat(dtype.type(2))
    columns, value_columns = np.zeros((width, room), dtype), np.zeros((values, room), dtype)
    held, by_held = np.zeros((keys, broad), dtype), np.zeros((keys, broad), dtype)
    by_values, by_keys = np.zeros((keys, wide), dtype), np.zeros((1, room), dtype)
    near, above, row = np.zeros((4, broad), dtype), np.zeros((4, wide), dtype), np.zeros((4, broad), dtype)
    weights, slopes = np.zeros((4, room), dtype), np.zeros((4, room), dtype)
    along, logs, sums = np.zeros(4, dtype), np.zeros(4, dtype), np.zeros(4, dtype)
    for pair in range(first, last):
        beta = betas[pair % len(betas)]
        _transpose(k, _place(pair, heads, places[1]), places[1, _TOKEN], keys, columns)
        _copy(k, _place(pair, heads, places[1]), places[1, _TOKEN], keys, held)
        _transpose(v, _place(pair, heads, places[2]), places[2, _TOKEN], keys, value_columns)
        by_held[:], by_values[:], by_keys[:] = 0, 0, 0
        turned = nothing
        for begin in range(0, queries, 4):
            rows = min(4, queries - begin)
            _copy(q, _place(pair, heads, places[0]) + begin * places[0, _TOKEN], places[0, _TOKEN], rows, near)
            _copy(upstream, _place(pair, heads, places[4]) + begin * places[4, _TOKEN], places[4, _TOKEN], rows, above)
            above[rows:] = 0  # rows that are no queries contribute nothing
            for i in range(rows):
                at, sum_ = _place(pair, heads, places[3]) + (begin + i) * places[3, _TOKEN], dtype.type(0)
                for c in range(values):
                    sum_ += above[i, c] * out[at, c]
                along[i], logs[i] = sum_, logarithms[pair, begin + i]
            along[rows:] = 0
            seen = keys - queries + begin + 1 if is_causal else keys
            more = 1 if is_causal else 0
            most = seen + more * (rows - 1)
            t0, t1, t2, t3 = nothing, nothing, nothing, nothing
            for j in range(0, most, step):
                d0, d1, d2, d3 = _distances(columns, j, near, width, nothing)
                x0, x1 = _exponents(d0, is_double, beta, lowest), _exponents(d1, is_double, beta, lowest)
                x2, x3 = _exponents(d2, is_double, beta, lowest), _exponents(d3, is_double, beta, lowest)
                left = seen - j
                w0 = where_first(left, exp(maximum(x0 - splat(logs[0]), lowest)), nothing)
                w1 = where_first(left + more, exp(maximum(x1 - splat(logs[1]), lowest)), nothing)
                w2 = where_first(left + 2 * more, exp(maximum(x2 - splat(logs[2]), lowest)), nothing)
                w3 = where_first(left + 3 * more, exp(maximum(x3 - splat(logs[3]), lowest)), nothing)
                store(weights, 0, j, w0)
                store(weights, 1, j, w1)
                store(weights, 2, j, w2)
                store(weights, 3, j, w3)
                g0, g1, g2, g3 = splat(-along[0]), splat(-along[1]), splat(-along[2]), splat(-along[3])
                for c in range(values):
                    x = load(value_columns, c, j)
                    g0, g1 = g0 + splat(above[0, c]) * x, g1 + splat(above[1, c]) * x
                    g2, g3 = g2 + splat(above[2, c]) * x, g3 + splat(above[3, c]) * x
                w0, w1, w2, w3 = w0 * g0, w1 * g1, w2 * g2, w3 * g3
                if is_double:
                    w0, w1, w2, w3 = w0 * x0, w1 * x1, w2 * x2, w3 * x3
                else:
                    turned = turned + w0 * d0 + w1 * d1 + (w2 * d2 + w3 * d3)
                    factor = splat(beta)
                    w0, w1, w2, w3 = w0 * factor, w1 * factor, w2 * factor, w3 * factor
                store(slopes, 0, j, w0)
                store(slopes, 1, j, w1)
                store(slopes, 2, j, w2)
                store(slopes, 3, j, w3)
                t0, t1, t2, t3 = t0 + w0, t1 + w1, t2 + w2, t3 + w3
                store(by_keys, 0, j, load(by_keys, 0, j) + (w0 + w1) + (w2 + w3))
            sums[0], sums[1], sums[2], sums[3] = total(t0), total(t1), total(t2), total(t3)
            for c in range(0, broad, step):
                q0, q1, q2, q3 = load(near, 0, c), load(near, 1, c), load(near, 2, c), load(near, 3, c)
                o0, o1 = nothing - splat(sums[0]) * q0, nothing - splat(sums[1]) * q1
                o2, o3 = nothing - splat(sums[2]) * q2, nothing - splat(sums[3]) * q3
                for j in range(most):
                    x, y = load(held, j, c), load(by_held, j, c)
                    s0, s1, s2, s3 = splat(slopes[0, j]), splat(slopes[1, j]), splat(slopes[2, j]), splat(slopes[3, j])
                    o0, o1, o2, o3 = o0 + s0 * x, o1 + s1 * x, o2 + s2 * x, o3 + s3 * x
                    store(by_held, j, c, y + s0 * q0 + s1 * q1 + (s2 * q2 + s3 * q3))
                store(row, 0, c, two * o0)
                store(row, 1, c, two * o1)
                store(row, 2, c, two * o2)
                store(row, 3, c, two * o3)
            _give(row, rows, by_q, _place(pair, heads, places[5]) + begin * places[5, _TOKEN], places[5, _TOKEN])
            for c in range(0, wide, step):
                g0, g1, g2, g3 = load(above, 0, c), load(above, 1, c), load(above, 2, c), load(above, 3, c)
                for j in range(most):
                    w0, w1 = splat(weights[0, j]), splat(weights[1, j])
                    w2, w3 = splat(weights[2, j]), splat(weights[3, j])
                    store(by_values, j, c, load(by_values, j, c) + w0 * g0 + w1 * g1 + (w2 * g2 + w3 * g3))
        for j in range(keys):
            factor = splat(by_keys[0, j])
            for c in range(0, broad, step):
                store(by_held, j, c, two * (load(by_held, j, c) - factor * load(held, j, c)))
        _give(by_held, keys, by_k, _place(pair, heads, places[6]), places[6, _TOKEN])
        _give(by_values, keys, by_v, _place(pair, heads, places[7]), places[7, _TOKEN])
        if not is_double:
            by_beta[pair] = total(turned)
