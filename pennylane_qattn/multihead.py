"""Any attention of this package, called as `torch.nn.MultiheadAttention` is, for models that expect that."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pennylane_qattn.mechanisms import build_attention


class MultiheadAttention(nn.Module):
    """Self-attention by the name of a mechanism, with the call of `torch.nn.MultiheadAttention`.

    It takes the place of that module, `nn.TransformerEncoderLayer.self_attn` for one. What torch's module can and this
    one cannot is refused, never ignored: other keys and values than the queries, and masks that hide anything but
    padding and, in causal attention, later tokens. A causal attention is to be called as one, with `is_causal=True` or
    the causal mask.

    Args:
        embed_dim: width of the embedding.
        num_heads: number of heads.
        dropout: probability of dropping an attention weight in training.
        batch_first: tensors are `(batch, seq, embed)`; otherwise `(seq, batch, embed)`, torch's default.
        attention: a name in `ATTENTION`.
        block_size: longest sequence.
        is_causal: no token sees a later one.
        layer: which layer of a model it is, so that layers draw other Pauli words.
        **options: the mechanism's own options.

    Raises:
        ValueError: for an unknown name or option, or sizes that do not fit together.
    """

    #: What torch's encoder layers ask of their attention: this one has no joint projection to read past it.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        *,
        batch_first: bool = False,
        attention: str = "qisa",
        block_size: int = 512,
        is_causal: bool = True,
        layer: int = 0,
        **options,
    ):
        super().__init__()
        options |= {"dropout": dropout, "is_causal": is_causal}
        self.attention = build_attention(attention, embed_dim, num_heads, block_size, layer, **options)
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first

    def forward(
        self,
        query: Float[Tensor, "*tokens embed"],
        key: Float[Tensor, "*tokens embed"],
        value: Float[Tensor, "*tokens embed"],
        key_padding_mask: Shaped[Tensor, "*padding keys"] | None = None,
        need_weights: bool = True,
        attn_mask: Shaped[Tensor, "*queries keys"] | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; the arguments are those of `torch.nn.MultiheadAttention`.

        Args:
            query, key, value: one and the same tensor, `(batch, seq, embed)`, `(seq, batch, embed)` unless
                `batch_first`, or `(seq, embed)` without a batch.
            key_padding_mask: boolean, `True` for padding, or of numbers, 0 and for padding minus infinity.
            need_weights: also returns the weights, without dropout; they are computed anew for that.
            attn_mask: `None` or the causal mask, boolean or of numbers.
            average_attn_weights: the weights are averaged over heads.
            is_causal: the call is meant to be causal.

        Returns:
            The output, shaped as `query`; and the weights, `(*batch, seq, seq)` or `(*batch, heads, seq, seq)`, or
            `None`.

        Raises:
            ValueError: for what this attention does not do.
        """
        if key is not query or value is not query:
            raise ValueError("this is self-attention: query, key and value must be one and the same tensor")
        is_batch = query.ndim == 3
        x = query if is_batch else query[None] if self.batch_first else query[:, None]
        x = x if self.batch_first else x.transpose(0, 1)
        self._check_causality(attn_mask, is_causal, x.shape[1])
        padding = None
        if key_padding_mask is not None:
            padding = hidden(key_padding_mask, "key_padding_mask")
            padding = padding if is_batch else padding[None]
        out = self.attention(x, key_padding_mask=padding)
        weights = None
        if need_weights:
            weights = self.attention.weights(x, key_padding_mask=padding)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batch else weights[0]
        out = out if self.batch_first else out.transpose(0, 1)
        return out if is_batch else out.squeeze(0 if self.batch_first else 1), weights

    def _check_causality(self, mask: Tensor | None, is_causal: bool, length: int) -> None:
        ours = self.attention.is_causal
        if mask is not None:
            later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
            if mask.shape[-2:] != later.shape or not (hidden(mask, "attn_mask") == later).all():
                raise ValueError("attn_mask must be None or the causal mask, which hides later tokens and nothing else")
        if ours and not is_causal and mask is None:
            raise ValueError(
                "the attention is causal and the call is not: pass is_causal=True, or build it with is_causal=False"
            )
        if not ours and (is_causal or mask is not None):
            raise ValueError("the call is causal and the attention is not: build it with is_causal=True")


def hidden(mask: Tensor, name: str) -> Tensor:
    """What a mask in torch's convention hides, as booleans.

    Raises:
        ValueError: for a mask of other numbers than 0 and minus infinity.
    """
    if mask.dtype == torch.bool:
        return mask
    found = mask == float("-inf")
    if not ((mask == 0) | found).all():
        raise ValueError(f"{name} must be boolean, or of 0 and minus infinity; other numbers are no mask")
    return found
