r"""Pauli words of folded circuits, from the states: :math:`v_w = \langle a|M^\dagger P_w M|a\rangle`.

:math:`a` are the encoded amplitudes of a token, and :math:`M` takes them to the state. Here the words are evaluated in
the state, by kernels of the CPU or of CUDA, or by what `torch.compile` makes for a GPU; `Fold.readout` with
`quadratic.py` does the same by changes of basis, on any device.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn import cuda_kernels, kernels
from pennylane_qattn.fused_words import FusedWords
from pennylane_qattn.observables import group_words
from pennylane_qattn.transforms import is_batched, ordinary_mode, without_autocast
from pennylane_qattn.word_kernels import WordPairs, measure, measure_backward, measure_few
from pennylane_qattn.word_tables import WordTable

#: Elements of the states that are made at a time: half a MiB in float32, which a second-level cache holds.
BLOCK_ELEMENTS = 2**17
#: The same on a GPU: a quarter of a GiB.
DEVICE_BLOCK_ELEMENTS = 2**26
#: So many tokens, as in generation, have a kernel that makes their states, too; then, up to a number that is worth two
#: calls, changes of basis take less if their matrices are no larger than that.
FEW_TOKENS = 4
FEWEST_TOKENS = 32
_SMALL_MATRICES = 2**16
#: What a term of a kernel costs, counted in multiplications of a matrix product.
_TERM_COST = 4
#: Devices for which compiled calls evaluate words in the state.
FUSED = ("cuda",)
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
        self._pairs: dict[torch.dtype, WordPairs] = {}
        self._tables: dict[torch.dtype, list[WordTable]] = {}
        self._on_devices: dict[tuple[torch.dtype, torch.device], cuda_kernels.DeviceWords] = {}
        self._fused: dict[tuple[torch.dtype, torch.device], FusedWords] = {}
        self._distinct = max(len(set(head)) for head in self.words)
        self._settings: int | None = None

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes what compiled calls need, ahead of the first."""
        if device.type in FUSED and (dtype, device) not in self._fused:
            with ordinary_mode():
                like, rows = torch.empty(0, dtype=dtype, device=device), 2 ** len(self.words[0][0])
                rows = 2 * rows if self.is_complex else rows
                self._fused[dtype, device] = FusedWords(self.tables(dtype), rows, like)
            self._count_settings()

    def keep_only(self, dtype: torch.dtype, device: torch.device) -> None:
        """Lets go of tables of other precisions and devices."""
        self._pairs = {of: pairs for of, pairs in self._pairs.items() if of == dtype}
        self._tables = {of: tables for of, tables in self._tables.items() if of == dtype}
        self._on_devices = {of: words for of, words in self._on_devices.items() if of == (dtype, device)}
        self._fused = {of: words for of, words in self._fused.items() if of == (dtype, device)}

    def serves(self, a: Float[Tensor, "#heads tokens amplitudes"]) -> bool:
        """Whether the words are evaluated here: kernels are there, and take less than changes of basis."""
        is_fused = torch.compiler.is_dynamo_compiling() and (a.dtype, a.device) in self._fused
        on_gpu = is_fused or cuda_kernels.serve(a)
        if not (on_gpu or kernels.serve(a)):
            return False
        settings, amplitudes, words = self._count_settings(), a.shape[-1], len(self.words[0])
        matrices = len(self.words) * settings * 2 ** len(self.words[0][0]) * amplitudes
        if not on_gpu and FEW_TOKENS < a.shape[1] < FEWEST_TOKENS and matrices <= _SMALL_MATRICES:
            return False
        return amplitudes + _TERM_COST * self._distinct <= settings * (amplitudes + words)

    def _count_settings(self) -> int:
        if self._settings is None:
            self._settings = max(len(group_words(head)) for head in self.words)
        return self._settings

    def __call__(
        self, a: Float[Tensor, "#heads tokens amplitudes"], rows: Float[Tensor, "heads rows amplitudes"]
    ) -> Float[Tensor, "heads tokens words"]:
        """The values of all words.

        Args:
            a: encoded amplitudes, one set for all heads or one for each.
            rows: :math:`M` of each head, real rows and, where states are complex, imaginary ones below.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._fused[a.dtype, a.device](rows @ a.transpose(1, 2))
        if not cuda_kernels.serve(a):
            pairs = self.pairs(a.dtype)
            return _Measure.apply(a, rows, pairs, self) if torch.is_grad_enabled() else _values(a, rows, pairs)
        if (a.dtype, a.device) not in self._on_devices:
            self._on_devices[a.dtype, a.device] = cuda_kernels.DeviceWords(self.tables(a.dtype), a)
        return _MeasureOnDevice.apply(a, rows, self._on_devices[a.dtype, a.device], self)

    def pairs(self, dtype: torch.dtype) -> WordPairs:
        """The words as kernels of the CPU read them."""
        if dtype not in self._pairs:
            self._pairs[dtype] = WordPairs.of(self.words, self.is_complex, _numpy_dtype(dtype))
        return self._pairs[dtype]

    def tables(self, dtype: torch.dtype) -> list[WordTable]:
        """The terms of each head's words."""
        if dtype not in self._tables:
            self._tables[dtype] = [WordTable.of(head, self.is_complex, _numpy_dtype(dtype)) for head in self.words]
        return self._tables[dtype]


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return np.dtype(str(dtype).removeprefix("torch."))


