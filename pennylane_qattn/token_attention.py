"""Attention of one token per text in one call of a kernel, as generation needs it.

The calls that it stands for have so little to do that they take several times as long. It serves scores of distances
and products on the CPU, for a few texts at a time, without padding, positions or gradients. Features that have a recipe
(`recipes.py`) are made by the kernel, others before it. Everything else goes the way of `attention.py`, and so does
what has hooks, as they would not be called.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pennylane_qattn import kernels
from pennylane_qattn.neighbours import join_neighbours
from pennylane_qattn.precision import cast
from pennylane_qattn.recipes import Affine, Forms, Recipe, affine
from pennylane_qattn.simd import BITS
from pennylane_qattn.token_kernels import attend_token
from pennylane_qattn.transforms import is_plain
from pennylane_qattn.word_kernels import WordPairs

if TYPE_CHECKING:
    from pennylane_qattn.attention import Attention, KeyValueCache

#: Most multiplications by weights that one thread takes upon itself, to be divided by how many more torch would have.
MOST_WORK = 2**24
_NO_WORDS = {
    dtype: WordPairs.of([["Z"]], False, np.dtype(name))
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64"))
}


def attend(
    attention: "Attention", x: Float[Tensor, "batch 1 embed"], cache: "KeyValueCache"
) -> Float[Tensor, "batch 1 embed"] | None:
    """The attention of the next token of each text, which the cache holds afterwards; `None`, and nothing is changed,
    if no kernel serves it."""
    if not kernels.serve(x) or len(x) > most_texts(x.dtype):
        return None
    parts = attention._modules
    score, query_map, key_map, value_map = (parts[name] for name in ("score", "query_map", "key_map", "value_map"))
    if not vars(type(score)).get("has_token_kernel") or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    (texts, _, embed), length = x.shape, cache.max_len
    heads, features, outputs = attention.num_heads, query_map.out_features, attention.head_dim
    if 2 * texts * embed * heads * (features + outputs) * (torch.get_num_threads() - 1) > MOST_WORK:
        return None
    room, out = cache.room_for_next(texts), affine(parts["out_proj"])
    if room is None or out is None:
        return None
    joined, recent = x, None
    if attention.span > 1:
        joined, recent = join_neighbours(x, attention.span, recent=cache.recent, past=len(cache))
    x, joined = x.contiguous(), joined.contiguous()
    q, k = (recipe if isinstance(recipe := part.recipe(x), Affine) else None for part in (query_map, key_map))
    v = value_map.recipe(joined)

    keys, values = room
    needed = [
        (keys, (texts, heads, length, features)),
        (values, (texts, heads, length, outputs)),
        (out.weight, (embed, heads * outputs)),
        (out.bias, (embed,)),
        *_needed(q, heads, features, embed),
        *_needed(k, heads, features, embed),
        *_needed(v, heads, outputs, joined.shape[2]),
    ]
    if not all(tensor is None or _is_held(tensor, shape, x.dtype) for tensor, shape in needed):
        return None

    inputs, sizes_of_forms, is_raw, words = joined, (0, joined.shape[2], texts, 0, 1), False, _NO_WORDS[x.dtype]
    if isinstance(v, Forms):
        inputs, is_raw = _side_by_side(v.inputs), v.is_raw
        sizes_of_forms = _sizes(inputs, v.matrices.shape[1])
        words = v.readout if isinstance(v.readout, WordPairs) else words
    made = *_factors(q, query_map, x), *_factors(k, key_map, x), *_factors(v, value_map, joined)
    result = torch.empty_like(x)
    held = (x, *made, inputs, keys, values, *out, result)
    places = tuple(0 if tensor is None else tensor.data_ptr() for tensor in held)
    sizes = (texts, heads, embed, features, outputs, len(cache), length, *sizes_of_forms)
    attend_token(places, sizes, *score.token_exponents(x.dtype), is_raw, *words)
    cache.count_next()
    if attention.span > 1:
        cache.recent = recent
    return result


def most_texts(dtype: torch.dtype) -> int:
    """How many texts the kernel takes: one in each lane of a vector."""
    return BITS // (8 * dtype.itemsize)


def _needed(recipe: Recipe | None, heads: int, width: int, read: int) -> list[tuple[Tensor | None, tuple[int, ...]]]:
    """The tensors that the kernel reads by their addresses, and the shapes that it takes them to have."""
    if isinstance(recipe, Affine):
        return [(recipe.weight, (heads * width, read)), (recipe.bias, (heads * width,))]
    if isinstance(recipe, Forms):
        rows = recipe.matrices.shape[1]
        readout = None if isinstance(recipe.readout, WordPairs) else recipe.readout
        return [(recipe.matrices, (heads, rows, recipe.inputs.shape[2])), (readout, (heads, rows, width))]
    return []


def _factors(
    recipe: Recipe | None, feature_map: nn.Module, x: Float[Tensor, "batch 1 embed"]
) -> tuple[Tensor | None, Tensor | None]:
    """What features are made of; or `None`, and the features themselves."""
    if isinstance(recipe, Affine):
        return recipe
    if isinstance(recipe, Forms):
        return recipe.matrices, None if isinstance(recipe.readout, WordPairs) else recipe.readout
    return None, cast(feature_map(x), x.dtype).reshape(len(x), -1).contiguous()


def _is_held(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the tensor's numbers lie where its address says, one after another."""
    plain = tensor.shape == shape and tensor.dtype == dtype and tensor.is_cpu
    return plain and is_plain(tensor) and tensor.is_contiguous()


def _side_by_side(inputs: Float[Tensor, "#heads tokens amplitudes"]) -> Float[Tensor, "#heads tokens amplitudes"]:
    """The same with whole rows between one token or head and the next, as they are unless they must be copied."""
    width = inputs.shape[2]
    if inputs.stride(2) == 1 and not (inputs.stride(0) % width or inputs.stride(1) % width):
        return inputs
    return inputs.contiguous()


def _sizes(inputs: Float[Tensor, "#heads tokens amplitudes"], rows: int) -> tuple[int, int, int, int, int]:
    """What the kernel knows of forms (`token_kernels.py`)."""
    (heads, texts, width), (by_head, by_text, _) = inputs.shape, inputs.stride()
    by_head, by_text = by_head // width if heads > 1 else 0, by_text // width
    return rows, width, 1 + (heads - 1) * by_head + (texts - 1) * by_text, by_head, by_text
