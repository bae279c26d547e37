r"""The one causal mixer: `features -> scores -> weights -> weighted sum`, with its key/value cache.

.. math::

    a_{ij} = \mathrm{score}(q_i, k_j), \qquad w_{ij} = \mathrm{normalise}_j\, a_{ij}, \qquad
    \mathrm{out}_i = \sum_{j \preceq i} w_{ij} v_j

normalised by the softmax, or as the score has it. Masking, summing and caching are done here and nowhere else, so that
no mechanism can see the future by accident. The mechanisms themselves are compositions of parts: `mechanisms.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pennylane_qattn import token_attention
from pennylane_qattn.features import FeatureMap
from pennylane_qattn.neighbours import Recent, join_neighbours
from pennylane_qattn.precision import widened
from pennylane_qattn.scores import Score
from pennylane_qattn.transforms import is_transformed, without_autocast

#: Most attention weights that are written out at a time, and kept for the gradient: 4 MiB in float32 on a CPU.
MAX_WEIGHTS = {"cpu": 2**20}
_ON_OTHER_DEVICES = 2**23


class KeyValueCache:
    """Keys, values, padding and positions of the tokens seen so far, for generation token by token.

    Memory is taken once, at the first append, for `max_len` tokens.

    Args:
        batch_size: rows of the batch.
        max_len: tokens it can hold: the block size of the attention.
    """

    def __init__(self, batch_size: int, max_len: int):
        if batch_size < 1 or max_len < 1:
            raise ValueError(f"a cache needs batch_size and max_len of at least 1; got {batch_size} and {max_len}")
        self.batch_size, self.max_len = batch_size, max_len
        self._length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._padding: Tensor | None = None
        self._positions: Tensor | None = None
        #: The latest tokens themselves, where values read several.
        self.recent: Recent | None = None

    def __len__(self) -> int:
        return self._length

    def append(
        self,
        keys: Float[Tensor, "batch heads new prepared"],
        values: Float[Tensor, "batch heads new features"],
        padding: Bool[Tensor, "batch new"] | None,
        positions: Int[Tensor, "batch new"] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Adds new tokens and returns keys, values, padding and positions of all tokens held."""
        new, start = keys.shape[2], self._length
        if keys.shape[0] != self.batch_size:
            raise ValueError(f"the cache was made for a batch of {self.batch_size}; got {keys.shape[0]}")
        if start + new > self.max_len:
            raise ValueError(
                f"the cache has room for max_len={self.max_len} tokens; it holds {start}, and got {new} more"
            )
        self._keys = self._room(self._keys, keys)
        self._values = self._room(self._values, values)
        self._keys[:, :, start : start + new] = keys
        self._values[:, :, start : start + new] = values
        if padding is not None or self._padding is not None:
            if self._padding is None:
                self._padding = torch.zeros(self.batch_size, self.max_len, dtype=torch.bool, device=keys.device)
            self._padding[:, start : start + new] = False if padding is None else padding
        if positions is not None or self._positions is not None:
            if self._positions is None:
                order = torch.arange(self.max_len, device=keys.device)
                self._positions = order.repeat(self.batch_size, 1)
            if positions is not None:
                self._positions[:, start : start + new] = positions
        self._length = end = start + new
        return (
            self._keys[:, :, :end],
            self._values[:, :, :end],
            None if self._padding is None else self._padding[:, :end],
            None if self._positions is None else self._positions[:, :end],
        )

    def room_for_next(
        self, batch_size: int
    ) -> tuple[Float[Tensor, "batch heads max prepared"], Float[Tensor, "batch heads max features"], int] | None:
        """The memory of keys and values, and the place there of the next token, which may be written, and is then
        counted by `count_next`.

        `None` where only `append` knows what to do: at the start, at the end, with another batch, with padding or
        positions, and where a subclass or somebody else has it do otherwise.
        """
        if type(self) is not KeyValueCache or "append" in vars(self) or self._keys is None:
            return None
        if self._padding is not None or self._positions is not None:
            return None
        if batch_size != self.batch_size or not 0 <= self._length < self.max_len:
            return None
        return self._keys, self._values, self._length

    def count_next(self) -> None:
        """The next token's key and value have been written."""
        self._length += 1

    def _room(self, held: Tensor | None, new: Tensor) -> Tensor:
        if held is None:
            return new.new_empty(*new.shape[:2], self.max_len, new.shape[3])
        # Nothing may be written into a buffer that the graph of an earlier step still reads.
        return held.clone() if torch.is_grad_enabled() else held


