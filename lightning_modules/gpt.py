r"""GPT-1, a decoder-only transformer whose attention is handed in; a plain torch module.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.1:

.. math::

    h_0 = U W_e + W_p, \qquad h_l = \mathrm{block}(h_{l-1}), \qquad P(u) = \mathrm{softmax}(h_n W_e^\top)

We differ by options: the norms may stand before the sublayers, and the output layer may have its own weights.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"relu": nn.ReLU, "gelu_new": lambda: nn.GELU(approximate="tanh")}


class Cache(Protocol):
    """What an attention remembers of the past; its length is the number of tokens held."""

    def __len__(self) -> int: ...


class AttentionModule(Protocol):
    """A causal self-attention, `(batch, seq, embed) -> (batch, seq, embed)`, also an `nn.Module`.

    `key_padding_mask` is `True` at padding, `position_ids` are the tokens' places in time, both
    `(batch, seq)`; with a cache, all three tensors hold the new tokens only.
    """

    def __call__(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor: ...

    def new_cache(self, batch_size: int) -> Cache: ...


class AttentionFactory(Protocol):
    """Builds the attention of layer number `layer`."""

    def __call__(self, embed_dim: int, num_heads: int, block_size: int, *, layer: int) -> AttentionModule: ...


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT, attention apart.

    Args:
        vocab_size: number of tokens known.
        block_size: longest sequence, in tokens.
        num_layers: number of blocks.
        num_heads: attention heads of each block.
        embed_dim: width of the embedding.
        feedforward_dim: width inside the feed-forward; `None`: four times `embed_dim`.
        activation: of the feed-forward: "relu" or "gelu_new" (GELU in its tanh form, arXiv 1606.08415).
        norm: LayerNorm "pre": before each sublayer and once before the output layer, or "post": after each
            residual sum, as in GPT-1.
        dropout: after the attention's output projection and after the feed-forward.
        embed_dropout: on the sum of token and position embedding.
        tied_head: the output layer's weights are the token embedding's.
        head_bias: bias of the output layer.
        layer_norm_eps: added to the variance in LayerNorm.
        init: "torch": as torch initialises each layer; "gpt1": weights of linear layers and embeddings from
            N(0, 0.02), their biases 0, other parameters of the attention as they are.

    Raises:
        ValueError: for a value outside its range.
    """

    vocab_size: int
    block_size: int
    num_layers: int
    num_heads: int
    embed_dim: int
    feedforward_dim: int | None = None
    activation: str = "relu"
    norm: str = "pre"
    dropout: float = 0.0
    embed_dropout: float = 0.0
    tied_head: bool = False
    head_bias: bool = True
    layer_norm_eps: float = 1e-5
    init: str = "torch"

    def __post_init__(self) -> None:
        optional = () if self.feedforward_dim is None else ("feedforward_dim",)
        for name in ("vocab_size", "block_size", "num_layers", "num_heads", "embed_dim", *optional):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
        for name in ("dropout", "embed_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        if not 0 < self.layer_norm_eps < float("inf"):
            raise ValueError(f"layer_norm_eps must be positive and finite; got {self.layer_norm_eps}")
        for name, choices in (("activation", ACTIVATIONS), ("norm", BLOCKS), ("init", ("gpt1", "torch"))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(sorted(choices))}")

    def to_plain(self) -> dict[str, Any]:
        """The fields as plain data, for configs and checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """The config that `to_plain` wrote.

        Raises:
            ValueError: for a missing or an unknown field, or a value outside its range.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in data:
            if name not in fields:
                raise ValueError(f"GPTConfig has no field {name!r}; its fields: {', '.join(sorted(fields))}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"GPTConfig: {error}") from None


class Block(nn.Module, ABC):
    """Attention and feed-forward, each with a residual sum and a LayerNorm; `x` is `(batch, seq, embed)`."""

    def __init__(self, config: GPTConfig, attention: nn.Module):
        super().__init__()
        width, inner = config.embed_dim, config.feedforward_dim or 4 * config.embed_dim
        self.attention = attention
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention_dropout = nn.Dropout(config.dropout)
        self.feedforward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.feedforward = nn.Sequential(
            nn.Linear(width, inner),
            ACTIVATIONS[config.activation](),
            nn.Linear(inner, width),
            nn.Dropout(config.dropout),
        )

    @abstractmethod
    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """`context` (padding, positions, cache) goes to the attention."""


class PreNormBlock(Block):
    r""":math:`x = x + A(\mathrm{LN}(x))`, then :math:`x = x + F(\mathrm{LN}(x))` (arXiv 2002.04745)."""

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), **context))
        return x + self.feedforward(self.feedforward_norm(x))


class PostNormBlock(Block):
    r""":math:`x = \mathrm{LN}(x + A(x))`, then :math:`x = \mathrm{LN}(x + F(x))`, as in GPT-1."""

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, **context)))
        return self.feedforward_norm(x + self.feedforward(x))


BLOCKS = {"pre": PreNormBlock, "post": PostNormBlock}


