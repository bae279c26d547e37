r"""Kernels for CUDA, written in Triton, which comes with torch's builds for it: what `kernels.py` is for the CPU.

A GPU that is handed little work waits for every operation to be started. Here preparing vectors, and the Pauli words of
all heads, are one operation each. Without Triton, in other precisions, under `torch.compile` and under `torch.func`,
torch computes the same values by itself.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn.kernels import SWITCH
from pennylane_qattn.transforms import is_plain, is_transformed, ordinary_mode
from pennylane_qattn.word_tables import Terms, WordTable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

#: Tokens of a program of `_word_values` and `_word_slopes`, one per lane; and words, or rows, that it works off.
_LANES, _SUMS = 128, 8
#: Numbers that a program of the other kernels holds; longer vectors are left to torch.
_HELD = 4096


def serve(*tensors: Tensor) -> bool:
    """Whether kernels are there, and can work on these: float32 or float64 on a CUDA device, no transformed call."""
    if triton is None or os.environ.get(SWITCH, "1") == "0" or is_transformed():
        return False
    return all(t.is_cuda and t.dtype in (torch.float32, torch.float64) and is_plain(t) for t in tensors)


def serve_vectors(*tensors: Tensor) -> bool:
    """The same, for kernels that hold whole vectors, which must not be too long."""
    return serve(*tensors) and tensors[0].shape[-1] <= _HELD // 2


def _rows_at_once(width: int) -> tuple[int, int]:
    """Vectors of a program, and the power of two that holds one."""
    held = triton.next_power_of_2(width)
    return max(1, _HELD // held // 4), held


if triton is not None:

    def compiled(function: Callable) -> Any:
        # tests wrap every function of the package to check its shapes; the compiler wants the function itself
        return triton.jit(inspect.unwrap(function))

    @compiled
    def _normalise_rows(x, unit, inverse, number, width, ROWS: tl.constexpr, HELD: tl.constexpr):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = tl.arange(0, HELD)[None, :]
        there = (row < number) & (column < width)
        values = tl.load(x + row * width + column, mask=there, other=0.0)
        # dividing by the largest entry first keeps squares of tiny and huge vectors from under- and overflowing
        largest = tl.max(tl.abs(values), axis=1)[:, None]
        is_zero = largest == 0.0
        scaled = values / tl.where(is_zero, 1.0, largest)
        total = tl.sum(scaled * scaled, axis=1)[:, None]
        factor = 1.0 / tl.sqrt(tl.where(is_zero, 1.0, total))
        result = tl.where(is_zero & (column == 0), 1.0, scaled * factor)
        tl.store(unit + row * width + column, result, mask=there)
        of_norm = tl.where(is_zero, 0.0, factor / tl.where(is_zero, 1.0, largest))
        tl.store(inverse + row, of_norm, mask=row < number)

    @compiled
    def _normalise_rows_backward(
        upstream, unit, inverse, gradient, number, width, ROWS: tl.constexpr, HELD: tl.constexpr
    ):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = tl.arange(0, HELD)[None, :]
        there = (row < number) & (column < width)
        direction = tl.load(unit + row * width + column, mask=there, other=0.0)
        above = tl.load(upstream + row * width + column, mask=there, other=0.0)
        factor = tl.load(inverse + row, mask=row < number, other=0.0)
        along = tl.sum(direction * above, axis=1)[:, None]
        tl.store(gradient + row * width + column, (above - direction * along) * factor, mask=there)

    @compiled
    def _augment(
        x,
        factor,
        norm_factor,
        out,
        number,
        width,
        heads,
        seq,
        by_batch,
        by_head,
        by_seq,
        NORM: tl.constexpr,
        ONE: tl.constexpr,
        OTHER_ONE: tl.constexpr,
        WIDE: tl.constexpr,
        ROWS: tl.constexpr,
        HELD: tl.constexpr,
    ):
        # a row of the output is a head of a token, in the order (batch, seq, head)
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = tl.arange(0, HELD)[None, :]
        head, token = row % heads, row // heads
        source = token // seq * by_batch + token % seq * by_seq + head * by_head
        is_row = row < number
        values = tl.load(x + source + column, mask=is_row & (column < width), other=0.0)
        result = tl.load(factor + head, mask=is_row, other=0.0) * values
        result = tl.where((column == width + ONE) | (column == width + OTHER_ONE), 1.0, result)
        if NORM >= 0:
            norm = tl.sum(values * values, axis=1)[:, None] * tl.load(norm_factor + head, mask=is_row, other=0.0)
            result = tl.where(column == width + NORM, norm, result)
        tl.store(out + row * WIDE + column, result, mask=is_row & (column < WIDE))

    @compiled
    def _augment_backward(
        out,
        upstream,
        factor,
        norm_factor,
        gradient,
        number,
        width,
        heads,
        seq,
        by_batch,
        by_head,
        by_seq,
        by_column,
        NORM: tl.constexpr,
        WIDE: tl.constexpr,
        ROWS: tl.constexpr,
        HELD: tl.constexpr,
    ):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = tl.arange(0, HELD)[None, :]
        head, token = row % heads, row // heads
        source = token // seq * by_batch + token % seq * by_seq + head * by_head
        is_row = row < number
        there = is_row & (column < width)
        scale = tl.load(factor + head, mask=is_row, other=1.0)
        result = scale * tl.load(upstream + source + column * by_column, mask=there, other=0.0)
        if NORM >= 0:
            by_norm = tl.load(upstream + source + (width + NORM) * by_column, mask=is_row, other=0.0)
            values = tl.load(out + row * WIDE + column, mask=there, other=0.0) / scale
            result += 2.0 * values * by_norm * tl.load(norm_factor + head, mask=is_row, other=0.0)
        tl.store(gradient + row * width + column, result, mask=there)

    @compiled
    def _word_values(
        states, starts, left, right, coefficient, out, tokens, words, rows, SUMS: tl.constexpr, LANES: tl.constexpr
    ):
        head = tl.program_id(0).to(tl.int64)
        lane = (tl.program_id(2) * LANES + tl.arange(0, LANES)).to(tl.int64)
        there = lane < tokens
        states += head * rows * tokens + lane
        for i in range(SUMS):
            word = tl.program_id(1) * SUMS + i
            if word < words:
                first, last = tl.load(starts + head * words + word), tl.load(starts + head * words + word + 1)
                total = tl.zeros((LANES,), dtype=out.dtype.element_ty)
                for e in range(first, last, 4):
                    for k in tl.static_range(4):
                        a = tl.load(states + tl.load(left + e + k).to(tl.int64) * tokens, mask=there, other=0.0)
                        b = tl.load(states + tl.load(right + e + k).to(tl.int64) * tokens, mask=there, other=0.0)
                        total += tl.load(coefficient + e + k) * a * b
                tl.store(out + (head * tokens + lane) * words + word, total, mask=there)

    @compiled
    def _word_slopes(
        states,
        upstream,
        starts,
        word,
        right,
        coefficient,
        out,
        tokens,
        words,
        rows,
        SUMS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        head = tl.program_id(0).to(tl.int64)
        lane = (tl.program_id(2) * LANES + tl.arange(0, LANES)).to(tl.int64)
        there = lane < tokens
        states += head * rows * tokens + lane
        upstream += head * words * tokens + lane
        for i in range(SUMS):
            row = tl.program_id(1) * SUMS + i
            if row < rows:
                first, last = tl.load(starts + head * rows + row), tl.load(starts + head * rows + row + 1)
                total = tl.zeros((LANES,), dtype=out.dtype.element_ty)
                for e in range(first, last, 4):
                    for k in tl.static_range(4):
                        a = tl.load(upstream + tl.load(word + e + k).to(tl.int64) * tokens, mask=there, other=0.0)
                        b = tl.load(states + tl.load(right + e + k).to(tl.int64) * tokens, mask=there, other=0.0)
                        total += tl.load(coefficient + e + k) * a * b
                tl.store(out + (head * rows + row) * tokens + lane, total, mask=there)


# --- vectors ----------------------------------------------------------------------------------------------------


def normalise(x: Float[Tensor, "*batch features"]) -> tuple[Tensor, Tensor]:
    """Unit vectors, and one over the norms; the zero vector gives the first basis vector, and 0."""
    x = x.contiguous()
    unit, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    number, width = inverse.numel(), x.shape[-1]
    if number:
        rows, held = _rows_at_once(width)
        with torch.cuda.device_of(x):
            _normalise_rows[triton.cdiv(number, rows),](x, unit, inverse, number, width, ROWS=rows, HELD=held)
    return unit, inverse


def normalise_backward(
    upstream: Float[Tensor, "*batch features"],
    unit: Float[Tensor, "*batch features"],
    inverse: Float[Tensor, "*batch 1"],
) -> Float[Tensor, "*batch features"]:
    """The gradient by what was normalised."""
    upstream, unit, inverse = upstream.contiguous(), unit.contiguous(), inverse.contiguous()
    gradient = torch.empty_like(unit)
    number, width = inverse.numel(), unit.shape[-1]
    if number:
        rows, held = _rows_at_once(width)
        with torch.cuda.device_of(unit):
            _normalise_rows_backward[triton.cdiv(number, rows),](
                upstream, unit, inverse, gradient, number, width, ROWS=rows, HELD=held
            )
    return gradient


def augment(
    x: Float[Tensor, "batch heads seq features"],
    factor: Float[Tensor, " heads"],
    norm_factor: Float[Tensor, " heads"],
    norm: int | None,
    ones: Sequence[int],
    width: int,
) -> Float[Tensor, "batch heads seq prepared"]:
    """What `augmentation.augment` says; at most two ones."""
    batch, heads, seq, features = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(batch, seq, heads, width)
    nowhere = -features - 1
    first, second = (*ones, nowhere, nowhere)[:2]
    if number := batch * seq * heads:
        rows, held = _rows_at_once(width)
        with torch.cuda.device_of(x):
            _augment[triton.cdiv(number, rows),](
                *(x, factor.contiguous(), norm_factor.contiguous(), out),
                *(number, features, heads, seq, x.stride(0), x.stride(1), x.stride(2)),
                NORM=-1 if norm is None else norm,
                ONE=first,
                OTHER_ONE=second,
                WIDE=width,
                ROWS=rows,
                HELD=held,
            )
    return out.transpose(1, 2)


@cache
def constant(number: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """So many times the same number, made once."""
    with ordinary_mode():
        return torch.full((number,), value, dtype=dtype, device=device)


def augment_backward(
    out: Float[Tensor, "batch heads seq prepared"],
    upstream: Float[Tensor, "batch heads seq prepared"],
    factor: Float[Tensor, " heads"],
    norm_factor: Float[Tensor, " heads"],
    norm: int | None,
    features: int,
) -> Float[Tensor, "batch heads seq features"]:
    """The gradient by `x`, from what `augment` gave."""
    batch, heads, seq, width = out.shape
    ordered = out.transpose(1, 2).contiguous()  # as `augment` wrote it, unless a hook for saved tensors copied it
    gradient = out.new_empty(batch, seq, heads, features)
    if number := batch * seq * heads:
        rows, held = _rows_at_once(width)
        with torch.cuda.device_of(out):
            _augment_backward[triton.cdiv(number, rows),](
                *(ordered, upstream, factor.contiguous(), norm_factor.contiguous(), gradient),
                *(number, features, heads, seq),
                *(upstream.stride(0), upstream.stride(1), upstream.stride(2), upstream.stride(3)),
                NORM=-1 if norm is None else norm,
                WIDE=width,
                ROWS=rows,
                HELD=held,
            )
    return gradient.transpose(1, 2)


# --- words ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Sums of products one after the other, those of all heads; `word_tables.Terms` on the device."""

    starts: Tensor
    left: Tensor
    right: Tensor
    coefficient: Tensor

    @classmethod
    def of(cls, heads: Sequence[Terms], like: Tensor) -> "_Sums":
        terms = Terms.joined(heads)

        def places(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, dtype=torch.int32, device=like.device)

        numbers = torch.as_tensor(terms.coefficient, dtype=like.dtype, device=like.device)
        return cls(places(terms.starts), places(terms.left), places(terms.right), numbers)


