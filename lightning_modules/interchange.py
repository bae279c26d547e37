"""GPT-1 to and from Hugging Face's `OpenAIGPTLMHeadModel`, in memory and as a folder for `from_pretrained`.

The two compute the same function of the same weights; theirs keeps queries, keys and values in one transposed
matrix. What theirs cannot express (another attention, LayerNorm before the sublayers, an untied output layer)
is refused. `transformers` is an optional dependency, the extra `hf`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_modules.files import new_folder
from lightning_modules.gpt import GPT, GPTConfig
from lightning_modules.tokenizers import BPETokenizer, CharTokenizer, Tokenizer
from pennylane_qattn import Attention, Classical, LinearFeatureMap, ScaledDotScore
from pennylane_qattn.extras import install

if TYPE_CHECKING:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedTokenizerFast

#: Our names of activations, by theirs; their "gelu" is the tanh form.
ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu"}


def to_hugging_face(model: GPT) -> "OpenAIGPTLMHeadModel":
    """A Hugging Face model with a copy of the weights, of the same dtype, device and mode.

    Raises:
        ValueError: if `OpenAIGPTLMHeadModel` cannot express the model.
        ImportError: if transformers is not installed.
    """
    transformers = _transformers()
    config = model.config
    theirs = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.embed_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            afn=next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
            resid_pdrop=config.dropout,
            embd_pdrop=config.embed_dropout,
            attn_pdrop=_attention_dropout(model),
            layer_norm_epsilon=config.layer_norm_eps,
        )
    )
    theirs.to(model.head.weight).train(model.training)
    with torch.no_grad():
        for our, their in _weights(model, theirs):
            their.copy_(our)
    return theirs


def from_hugging_face(model: "OpenAIGPTLMHeadModel") -> GPT:
    """A GPT with a copy of the weights, of the same dtype, device and mode.

    Its attention is `Classical(bias=True, dropout=model.config.attn_pdrop)`.

    Raises:
        ValueError: for another kind of model, an activation but GELU and ReLU, or an untied output layer.
        ImportError: if transformers is not installed.
    """
    if not isinstance(model, _transformers().OpenAIGPTLMHeadModel):
        raise ValueError(f"expected an OpenAIGPTLMHeadModel; got {type(model).__name__}")
    if model.lm_head.weight is not model.transformer.tokens_embed.weight:
        raise ValueError("the output layer must be tied to the token embedding; call model.tie_weights()")
    ours = GPT(_our_config(model.config), Classical(bias=True, dropout=model.config.attn_pdrop))
    ours.to(model.lm_head.weight).train(model.training)
    with torch.no_grad():
        for our, their in _weights(ours, model):
            our.copy_(their)
    return ours


def save_pretrained(
    model: GPT, folder: str | os.PathLike[str], tokenizer: CharTokenizer | BPETokenizer | None = None
) -> None:
    """Writes a folder that `OpenAIGPTLMHeadModel.from_pretrained` reads, the weights as safetensors.

    The folder is written whole or not at all. A tokenizer becomes the `tokenizer.json` that `AutoTokenizer`
    and `BPETokenizer.load` read; one of characters is written as a byte-pair encoding without merges.

    Raises:
        ValueError: if the model cannot be expressed, the tokenizer has another vocabulary, or the folder
            cannot be written or holds something already.
        ImportError: if transformers is not installed.
    """
    if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    with new_folder(folder) as partial:
        to_hugging_face(model).save_pretrained(partial)
        if tokenizer is not None:
            fast_tokenizer(tokenizer).save_pretrained(partial)


def load_pretrained(folder: str | os.PathLike[str]) -> GPT:
    """The model of a folder that `save_pretrained`, here or in transformers, wrote; never asks the network.

    Raises:
        ValueError: if the folder holds no such model, or a damaged or incomplete one.
        ImportError: if transformers is not installed.
    """
    transformers, folder = _transformers(), Path(folder).expanduser()
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{str(folder)!r} holds no model; name a folder with a config.json") from None
    if kind != "openai-gpt":
        raise ValueError(f"{str(folder)!r} holds a model of type {kind!r}; expected 'openai-gpt'")
    try:
        model, report = transformers.OpenAIGPTLMHeadModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds for what they cannot read
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the model in {str(folder)!r}: {reason}") from error
    if report["missing_keys"]:  # transformers has filled them with random numbers
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"the model in {str(folder)!r} is incomplete; it lacks {missing}")
    return from_hugging_face(model)


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ImportError(f"Hugging Face models need transformers; install it with: {install('hf')}") from None
    return transformers


def _our_config(config: "OpenAIGPTConfig") -> GPTConfig:
    if config.afn not in ACTIVATIONS:
        raise ValueError(f"unknown activation {config.afn!r}; choose from {', '.join(sorted(ACTIVATIONS))}")
    return GPTConfig(
        vocab_size=config.vocab_size,
        block_size=config.n_positions,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        embed_dim=config.n_embd,
        activation=ACTIVATIONS[config.afn],
        norm="post",
        dropout=config.resid_pdrop,
        embed_dropout=config.embd_pdrop,
        tied_head=True,
        head_bias=False,
        layer_norm_eps=config.layer_norm_epsilon,
        init="gpt1",
    )


def _attention_dropout(model: GPT) -> float:
    """The dropout on the attention weights, once it is sure that theirs can express the model."""
    config = model.config
    needed = {"norm": "post", "tied_head": True, "head_bias": False}
    if config.feedforward_dim is not None:
        needed["feedforward_dim"] = 4 * config.embed_dim
    for name, value in needed.items():
        found = getattr(config, name)
        if found != value:
            raise ValueError(f"OpenAIGPTLMHeadModel needs {name}={value!r}; the model has {found!r}")
    attentions = [block.attention for block in model.blocks]
    for attention in attentions:
        if not _is_biased_classical(attention, config):
            raise ValueError(f"OpenAIGPTLMHeadModel needs attention Classical(bias=True); got {attention!r}")
    dropouts = sorted({attention.dropout for attention in attentions})
    if len(dropouts) > 1:
        raise ValueError(f"OpenAIGPTLMHeadModel has one attention dropout for all layers; got {dropouts}")
    return dropouts[0]


def _is_biased_classical(attention: Attention, config: GPTConfig) -> bool:
    # Exact types: a subclass may compute something else.
    if type(attention) is not Attention or type(attention.score) is not ScaledDotScore:
        return False
    maps = (attention.query_map, attention.key_map, attention.value_map)
    if not all(type(one) is LinearFeatureMap for one in maps):
        return False
    linears = [one.linear for one in maps] + [attention.out_proj]
    square = (config.embed_dim, config.embed_dim)
    return (
        all(linear.weight.shape == square and linear.bias is not None for linear in linears)
        and attention.num_heads == config.num_heads
        and attention.is_causal
    )


def _weights(ours: GPT, theirs: "OpenAIGPTLMHeadModel") -> Iterator[tuple[Tensor, Tensor]]:
    """Every weight of ours, and the view of the same shape of theirs."""
    yield ours.token_embedding.weight, theirs.transformer.tokens_embed.weight
    yield ours.position_embedding.weight, theirs.transformer.positions_embed.weight
    for block, layer in zip(ours.blocks, theirs.transformer.h, strict=True):
        attention, fused, project = block.attention, layer.attn.c_attn, layer.attn.c_proj
        maps = [one.linear for one in (attention.query_map, attention.key_map, attention.value_map)]
        for our, weight, bias in (
            *zip(maps, fused.weight.T.chunk(3), fused.bias.chunk(3), strict=True),
            (attention.out_proj, project.weight.T, project.bias),
            (block.attention_norm, layer.ln_1.weight, layer.ln_1.bias),
            (block.feedforward[0], layer.mlp.c_fc.weight.T, layer.mlp.c_fc.bias),
            (block.feedforward[2], layer.mlp.c_proj.weight.T, layer.mlp.c_proj.bias),
            (block.feedforward_norm, layer.ln_2.weight, layer.ln_2.bias),
        ):
            yield our.weight, weight
            yield our.bias, bias


def fast_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """The tokenizer as transformers has it; one of characters becomes a byte-pair encoding without merges."""
    import tokenizers

    if isinstance(tokenizer, BPETokenizer):
        described = tokenizers.Tokenizer.from_str(tokenizer.description)
    elif isinstance(tokenizer, CharTokenizer):
        ids = {character: index for index, character in enumerate(tokenizer.characters)}
        described = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
        described.decoder = tokenizers.decoders.Fuse()
    else:
        raise ValueError(f"transformers has no counterpart of the tokenizer {tokenizer.name!r}; use char or bpe")
    return _transformers().PreTrainedTokenizerFast(tokenizer_object=described)
