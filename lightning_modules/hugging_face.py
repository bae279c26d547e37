"""GPT-2 of Hugging Face with an attention of this package in the place of its own, by name.

`replace_attention` makes such a model of a GPT-2. It has a configuration of its own, so `save_pretrained` and
`from_pretrained` work, and so does `AutoModelForCausalLM` once this module has been imported. Training and `generate`,
with the cache of transformers, are theirs. Needs `transformers`, the extra `hf`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pennylane_qattn import ATTENTION, Attention, KeyValueCache, Mechanism
from pennylane_qattn.extras import install
from pennylane_qattn.features import PerHeadFeatureMap

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    from transformers.cache_utils import Cache, EncoderDecoderCache
except ImportError:
    raise ImportError(f"Hugging Face models need transformers; install it with: {install('hf')}") from None


class ReplacedAttention(nn.Module):
    """An attention of this package, called as a block of GPT-2 calls its own.

    Args:
        attention: the attention.
        layer: its number, under which the cache of transformers holds keys and values.
        dropout: probability of dropping an output in training.
    """

    def __init__(self, attention: Attention, layer: int, dropout: float):
        super().__init__()
        self.attention, self.layer = attention, layer
        self.resid_dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cache: Cache | None = None,
        **_,
    ) -> tuple[Tensor, None]:
        """The output, and no weights. The cache of transformers is `cache` from 5.24 on, and `past_key_values` before.

        Raises:
            ValueError: for cross-attention, a mask that hides more than padding and later tokens, or a cache that this
                attention cannot use.
        """
        held = past_key_values if cache is None else cache
        if encoder_hidden_states is not None or isinstance(held, EncoderDecoderCache):
            raise ValueError("the replaced attention is self-attention; the model must have no cross-attention")
        past = 0 if held is None else held.get_seq_length(self.layer)
        padding = _padding_of(attention_mask, past, hidden_states.shape[1])
        own_cache = None
        if held is not None:
            if self.attention.span > 1:
                raise ValueError(
                    f"{self.attention.name} reads {self.attention.span} neighbouring tokens, which the cache of "
                    "transformers does not hold; call with use_cache=False"
                )
            sizes = len(hidden_states), self.attention.block_size
            own_cache = _Past(held, self.layer, padding, *sizes)
        own = None if padding is None else padding[:, past:]
        return self.resid_dropout(self.attention(hidden_states, key_padding_mask=own, cache=own_cache)), None


class _Past(KeyValueCache):
    """The cache of transformers, as `Attention` uses its own."""

    def __init__(self, cache: Cache, layer: int, padding: Tensor | None, batch_size: int, max_len: int):
        super().__init__(batch_size, max_len)
        self.cache, self.layer, self.padding = cache, layer, padding

    def __len__(self) -> int:
        return self.cache.get_seq_length(self.layer)

    def append(self, keys: Tensor, values: Tensor, padding: Tensor | None, positions: Tensor | None):
        length = len(self) + keys.shape[2]
        keys, values = self.cache.update(keys, values, self.layer)
        if keys.shape[2] != length:
            raise ValueError("a static cache has keys of tokens that are still to come; use a dynamic one")
        return keys, values, self.padding, positions


class PreparedWhenRead:
    """Goes before a model class of transformers: what follows from words and angles is made anew once they are read."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any):
        """As in transformers."""
        reader: Any = super()
        found = reader.from_pretrained(*arguments, **options)
        for part in (found[0] if isinstance(found, tuple) else found).modules():
            if isinstance(part, PerHeadFeatureMap):
                part.prepare()
        return found


class QuantumGPT2Config(GPT2Config):
    """Configuration of a GPT-2 with an attention of this package.

    Args:
        qattn: a mechanism as plain data (`Mechanism.to_plain`).
        **options: those of `GPT2Config`.
    """

    model_type = "qattn-gpt2"
    qattn: dict[str, Any] | None = None


class QuantumGPT2LMHeadModel(PreparedWhenRead, GPT2LMHeadModel):
    """GPT-2 for language modelling with an attention of this package in every block.

    Args:
        config: its configuration, the mechanism in `qattn`.

    Raises:
        ValueError: without a mechanism, with cross-attention, or for sizes that do not fit together.
    """

    config_class = QuantumGPT2Config

    def __init__(self, config: QuantumGPT2Config):
        super().__init__(config)
        if not config.qattn:
            raise ValueError("the configuration names no attention; set qattn to mechanism.to_plain()")
        if config.add_cross_attention:
            raise ValueError("add_cross_attention must be False: no attention here can replace cross-attention")
        mechanism = Mechanism.from_plain(config.qattn)
        for number, block in enumerate(self.transformer.h):
            with torch.device("cpu"):  # transformers builds a model without memory before it reads the weights
                attention = mechanism(config.n_embd, config.n_head, config.n_positions, layer=number)
            block.attn = ReplacedAttention(attention, number, config.resid_pdrop)


def replace_attention(model: GPT2LMHeadModel, attention: str | Mechanism, **options: Any) -> QuantumGPT2LMHeadModel:
    """A GPT-2 whose attention is one of this package with new weights, and otherwise a copy of the model.

    Args:
        model: a GPT-2 for language modelling.
        attention: a name in `ATTENTION`, or a mechanism.
        **options: the mechanism's own options; dropout is the model's `attn_pdrop` unless given.

    Raises:
        ValueError: for another kind of model, an unknown name or option, or sizes that do not fit together.
    """
    if type(model) is not GPT2LMHeadModel:
        raise ValueError(f"expected a GPT2LMHeadModel; got {type(model).__name__}")
    if isinstance(attention, str):
        attention = ATTENTION.build(attention, **{"dropout": model.config.attn_pdrop, **options})
    elif options:
        raise ValueError(f"a mechanism has its options already; got {', '.join(options)} besides {attention!r}")
    config = QuantumGPT2Config(**{**model.config.to_dict(), "qattn": attention.to_plain()})
    replaced = QuantumGPT2LMHeadModel(config).to(model.lm_head.weight).train(model.training)
    kept = {name: weight for name, weight in model.state_dict().items() if ".attn." not in name}
    found = replaced.load_state_dict(kept, strict=False)
    assert not found.unexpected_keys and all(".attn." in name for name in found.missing_keys)
    return replaced


AutoConfig.register(QuantumGPT2Config.model_type, QuantumGPT2Config)
AutoModelForCausalLM.register(QuantumGPT2Config, QuantumGPT2LMHeadModel)


def _padding_of(mask: Tensor | None, past: int, queries: int) -> Tensor | None:
    """The keys that a mask of transformers hides from the last query: padding.

    Raises:
        ValueError: if it hides anything else but later tokens.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise ValueError(
            "the mask must be one of eager or sdpa attention; load the model with attn_implementation='sdpa'"
        )
    if mask.shape[-1] != past + queries:
        raise ValueError("a static cache has keys of tokens that are still to come; use a dynamic one")
    seen = mask if mask.dtype == torch.bool else mask == 0
    padding = ~seen[:, 0, -1]
    if queries > 1:
        causal = torch.ones(queries, past + queries, dtype=torch.bool, device=mask.device).tril(past)
        expected = (causal & ~padding[:, None])[:, None]
        meant = ~padding[:, None, past:, None]  # what a query that is padding sees itself does not matter
        if not ((seen == expected) | ~meant).all():
            raise ValueError("attention_mask must hide padding and later tokens, and nothing else")
    return padding