class DeviceWords:
    """The words of all heads, as kernels of a device take them.

    Args:
        tables: of each head.
        like: a tensor of the states' precision, on their device.
    """

    def __init__(self, tables: Sequence[WordTable], like: Tensor):
        self.words = len(tables[0].place)
        self._values = _Sums.of([table.values.take(table.place) for table in tables], like)
        self._derivatives = _Sums.of([_by_given_words(table) for table in tables], like)

    def values(self, states: Float[Tensor, "heads rows tokens"]) -> Float[Tensor, "heads tokens words"]:
        """The values of the words."""
        heads, rows, tokens = states.shape
        out = states.new_empty(heads, tokens, self.words)
        grid = heads, triton.cdiv(self.words, _SUMS), triton.cdiv(tokens, _LANES)
        sums = self._values
        if out.numel():
            with torch.cuda.device_of(states):
                _word_values[grid](
                    *(states, sums.starts, sums.left, sums.right, sums.coefficient, out),
                    *(tokens, self.words, rows),
                    SUMS=_SUMS,
                    LANES=_LANES,
                )
        return out

    def slopes(
        self, states: Float[Tensor, "heads rows tokens"], upstream: Float[Tensor, "heads tokens words"]
    ) -> Float[Tensor, "heads rows tokens"]:
        """The gradient of `sum(upstream * values)` by the states."""
        heads, rows, tokens = states.shape
        out, above = torch.empty_like(states), upstream.transpose(1, 2).contiguous()
        grid = heads, triton.cdiv(rows, _SUMS), triton.cdiv(tokens, _LANES)
        sums = self._derivatives
        if out.numel():
            with torch.cuda.device_of(states):
                _word_slopes[grid](
                    *(states, above, sums.starts, sums.left, sums.right, sums.coefficient, out),
                    *(tokens, self.words, rows),
                    SUMS=_SUMS,
                    LANES=_LANES,
                )
        return out


def _by_given_words(table: WordTable) -> Terms:
    """The derivatives' terms, where a word that is given several times has a gradient for each."""
    terms, of_row = table.derivatives, table.derivatives.of_sum
    there = terms.coefficient != 0
    of_row, word, right, coefficient = (t[there] for t in (of_row, terms.left, terms.right, terms.coefficient))
    times = np.bincount(table.place, minlength=len(table.values.starts) - 1)
    places, firsts = np.argsort(table.place, kind="stable"), np.cumsum(times) - times
    repeats = times[word]
    of_row, word, right, coefficient = (np.repeat(t, repeats) for t in (of_row, word, right, coefficient))
    which = np.arange(len(word)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    given = places[firsts[word] + which]
    return Terms.of(of_row, given, right, coefficient, len(terms.starts) - 1, coefficient.dtype)