class GPT(nn.Module):
    """A language model over token ids.

    Args:
        config: its shape.
        attention: builds the attention of each layer, for example a mechanism of `pennylane_qattn`.

    Attributes:
        gradient_checkpointing: in training, blocks keep their input alone and run again for the gradient
            (arXiv 1604.06174); `False` unless set.

    Shapes:
        tokens `(batch, seq)` of dtype int64 or int32; logits `(batch, seq, vocab_size)`.

    >>> from pennylane_qattn import Classical
    >>> model = GPT(preset("gpt1-tiny", vocab_size=65), Classical(bias=True, dropout=0.1))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 65])
    """

    def __init__(self, config: GPTConfig, attention: AttentionFactory):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, eps = config.embed_dim, config.layer_norm_eps
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.block_size, width)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList(
            BLOCKS[config.norm](config, attention(width, config.num_heads, config.block_size, layer=layer))
            for layer in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(width, eps=eps) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(width, config.vocab_size, bias=config.head_bias)
        if config.tied_head:
            self.head.weight = self.token_embedding.weight
        if config.init == "gpt1":
            self.apply(_init_gpt1)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """Logits of the token that follows each token.

        Args:
            tokens: `(batch, seq)`; with caches, the new tokens only.
            key_padding_mask: `(batch, seq)`, `True` at padding, on whichever side; it changes no real token's
                logits.
            position_ids: `(batch, seq)`, each token's place in `range(block_size)`. By default tokens are
                counted from 0, padding left out. To be given with caches that hold padded rows.
            caches: from `new_caches`; they hold the tokens before `tokens`, and afterwards `tokens` too.

        Raises:
            ValueError: for a sequence longer than the block (the caches' tokens included), tokens of another
                shape or dtype and, on the CPU, ids out of range (elsewhere looking would stall the device).
        """
        return self.head(self.hidden_states(tokens, key_padding_mask, position_ids, caches))

    def hidden_states(
        self,
        tokens: Tensor,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """What the output layer reads, `(batch, seq, embed)`; the arguments are those of `forward`."""
        past = self._check(tokens, key_padding_mask, caches)
        if position_ids is None and key_padding_mask is not None:
            if past:
                raise ValueError("padding beside a filled cache needs position_ids; count them without it")
            position_ids = (~key_padding_mask).cumsum(1) - 1  # -1 ahead of a row's first token
        places = position_ids
        if places is None:
            places = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        elif key_padding_mask is not None:
            places = places.masked_fill(key_padding_mask, 0)
        x = _embed(self.token_embedding, tokens, "token ids")
        x = self.embed_dropout(x + _embed(self.position_embedding, places, "position ids"))
        runs_again = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and not caches
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            context: dict[str, Any] = dict(key_padding_mask=key_padding_mask, position_ids=position_ids, cache=cache)
            x = checkpoint(block, x, use_reentrant=False, **context) if runs_again else block(x, **context)
        return self.final_norm(x)

    def new_caches(self, batch_size: int) -> list[Cache]:
        """One empty cache per layer, for `batch_size` rows of up to `block_size` tokens."""
        return [block.attention.new_cache(batch_size) for block in self.blocks]

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, all blocks together; a tied output layer counts as token embedding."""
        counts: Counter[str] = Counter()
        for name, parameter in self.named_parameters():
            path = name.split(".")
            counts[path[2] if path[0] == "blocks" else path[0]] += parameter.numel()
        return dict(counts)

    def _check(self, tokens: Tensor, padding: Tensor | None, caches: Sequence[Cache] | None) -> int:
        """The number of tokens in the caches, after a look at the input's shape."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (batch, seq), seq at least 1; got shape {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64 or int32; got {tokens.dtype}")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != tokens.shape):
            raise ValueError(
                f"key_padding_mask must be bool of shape {tuple(tokens.shape)}, True at padding; "
                f"got {padding.dtype} of shape {tuple(padding.shape)}"
            )
        if caches is not None and len(caches) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} layers need as many caches; got {len(caches)}")
        past = len(caches[0]) if caches else 0
        length, block = past + tokens.shape[1], self.config.block_size
        if length > block:
            raise ValueError(
                f"a sequence of {length} tokens is longer than block_size={block}; "
                "shorten it or build the model with a larger block_size"
            )
        return past


def _embed(table: nn.Embedding, ids: Tensor, what: str) -> Tensor:
    try:
        return table(ids)
    except IndexError:
        low, high = (bound.item() for bound in ids.aminmax())
        valid = f"[0, {table.num_embeddings})"
        raise ValueError(f"{what} must lie in {valid}; got values from {low} to {high}") from None


def _init_gpt1(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


_GPT1 = GPTConfig(
    vocab_size=40_478,
    block_size=512,
    num_layers=12,
    num_heads=12,
    embed_dim=768,
    activation="gelu_new",
    norm="post",
    dropout=0.1,
    embed_dropout=0.1,
    tied_head=True,
    head_bias=False,
    init="gpt1",
)
_QISA_16 = GPTConfig(vocab_size=65, block_size=16, num_layers=6, num_heads=1, embed_dim=16, dropout=0.2)

#: Models by name.
#:
#: - `gpt1`: the 2018 model of 117 M parameters is `GPT(PRESETS["gpt1"], Classical(bias=True, dropout=0.1))`;
#: - `gpt1-tiny`: the same architecture at a size for the CPU, its vocabulary to be replaced by the user's;
#: - `qisa-16`, `qisa-128`: the published setting of arXiv 2603.03318, on Tiny Shakespeare's 65 characters.
PRESETS: dict[str, GPTConfig] = {
    "gpt1": _GPT1,
    "gpt1-tiny": dataclasses.replace(_GPT1, vocab_size=512, block_size=128, num_layers=4, num_heads=4, embed_dim=128),
    "qisa-16": _QISA_16,
    "qisa-128": dataclasses.replace(_QISA_16, embed_dim=128),
}


def preset(name: str, **overrides: Any) -> GPTConfig:
    """The config of that name in `PRESETS`, with some of its fields replaced.

    >>> preset("qisa-16", num_heads=2).num_heads
    2

    Raises:
        ValueError: for an unknown name or field, or a value outside its range.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(sorted(PRESETS))}")
    return GPTConfig.from_plain(PRESETS[name].to_plain() | overrides)