@dataclass(frozen=True)
class Visibility:
    """Which keys each query may see.

    Attributes:
        queries, keys: how many; without position ids the queries are the last of the keys.
        is_causal: a query sees no key of a later position.
        padding: keys that nobody sees.
        query_positions, key_positions: places in time; by default the order in memory.
    """

    queries: int
    keys: int
    is_causal: bool
    padding: Bool[Tensor, "batch keys"] | None = None
    query_positions: Int[Tensor, "batch queries"] | None = None
    key_positions: Int[Tensor, "batch keys"] | None = None

    @property
    def is_triangle(self) -> bool:
        """It is the plain causal triangle, which fused attention knows without a mask."""
        plain = self.padding is None and self.key_positions is None
        return plain and self.is_causal and 1 < self.queries == self.keys

    @property
    def is_in_order(self) -> bool:
        """Tokens stand in memory as in time."""
        return self.key_positions is None

    @property
    def may_be_blind(self) -> bool:
        """Some query may see no key at all."""
        return self.padding is not None

    def of_rows(self, first: int, last: int) -> "Visibility":
        """For the queries from `first` to before `last`; in order, without the keys that are later than theirs."""
        keys = self.keys - self.queries + last if self.is_causal and self.is_in_order else self.keys
        return Visibility(
            last - first,
            keys,
            self.is_causal,
            None if self.padding is None else self.padding[:, :keys],
            None if self.query_positions is None else self.query_positions[:, first:last],
            self.key_positions,
        )

    def mask(self, device: torch.device) -> Bool[Tensor, "batch 1 queries keys"] | None:
        """`True` where query sees key; `None` where every query sees every key."""
        visible = None
        if self.is_causal and self.key_positions is not None:
            visible = (self.key_positions[:, None, :] <= self.query_positions[:, :, None])[:, None]
        elif self.is_causal and self.queries > 1:
            visible = torch.ones(self.queries, self.keys, dtype=torch.bool, device=device)
            visible = visible.tril(self.keys - self.queries)[None, None]
        if self.padding is not None:
            unpadded = ~self.padding[:, None, None, :]
            visible = unpadded.expand(-1, -1, self.queries, -1) if visible is None else visible & unpadded
        return visible


def attention_weights(
    score: Score,
    q: Float[Tensor, "batch heads queries prepared"],
    k: Float[Tensor, "batch heads keys prepared"],
    visibility: Visibility,
) -> Float[Tensor, "batch heads queries keys"]:
    """The scores normalised over the visible keys; a query that sees none has weights 0, with finite gradients."""
    scores = score(q, k)
    visible = visibility.mask(q.device)
    if not visibility.may_be_blind:
        return score.normalise(scores, visible)
    # A row that sees nothing is normalised over everything and zeroed afterwards: softmax of -inf alone is NaN.
    blind = ~visible.any(-1, keepdim=True)
    return score.normalise(scores, visible | blind).masked_fill(~visible, 0.0)


def fused_attention(
    score: Score,
    q: Float[Tensor, "batch heads queries prepared"],
    k: Float[Tensor, "batch heads keys prepared"],
    v: Float[Tensor, "batch heads keys features"],
    visibility: Visibility,
    dropout: float,
) -> Float[Tensor, "batch heads queries features"]:
    """The weighted sum by torch's fused kernels, for scores that are dot products."""
    q, k = score.sides(q, k)
    width = v.shape[-1]
    common = max(width, q.shape[-1])  # the kernels want one width for all three
    q, k, v = (F.pad(t, (0, common - t.shape[-1])) if t.shape[-1] < common else t for t in (q, k, v.to(q.dtype)))
    triangle = visibility.is_triangle
    visible = None if triangle else visibility.mask(q.device)
    blind = ~visible.any(-1, keepdim=True) if visibility.may_be_blind else None
    if blind is not None:
        visible = visible | blind
    # With one head Inductor may give the heads' axis a stride of 1, for which torch's CUDA kernels know no alignment;
    # as the axis of the batch, of one sequence, it may have any.
    exchanged = q.shape[1] == 1 and torch.compiler.is_compiling()
    if exchanged:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        visible = None if visible is None else visible.transpose(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=triangle, scale=score.scale)
    out = out.transpose(0, 1) if exchanged else out
    return (out if blind is None else out.masked_fill(blind, 0.0))[..., :width]


