"""Attention of one token per text in one call of a kernel, as generation needs it.

The calls that it stands for have so little to do that they take several times as long. It serves scores of distances
and products on the CPU, for a few texts at a time, without padding, positions or gradients. Features that have a recipe
(`recipes.py`) are made by the kernel, others before it. Everything else goes the way of `attention.py`, and so does
what has hooks, as they would not be called.

The kernel knows addresses alone, so whatever it reads has its shape, precision and place in memory checked here.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pennylane_qattn import kernels
from pennylane_qattn.features import FeatureMap, LinearFeatureMap
from pennylane_qattn.neighbours import join_neighbours
from pennylane_qattn.precision import cast
from pennylane_qattn.recipes import Affine, Forms, Recipe, affine, is_as_written
from pennylane_qattn.simd import BITS
from pennylane_qattn.token_kernels import attend_token
from pennylane_qattn.transforms import is_plain
from pennylane_qattn.word_kernels import WordPairs

if TYPE_CHECKING:
    from pennylane_qattn.attention import Attention, KeyValueCache
    from pennylane_qattn.scores import Score

#: Most multiplications by weights, times the threads that torch has beside the first, which the kernel does alone.
MOST_WORK = 2**24
_NO_WORDS = {
    dtype: WordPairs.of([["Z"]], False, np.dtype(name))
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
}
#: What a score is made of: one that was given another of these is no longer what its class says.
_OF_A_SCORE = {"queries", "keys", "sides", "normalise", "has_kernel", "attend_by_kernel", "token_exponents"}


def attend(
    attention: "Attention", x: Float[Tensor, "batch 1 embed"], cache: "KeyValueCache"
) -> Float[Tensor, "batch 1 embed"] | None:
    """The attention of the next token of each text, which the cache holds afterwards; `None`, and nothing is changed,
    if no kernel serves it."""
    if not kernels.serve(x) or x.shape[0] > most_texts(x.dtype):
        return None
    parts = attention._modules
    maps = parts["query_map"], parts["key_map"], parts["value_map"]
    if not _is_served(parts["score"]) or not all([isinstance(part, FeatureMap) for part in maps]):
        return None
    drops = attention.training and attention.dropout
    if drops or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    room, out = cache.room_for_next(x.shape[0]), affine(parts["out_proj"])
    if room is None or out is None:
        return None

    x, joined, recent = x.contiguous(), x.contiguous(), None
    if attention.span > 1:
        joined, recent = join_neighbours(x, attention.span, recent=cache.recent, past=room[2])
        joined = joined.contiguous()
    # Queries and keys are made of an affine map or given: no mechanism has a use for more.
    q, k = (part.recipe(x) if isinstance(part, LinearFeatureMap) else None for part in maps[:2])
    v = maps[2].recipe(joined)
    sizes = _Sizes.of(attention, x, room, joined, v)
    betas, is_double, least, is_product = parts["score"].token_exponents(x.dtype)
    is_right = len(betas) in (1, sizes.heads) and sizes.work * (torch.get_num_threads() - 1) <= MOST_WORK
    if not is_right or not _are_held(sizes, x.dtype, room, out, q, k, v):
        return None

    inputs, forms, is_raw, words = joined, (None, None), False, _NO_WORDS[x.dtype]
    if isinstance(v, Forms):
        inputs, forms, is_raw = _in_rows(v.inputs), (v.matrices, v.squares), v.is_raw
        words = v.readout if isinstance(v.readout, WordPairs) else words
    of_queries, of_keys = (_made_of(recipe, part, x, sizes.heads) for recipe, part in ((q, maps[0]), (k, maps[1])))
    of_values, result = _made_of(v, maps[2], joined, sizes.heads), torch.empty_like(x)
    # in the order that `token_kernels.py` gives; they are held here until the kernel has read them
    read = (x, *of_queries, *of_keys, *of_values, *forms, inputs, *room[:2], *out, result)
    places = tuple([0 if tensor is None else tensor.data_ptr() for tensor in read])
    attend_token(places, tuple(sizes), betas, is_double, least, is_product, is_raw, *words)
    cache.count_next()
    if attention.span > 1:
        cache.recent = recent
    return result


def most_texts(dtype: torch.dtype) -> int:
    """How many texts the kernel takes: one in each lane of a vector."""
    return BITS // (8 * dtype.itemsize)


class _Sizes(NamedTuple):
    """What the kernel knows of sizes, in the order that `token_kernels.py` gives."""

    texts: int
    heads: int
    embed: int
    features: int
    outputs: int
    past: int
    room: int
    rows: int
    width: int
    number: int
    by_head: int
    by_text: int

    @classmethod
    def of(cls, attention: "Attention", x: Tensor, room: tuple, joined: Tensor, v: Recipe | None) -> "_Sizes":
        (texts, _, embed), heads, length = x.shape, attention.num_heads, room[0].shape[2]
        rows, width, number, by_head, by_text = 0, joined.shape[2], texts, 0, 1
        if isinstance(v, Forms):
            inputs = _in_rows(v.inputs)
            rows, width = v.matrices.shape[1], inputs.shape[2]
            (sets, tokens, _), (by_set, by_token, _) = inputs.shape, inputs.stride()
            # of a single set or token the stride is of no meaning
            by_head, by_text = by_set // width if sets > 1 else 0, by_token // width if tokens > 1 else 0
            number = 1 + (sets - 1) * by_head + (tokens - 1) * by_text
        features, outputs = attention._modules["query_map"].out_features, attention.head_dim
        return cls(texts, heads, embed, features, outputs, room[2], length, rows, width, number, by_head, by_text)

    @property
    def work(self) -> int:
        """Multiplications by weights."""
        of_values = self.rows * self.width if self.rows else self.outputs * self.width
        return self.texts * self.heads * (self.embed * (2 * self.features + self.outputs) + of_values)


def _is_served(score: "Score") -> bool:
    """Whether the kernel knows the score: by its very class, and as that class has it."""
    kind = type(score)
    known = vars(kind).get("has_token_kernel") and is_as_written(score, kind.forward)
    return bool(known) and not (_OF_A_SCORE & vars(score).keys())


def _are_held(
    sizes: _Sizes,
    dtype: torch.dtype,
    room: tuple[Tensor, Tensor, int],
    out: Affine,
    q: Affine | None,
    k: Affine | None,
    v: Recipe | None,
) -> bool:
    """Whether all that the kernel reads by its address has the shape that it is taken to have, and lies in order."""
    texts, heads, embed, features, outputs, _, length, rows, width = sizes[:9]
    needed = [
        (room[0], (texts, heads, length, features)),
        (room[1], (texts, heads, length, outputs)),
        *((out.weight, (embed, heads * outputs)), (out.bias, (embed,))),
    ]
    for recipe, made, read in ((q, features, embed), (k, features, embed), (v, outputs, width)):
        if isinstance(recipe, Affine):
            needed += [(recipe.weight, (heads * made, read)), (recipe.bias, (heads * made,))]
    if isinstance(v, Forms):
        needed += [(v.matrices, (heads, rows, width)), (v.squares, (heads, rows, outputs))]
        if isinstance(v.readout, WordPairs) and v.readout.place.shape != (heads, outputs):
            return False
        inputs = v.inputs
        if inputs.dtype != dtype or not inputs.is_cpu or not is_plain(inputs):
            return False
        if inputs.shape[0] not in (1, heads) or inputs.shape[1] != texts:
            return False
    return all([tensor is None or _is_held(tensor, shape, dtype) for tensor, shape in needed])


def _is_held(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the tensor's numbers lie where its address says, one after another."""
    is_dense = tensor.shape == shape and tensor.dtype == dtype and tensor.is_cpu and tensor.layout == torch.strided
    return is_dense and is_plain(tensor) and tensor.is_contiguous()


def _made_of(
    recipe: Recipe | None, feature_map: nn.Module, x: Float[Tensor, "batch 1 embed"], heads: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight and bias, or the features themselves; nothing for forms."""
    if isinstance(recipe, Affine):
        return *recipe, None
    if isinstance(recipe, Forms):
        return None, None, None
    features = cast(feature_map(x), x.dtype).expand(len(x), heads, 1, feature_map.out_features)
    return None, None, features.contiguous()


def _in_rows(inputs: Float[Tensor, "#heads tokens amplitudes"]) -> Float[Tensor, "#heads tokens amplitudes"]:
    """The same with whole rows between one token or head and the next, as they are unless they must be copied."""
    width = inputs.shape[2]
    if inputs.stride(2) == 1 and not (inputs.stride(0) % width or inputs.stride(1) % width):
        return inputs
    return inputs.contiguous()