def _values(a: Tensor, rows: Tensor, pairs: WordPairs) -> Tensor:
    heads, tokens = rows.shape[0], a.shape[1]
    if tokens <= FEW_TOKENS:
        values = np.empty((heads, tokens, pairs.place.shape[1]), pairs.coefficients.dtype)
        kernels.run(measure_few, tokens, a.contiguous(), rows.contiguous(), *pairs, values)
        return torch.from_numpy(values)
    out = a.new_empty(heads, tokens, pairs.place.shape[1])
    if heads * tokens <= _block_size(rows):  # a single call for all of them
        made = torch.bmm(rows, a.expand(heads, -1, -1).transpose(1, 2))
        kernels.run(measure, tokens, made, *pairs, out)
        return out
    states = _buffer(rows, tokens)
    for head, inputs in enumerate(a.expand(heads, -1, -1)):
        of_head = pairs.of_head(head)
        for part in _blocks(inputs, rows):
            made = torch.mm(rows[head], inputs[part].T, out=states[:, : len(inputs[part])])
            kernels.run(measure, made.shape[1], made[None], *of_head, out[head : head + 1, part])
    return out


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, rows: Tensor, pairs: WordPairs, words: WordMeasurement) -> Tensor:
        ctx.save_for_backward(a, rows)
        ctx.pairs, ctx.words = pairs, words
        return _values(a, rows, pairs)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return *_gradients(ctx, upstream, _Measure._by_kernels), None, None

    @staticmethod
    def _by_kernels(ctx, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
        (a, rows), rows_wanted = ctx.saved_tensors, ctx.needs_input_grad[1]
        by_inputs = a.new_empty(rows.shape[0], *a.shape[1:])
        by_rows = torch.zeros_like(rows) if rows_wanted else None
        states, slopes = _buffer(rows, a.shape[1]), _buffer(rows, a.shape[1])
        for head, inputs in enumerate(a.expand(len(rows), -1, -1)):
            pairs = ctx.pairs.of_head(head)
            for part in _blocks(inputs, rows):
                tokens = len(inputs[part])
                made = torch.mm(rows[head], inputs[part].T, out=states[:, :tokens])
                slope = slopes[:, :tokens]
                kernels.run(measure_backward, tokens, made, *pairs, upstream[head, part], slope)
                torch.mm(slope.T, rows[head], out=by_inputs[head, part])
                if rows_wanted:
                    by_rows[head].addmm_(slope, inputs[part])
        return by_inputs.sum_to_size(a.shape), by_rows


class _MeasureOnDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, rows: Tensor, on_device: cuda_kernels.DeviceWords, words: WordMeasurement) -> Tensor:
        ctx.save_for_backward(a, rows)
        ctx.on_device, ctx.words = on_device, words
        parts = [on_device.values(states) for _, states in _states_on_device(a, rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return *_gradients(ctx, upstream, _MeasureOnDevice._by_kernels), None, None

    @staticmethod
    def _by_kernels(ctx, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
        (a, rows), rows_wanted = ctx.saved_tensors, ctx.needs_input_grad[1]
        by_inputs, by_rows = [], None
        for part, states in _states_on_device(a, rows):
            slopes = ctx.on_device.slopes(states, upstream[:, part])
            by_inputs.append(torch.bmm(slopes.transpose(1, 2), rows))
            if rows_wanted:
                own = torch.bmm(slopes, a[:, part].expand(len(rows), -1, -1))
                by_rows = own if by_rows is None else by_rows + own
        joined = by_inputs[0] if len(by_inputs) == 1 else torch.cat(by_inputs, dim=1)
        return joined.sum_to_size(a.shape), by_rows


def _states_on_device(a: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The states `(heads, rows, tokens)` of all heads, of as many tokens at a time as there is room for."""
    heads, height, _ = rows.shape
    size = max(1, DEVICE_BLOCK_ELEMENTS // (heads * height))
    for first in range(0, max(1, a.shape[1]), size):
        part = slice(first, first + size)
        yield part, torch.bmm(rows, a[:, part].expand(heads, -1, -1).transpose(1, 2))


def _gradients(ctx, upstream: Tensor, by_kernels: Callable) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by inputs and rows; by kernels, unless they are to be differentiated or are many at once."""
    a, rows = ctx.saved_tensors
    with without_autocast(upstream.device):
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see the formula
            wanted = ctx.needs_input_grad[:2]
            inputs = [t for t, needed in zip((a, rows), wanted, strict=True) if needed]
            found = iter(
                torch.autograd.grad(
                    plain_words(a, rows, ctx.words.tables(a.dtype)), inputs, upstream, create_graph=True
                )
            )
            by_inputs, by_rows = (next(found) if needed else None for needed in wanted)
            return by_inputs, by_rows
        if is_batched(upstream):
            return plain_gradients(a, rows, ctx.words.tables(a.dtype), upstream)
        return by_kernels(ctx, upstream.resolve_neg().contiguous())


def plain_words(a: Tensor, rows: Tensor, tables: Sequence[WordTable]) -> Tensor:
    """The same in operations of torch, every product of amplitudes written out."""
    states = a @ rows.transpose(1, 2)
    found = []
    for head, table in zip(states, tables, strict=True):
        terms = table.values
        left, right, coefficient, of_word, place = (
            torch.as_tensor(t, device=a.device)
            for t in (terms.left, terms.right, terms.coefficient, terms.of_sum, table.place)
        )
        products = head[:, left] * head[:, right] * coefficient
        sums = head.new_zeros(len(head), len(terms.starts) - 1).index_add(1, of_word, products)
        found.append(sums[:, place])
    return torch.stack(found)


def plain_gradients(a: Tensor, rows: Tensor, tables: Sequence[WordTable], upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of `sum(upstream * plain_words)` by `a` and `rows`, in operations that batched gradients take."""
    slopes = []
    for head, (states, table) in enumerate(zip(a @ rows.transpose(1, 2), tables, strict=True)):
        terms = table.derivatives
        word, row, coefficient, of_row, place = (
            torch.as_tensor(t, device=a.device)
            for t in (terms.left, terms.right, terms.coefficient, terms.of_sum, table.place)
        )
        applied = states.new_zeros(len(states), len(table.values.starts) - 1, states.shape[1])  # 2 P_w s
        applied.flatten(1).index_add_(1, word * states.shape[1] + of_row, states[:, row] * coefficient)
        by_word = upstream[head] @ torch.nn.functional.one_hot(place).to(states.dtype)
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