def max_weights(device: torch.device) -> int:
    """How many attention weights are written out at a time."""
    return MAX_WEIGHTS.get(device.type, _ON_OTHER_DEVICES)


def is_fused(device: torch.device, dropout: float) -> bool:
    """Whether torch's attention needs no matrix of weights; on a CPU it writes one out to drop some of them."""
    return not (dropout and device.type == "cpu")


def written_attention(
    score: Score,
    q: Float[Tensor, "batch heads queries prepared"],
    k: Float[Tensor, "batch heads keys prepared"],
    v: Float[Tensor, "batch heads keys features"],
    visibility: Visibility,
    dropout: float,
) -> Float[Tensor, "batch heads queries features"]:
    """The weighted sum with its weights written out."""
    return F.dropout(attention_weights(score, q, k, visibility), dropout).to(v.dtype) @ v


def blocked_attention(
    score: Score,
    q: Float[Tensor, "batch heads queries prepared"],
    k: Float[Tensor, "batch heads keys prepared"],
    v: Float[Tensor, "batch heads keys features"],
    visibility: Visibility,
    dropout: float,
) -> Float[Tensor, "batch heads queries features"]:
    """The same by blocks of rows, at most `max_weights` at a time, which are made again for the gradient.

    Without dropout, `dropout` being 0, by the structure of rows where there is one.
    """
    rows = max(1, max_weights(q.device) // (q.shape[0] * q.shape[1] * visibility.keys))
    done = []
    for first in range(0, visibility.queries, rows):
        part = visibility.of_rows(first, min(first + rows, visibility.queries))
        sides = q[:, :, first : first + rows], k[:, :, : part.keys], v[:, :, : part.keys]
        if score.is_structured and visibility.is_in_order and not dropout:
            done.append(checkpoint(structured_attention, score, *sides, part, use_reentrant=False))
        else:
            done.append(checkpoint(written_attention, score, *sides, part, dropout, use_reentrant=False))
    return torch.cat(done, dim=2)


def structured_attention(
    score: Score,
    q: Float[Tensor, "batch heads queries prepared"],
    k: Float[Tensor, "batch heads keys prepared"],
    v: Float[Tensor, "batch heads keys features"],
    visibility: Visibility,
) -> Float[Tensor, "batch heads queries features"]:
    """The weighted sum without a matrix of weights, for scores whose rows have a structure."""
    visible = None if visibility.padding is None else ~visibility.padding
    with without_autocast(q.device):
        return score.attend(widened(q), widened(k), widened(v), visibility.is_causal, visible).to(v.dtype)


class Attention(nn.Module):
    r"""Multi-head attention from four parts: query, key and value maps and a score.

    Args:
        query_map, key_map, value_map: feature maps with the same number of heads; queries and keys of one width. The
            value map reads `span` tokens joined (`neighbours.py`), so it is that many times as wide.
        score: compares queries with keys.
        block_size: longest sequence, the tokens held in a cache included.
        is_causal: token :math:`i` sees tokens :math:`j \preceq i` only.
        out_bias: bias of the output projection.
        dropout: probability of dropping an attention weight in training.
        name: what it is called when printed.
        span: tokens that a value reads: its own and the `span - 1` before it.

    Attributes:
        has_cache: it runs with a key/value cache; `False` where a later token changes outputs given before.

    Shapes:
        `x`: `(batch, seq, embed)`; the output has the same shape.
    """

    has_cache: bool = True

    def __init__(
        self,
        query_map: FeatureMap,
        key_map: FeatureMap,
        value_map: FeatureMap,
        score: Score,
        *,
        block_size: int,
        is_causal: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        name: str = "Attention",
        span: int = 1,
    ):
        super().__init__()
        if span < 1:
            raise ValueError(f"span must be at least 1, the token itself; got {span}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {block_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}")
        heads = {query_map.num_heads, key_map.num_heads, value_map.num_heads}
        if len(heads) > 1:
            raise ValueError(f"query, key and value maps must have one number of heads; got {sorted(heads)}")
        widths = query_map.embed_dim, key_map.embed_dim, value_map.embed_dim
        if not widths[0] == widths[1] == widths[2] / span:
            joined = f", the values {span} tokens" if span > 1 else ""
            raise ValueError(f"query, key and value maps must read one embedding{joined}; got widths {list(widths)}")
        if query_map.out_features != key_map.out_features:
            raise ValueError(
                f"queries and keys must have one width; got {query_map.out_features} and {key_map.out_features}"
            )
        self.query_map, self.key_map, self.value_map, self.score = query_map, key_map, value_map, score
        score.set_longest_row(block_size)
        self.embed_dim, self.num_heads, self.span = query_map.embed_dim, query_map.num_heads, span
        self.head_dim = value_map.out_features
        self.block_size, self.is_causal, self.dropout, self.name = block_size, is_causal, dropout, name
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, self.embed_dim, bias=out_bias)

    def forward(
        self,
        x: Float[Tensor, "batch seq embed"],
        *,
        key_padding_mask: Bool[Tensor, "batch seq"] | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch seq embed"]:
        r"""Attends.

        Args:
            x: embeddings; with a cache, of the new tokens only.
            key_padding_mask: `True` marks padding, which nobody sees. A token that sees no key at all gives 0.
            position_ids: each token's place in time; a query sees the keys whose position is not after its own.
                By default the order in memory.
            cache: holds the tokens before `x`, and afterwards `x` too.
        """
        self._check(x, key_padding_mask, position_ids, cache)
        if cache is not None and x.shape[1] == 1 and key_padding_mask is None and position_ids is None:
            if self._applies_weights_as_they_are and (out := token_attention.attend(self, x, cache)) is not None:
                return out
        q = self.score.queries(self.query_map(x))
        k, v, visibility = self._keys_and_values(x, key_padding_mask, position_ids, cache)
        dropout = self.dropout if self.training else 0.0
        # to pad every value that a cache holds would take longer than a single row of weights
        is_row = visibility.queries == 1 and (self.score.is_widened or q.shape[-1] > v.shape[-1])
        is_plain = self._is_plain(visibility, dropout)
        num_weights = q.shape[0] * q.shape[1] * visibility.queries * visibility.keys
        is_small = is_transformed() or num_weights <= max_weights(x.device)  # no question of size in an export
        if not self._applies_weights_as_they_are:
            weights = F.dropout(attention_weights(self.score, q, k, visibility), dropout)
            heads = self.applied(weights, visibility).to(v.dtype) @ v
        elif is_plain and visibility.padding is None and self.score.has_kernel(q, k, v):
            heads = self.score.attend_by_kernel(q, k, v, self.is_causal)
        elif self.score.is_dot_product and not is_row and (is_small or is_fused(x.device, dropout)):
            heads = fused_attention(self.score, q, k, v, visibility, dropout)
        elif is_plain and self.score.is_structured and (is_small or self.score.is_sparing):
            heads = structured_attention(self.score, q, k, v, visibility)
        elif is_small:
            heads = written_attention(self.score, q, k, v, visibility, dropout)
        else:
            heads = blocked_attention(self.score, q, k, v, visibility, dropout)
        out = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not visibility.may_be_blind:
            return out
        sees_nothing = ~self.applied(visibility.mask(x.device), visibility).any(-1)[:, 0, :, None]
        return out.masked_fill(sees_nothing, 0.0)

    def weights(
        self,
        x: Float[Tensor, "batch seq embed"],
        *,
        key_padding_mask: Bool[Tensor, "batch seq"] | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch heads seq seq"]:
        """The attention weights `w_ij` (query `i`, key `j`), without dropout: for looking at, not for training."""
        self._check(x, key_padding_mask, position_ids, None)
        q = self.score.queries(self.query_map(x))
        k, _, visibility = self._keys_and_values(x, key_padding_mask, position_ids, None)
        return self.applied(attention_weights(self.score, q, k, visibility), visibility)

    def applied(
        self, weights: Shaped[Tensor, "batch _ queries keys"], visibility: Visibility
    ) -> Shaped[Tensor, "batch _ receivers senders"]:
        """What the values are multiplied by: the normalised weights as they are.

        Only `published.py` has it otherwise. The mask of what is seen, a boolean tensor, goes the same way.
        """
        return weights

    def _is_plain(self, visibility: Visibility, dropout: float) -> bool:
        """Nothing is in the way of `Score.attend`."""
        return visibility.is_in_order and visibility.queries > 0 and not dropout and not is_transformed()

    @property
    def _applies_weights_as_they_are(self) -> bool:
        """Fused attention is no way round a subclass's `applied`."""
        return type(self).applied is Attention.applied

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """An empty cache for `batch_size` rows and `block_size` tokens."""
        self._check_cache()
        return KeyValueCache(batch_size, self.block_size)

    def _check_cache(self) -> None:
        if not self.has_cache:
            raise ValueError(
                f"{self.name} attention runs without a key/value cache, as later tokens change its earlier outputs; "
                "generate without one (use_cache=False)"
            )

    def _check(self, x: Tensor, padding: Tensor | None, positions: Tensor | None, cache: KeyValueCache | None) -> None:
        if cache is not None:
            self._check_cache()
        if x.ndim != 3:
            raise ValueError(f"embeddings must have the shape (batch, seq, embed); got {tuple(x.shape)}")
        for name, given in (("key_padding_mask", padding), ("position_ids", positions)):
            if given is not None and given.shape != x.shape[:2]:
                raise ValueError(
                    f"{name} must have the shape (batch, seq) {tuple(x.shape[:2])}; got {tuple(given.shape)}"
                )
        if padding is not None and padding.dtype != torch.bool:
            raise ValueError(f"key_padding_mask must be boolean, True for padding; got {padding.dtype}")
        length = x.shape[1] + (0 if cache is None else len(cache))
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"embeddings must have width embed_dim={self.embed_dim}; got {x.shape[-1]}")
        if length > self.block_size:
            raise ValueError(
                f"a sequence of {length} tokens is longer than block_size={self.block_size}; "
                "shorten it or build the attention with a larger block_size"
            )

    def _keys_and_values(self, x, padding, positions, cache) -> tuple[Tensor, Tensor, Visibility]:
        past = 0 if cache is None else len(cache)
        queries = x.shape[1]
        joined, recent = self._joined(x, padding, positions, cache)
        k, v = self.score.keys(self.key_map(x)), self.value_map(joined)
        if padding is not None:  # a weight of 0 does not silence a NaN
            k, v = (t.masked_fill(padding[:, None, :, None], 0.0) for t in (k, v))
        if cache is not None:
            k, v, padding, positions = cache.append(k, v, padding, positions)
            cache.recent = recent  # last, so that what is refused leaves no trace
        query_positions = None if positions is None else positions[:, past:]
        return k, v, Visibility(queries, past + queries, self.is_causal, padding, query_positions, positions)

    def _joined(self, x: Tensor, padding, positions, cache: KeyValueCache | None) -> tuple[Tensor, Recent | None]:
        """What the value map reads, and what later tokens are joined with."""
        if self.span == 1:
            return x, None
        recent, past = (None, 0) if cache is None else (cache.recent, len(cache))
        return join_neighbours(x, self.span, padding, positions, recent, past)

    def __repr__(self) -> str:
        described = [f"embed={self.embed_dim}", f"heads={self.num_heads}", f"head_dim={self.head_dim}"]
        parts = (part for feature_map in (self.query_map, self.value_map) for part in feature_map.modules())
        qubits = next((part.num_wires for part in parts if hasattr(part, "num_wires")), None)
        if qubits is not None:
            described.append(f"qubits={qubits}")
        if self.span > 1:
            described.append(f"span={self.span}")
        if not self.is_causal:
            described.append("causal=False")
        return f"{self.name}({', '.join(described)})"
