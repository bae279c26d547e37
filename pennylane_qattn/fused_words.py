r"""Pauli words of many states in plain operations of torch, for calls that `torch.compile` compiles for a GPU.

The sums of `word_tables.py`, read by gathers: a compiler makes one kernel of it, which writes no product. The gradient
is the formula of that module too, since the derivative that autograd has of a gather adds up in no fixed order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pennylane_qattn.word_tables import Terms, WordTable


@dataclass(frozen=True)
class _Sums:
    """Sums of products, as many terms for each; sums of all heads, whose rows stand below one another."""

    left: Int[Tensor, "heads sums terms"]
    right: Int[Tensor, "heads sums terms"]
    coefficient: Float[Tensor, "heads sums terms 1"]

    @classmethod
    def of(cls, heads: Sequence[Terms], lefts: int, rights: int, like: Tensor) -> "_Sums":
        """The sums of every head, of factors among `lefts` and `rights` rows of each; short ones are filled with 0."""
        sizes = [np.diff(terms.starts) for terms in heads]
        most = max(int(size.max(initial=1)) for size in sizes)
        left, right, coefficient = (np.zeros((len(heads), max(map(len, sizes)), most)) for _ in range(3))
        for head, terms in enumerate(heads):
            of_sum = terms.of_sum
            place = np.arange(len(of_sum)) - terms.starts[:-1][of_sum]
            left[head, of_sum, place] = terms.left + head * lefts
            right[head, of_sum, place] = terms.right + head * rights
            coefficient[head, of_sum, place] = terms.coefficient
        left, right = (torch.as_tensor(index, dtype=torch.int64, device=like.device) for index in (left, right))
        return cls(left, right, torch.as_tensor(coefficient[..., None], dtype=like.dtype, device=like.device))

    def __call__(
        self, left: Float[Tensor, "heads lefts tokens"], right: Float[Tensor, "heads rights tokens"]
    ) -> Float[Tensor, "heads sums tokens"]:
        return (left.flatten(0, 1)[self.left] * right.flatten(0, 1)[self.right] * self.coefficient).sum(2)


class FusedWords:
    """The words of every head.

    Args:
        tables: one for each head.
        rows: numbers of a state.
        like: a tensor of the dtype and on the device of the states.
    """

    def __init__(self, tables: Sequence[WordTable], rows: int, like: Tensor):
        words = max(len(table.values.starts) - 1 for table in tables)
        self.values = _Sums.of([table.values for table in tables], rows, rows, like)
        self.derivatives = _Sums.of([table.derivatives for table in tables], words, rows, like)
        #: Which distinct word each given one is, as a matrix; `None` where all are distinct.
        self.repeats: Tensor | None = None
        if any(len(table.place) > len(table.values.starts) - 1 for table in tables):
            self.repeats = torch.zeros(len(tables), words, len(tables[0].place), dtype=like.dtype, device=like.device)
            for head, table in enumerate(tables):
                self.repeats[head, table.place, range(len(table.place))] = 1

    def __call__(self, states: Float[Tensor, "heads rows tokens"]) -> Float[Tensor, "heads tokens words"]:
        """The value of every word."""
        distinct = _Fused.apply(states, self).transpose(1, 2)
        return distinct if self.repeats is None else distinct @ self.repeats


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, words: FusedWords) -> Tensor:
        ctx.save_for_backward(states)
        ctx.words = words
        return words.values(states, states)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (states,) = ctx.saved_tensors
        return ctx.words.derivatives(upstream, states), None
