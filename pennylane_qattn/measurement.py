r"""Pauli words of folded circuits, from the states: :math:`v_w = \langle a|M^\dagger P_w M|a\rangle`.

:math:`a` are the encoded amplitudes of a token, and :math:`M` takes them to the state. Here the words are evaluated in
the state, by kernels of the CPU; `Fold.readout` with `quadratic.py` does the same by changes of basis, on any device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn import kernels
from pennylane_qattn.observables import group_words
from pennylane_qattn.transforms import is_batched
from pennylane_qattn.word_kernels import WordTable, WordTables, measure, measure_backward

#: Elements of the states that are made at a time: a MiB in float32, which a second-level cache holds.
BLOCK_ELEMENTS = 2**18
#: Fewer tokens, as in generation, are done before a kernel has been called, if matrices are no larger than that.
FEWEST_TOKENS = 32
_SMALL_MATRICES = 2**16
#: What a term of a kernel costs, counted in multiplications of a matrix product.
_TERM_COST = 4
#: Rows of the states stand at addresses that do not fall together in the cache.
_APART = 16


class WordMeasurement:
    """The words of one or several heads, as many for each.

    Args:
        words: for each head its Pauli words.
        is_complex: whether states have imaginary amplitudes.
    """

    def __init__(self, words: Sequence[Sequence[str]], is_complex: bool):
        self.words, self.is_complex = [tuple(head) for head in words], is_complex
        self._tables: dict[torch.dtype, WordTables] = {}
        self._distinct = max(len(set(head)) for head in self.words)
        self._settings: int | None = None

    def serves(self, a: Float[Tensor, "#heads tokens amplitudes"]) -> bool:
        """Whether the words are evaluated here: kernels are there, and take less than changes of basis."""
        if not kernels.serve(a):
            return False
        if self._settings is None:
            self._settings = max(len(group_words(head)) for head in self.words)
        amplitudes, words = a.shape[-1], len(self.words[0])
        matrices = len(self.words) * self._settings * 2 ** len(self.words[0][0]) * amplitudes
        if a.shape[1] < FEWEST_TOKENS and matrices <= _SMALL_MATRICES:
            return False
        return amplitudes + _TERM_COST * self._distinct <= self._settings * (amplitudes + words)

    def __call__(
        self, a: Float[Tensor, "#heads tokens amplitudes"], rows: Float[Tensor, "heads rows amplitudes"]
    ) -> Float[Tensor, "heads tokens words"]:
        """The values of all words.

        Args:
            a: encoded amplitudes, one set for all heads or one for each.
            rows: :math:`M` of each head, real rows and, where states are complex, imaginary ones below.
        """
        return _Measure.apply(a, rows, self._of(a.dtype))

    def _of(self, dtype: torch.dtype) -> WordTables:
        if dtype not in self._tables:
            number = np.dtype(str(dtype).removeprefix("torch."))
            self._tables[dtype] = WordTables.of(self.words, self.is_complex, number)
        return self._tables[dtype]


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, rows: Tensor, tables: WordTables) -> Tensor:
        ctx.save_for_backward(a, rows)
        ctx.tables = tables.heads
        heads, tokens = rows.shape[0], a.shape[1]
        out = a.new_empty(heads, tokens, tables.place.shape[1])
        if heads * tokens <= _block_size(rows):  # a single call for all of them
            made = torch.bmm(rows, a.expand(heads, -1, -1).transpose(1, 2))
            kernels.run(measure, tokens, made, tables.firsts, *tables.values, tables.place, out)
            return out
        states = _buffer(rows, tokens)
        for head, inputs in enumerate(a.expand(heads, -1, -1)):
            firsts, place = tables.firsts[head : head + 2], tables.place[head : head + 1]
            for part in _blocks(inputs, rows):
                made = torch.mm(rows[head], inputs[part].T, out=states[:, : len(inputs[part])])
                into = out[head : head + 1, part]
                kernels.run(measure, made.shape[1], made[None], firsts, *tables.values, place, into)
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor):
        a, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see the formula
            with torch.autocast(upstream.device.type, enabled=False):
                inputs = [t for t, wanted in zip((a, rows), ctx.needs_input_grad, strict=False) if wanted]
                found = iter(torch.autograd.grad(plain_words(a, rows, ctx.tables), inputs, upstream, create_graph=True))
            return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:2]), None
        with torch.autocast(upstream.device.type, enabled=False):
            if is_batched(upstream):
                return *plain_gradients(a, rows, ctx.tables, upstream), None
            return _Measure._gradients(a, rows, ctx.tables, upstream.contiguous(), ctx.needs_input_grad[1])

    @staticmethod
    def _gradients(a: Tensor, rows: Tensor, tables: Sequence[WordTable], upstream: Tensor, rows_wanted: bool):
        by_inputs = a.new_empty(rows.shape[0], *a.shape[1:])
        by_rows = torch.zeros_like(rows) if rows_wanted else None
        states, slopes = _buffer(rows, a.shape[1]), _buffer(rows, a.shape[1])
        for head, inputs in enumerate(a.expand(len(rows), -1, -1)):
            table = tables[head]
            words = len(table.values.starts) - 1
            for part in _blocks(inputs, rows):
                tokens = len(inputs[part])
                made = torch.mm(rows[head], inputs[part].T, out=states[:, :tokens])
                slope = slopes[:, :tokens]
                above = upstream[head, part]
                kernels.run(measure_backward, tokens, made, *table.derivatives, table.place, above, words, slope)
                torch.mm(slope.T, rows[head], out=by_inputs[head, part])
                if rows_wanted:
                    by_rows[head].addmm_(slope, inputs[part])
        return by_inputs.sum_to_size(a.shape), by_rows, None


def plain_words(a: Tensor, rows: Tensor, tables: Sequence[WordTable]) -> Tensor:
    """The same in operations of torch, every product of amplitudes written out."""
    states = a @ rows.transpose(1, 2)
    found = []
    for head, table in zip(states, tables, strict=True):
        terms = table.values
        left, right, coefficient = (torch.as_tensor(t) for t in (terms.left, terms.right, terms.coefficient))
        of_word = torch.as_tensor(np.repeat(np.arange(len(terms.starts) - 1), np.diff(terms.starts)))
        products = head[:, left] * head[:, right] * coefficient
        sums = head.new_zeros(len(head), len(terms.starts) - 1).index_add(1, of_word, products)
        found.append(sums[:, torch.as_tensor(table.place)])
    return torch.stack(found)


def plain_gradients(a: Tensor, rows: Tensor, tables: Sequence[WordTable], upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of `sum(upstream * plain_words)` by `a` and `rows`, in operations that batched gradients take."""
    slopes = []
    for head, (states, table) in enumerate(zip(a @ rows.transpose(1, 2), tables, strict=True)):
        terms = table.derivatives
        word, row, coefficient = (torch.as_tensor(t) for t in (terms.left, terms.right, terms.coefficient))
        of_row = torch.as_tensor(np.repeat(np.arange(states.shape[1]), np.diff(terms.starts)))
        applied = states.new_zeros(len(states), len(table.values.starts) - 1, states.shape[1])  # 2 P_w s
        applied.flatten(1).index_add_(1, word * states.shape[1] + of_row, states[:, row] * coefficient)
        by_word = upstream[head] @ torch.nn.functional.one_hot(torch.as_tensor(table.place)).to(states.dtype)
        slopes.append((by_word[:, None] @ applied)[:, 0])
    by_states = torch.stack(slopes)
    by_inputs = by_states @ rows
    if a.shape[0] < rows.shape[0]:
        by_inputs = by_inputs.sum(0, keepdim=True)
    return by_inputs, by_states.transpose(1, 2) @ a


def _buffer(rows: Tensor, tokens: int) -> Tensor:
    return rows.new_empty(rows.shape[1], min(tokens, _block_size(rows)) + _APART)


def _block_size(rows: Tensor) -> int:
    return BLOCK_ELEMENTS // rows.shape[1] + 1


def _blocks(inputs: Tensor, rows: Tensor) -> list[slice]:
    size = _block_size(rows)
    return [slice(first, first + size) for first in range(0, len(inputs), size)]
