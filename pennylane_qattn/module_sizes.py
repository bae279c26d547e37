"""What a module that nobody here wrote reads, and how much of it: guessed from its attributes, to be tried."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Attributes, of a module or of its `config`, that tell the longest sequence, the vocabulary and the width.
_LENGTHS = """block_size max_position_embeddings n_positions n_ctx max_seq_len max_seq_length max_len context_length
    context_size max_target_positions""".split()
_VOCABULARIES = ("vocab_size", "n_vocab", "num_tokens", "vocabulary_size")
_WIDTHS = ("embed_dim", "d_model", "n_embd", "input_size", "in_features", "in_channels", "hidden_size", "dim")
#: Parts of an output, by name, that are caches.
CACHES = frozenset(("past_key_values", "past_key_value", "cache", "caches", "mems"))
#: Widths of submodules that are tried.
_MOST_WIDTHS = 8
#: Default length, largest default length, and tokens times parameters of a default sequence.
LENGTH, MAX_LENGTH, MAX_WORK = 16, 128, 2 * 10**9


@dataclass(frozen=True)
class Reading:
    """One way to call a module: with tokens `(batch, seq)`, or embeddings `(batch, seq, size)`.

    Attributes:
        kind: `"tokens"` or `"embeddings"`.
        size: of the vocabulary, or the width; `None`: tokens of a vocabulary that a call will tell.
    """

    kind: str
    size: int | None

    def __str__(self) -> str:
        if self.kind == "tokens":
            return "tokens" if self.size is None else f"tokens of {self.size}"
        return f"embeddings of width {self.size}"


def readings(module: nn.Module) -> list[Reading]:
    """Ways to call a module, the likeliest first."""
    found = []
    tables = [part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)]
    table, vocabulary, width = token_table(module), _told(module, _VOCABULARIES), _told(module, _WIDTHS)
    if isinstance(table, nn.Embedding):
        found.append(Reading("tokens", table.num_embeddings))
    # a part of a language model may hold its config, vocabulary and all, and read embeddings
    if vocabulary and any(size >= vocabulary for size in tables):
        found.append(Reading("tokens", vocabulary))
    if width:
        found.append(Reading("embeddings", width))
    if tables:
        found.append(Reading("tokens", None))
    if vocabulary:
        found.append(Reading("tokens", vocabulary))
    widths = filter(None, (_width(part) for part in module.modules()))
    found += [Reading("embeddings", width) for width in list(dict.fromkeys(widths))[:_MOST_WIDTHS]]
    return list(dict.fromkeys(found))


def longest(module: nn.Module) -> int | None:
    """The longest sequence that a module, or one of its parts, says it takes."""
    told = [_told(module, _LENGTHS), *(_own(part, _LENGTHS) for part in module.modules())]
    return min(filter(None, told), default=None)


def default_length(module: nn.Module) -> int:
    """A length that a module takes and that can be paid for."""
    told = longest(module)
    if told is None:
        return LENGTH
    parameters = max(1, sum(parameter.numel() for parameter in module.parameters()))
    return min(told, MAX_LENGTH, max(LENGTH, MAX_WORK // parameters))


def token_table(module: nn.Module) -> nn.Module | None:
    """The token embedding, where `module.get_input_embeddings()` gives it, as Hugging Face's models do."""
    get = getattr(module, "get_input_embeddings", None)
    try:
        table = get() if callable(get) else None
    except Exception:  # whatever it raises, it tells nothing
        return None
    return table if isinstance(table, nn.Module) else None


def first_tensor(output: Any) -> Tensor | None:
    """The logits or embeddings in what a module returned: itself, its `logits`, or the first tensor inside."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    if isinstance(output, Mapping):
        output = [output["logits"]] if "logits" in output else list(output.values())
    if isinstance(output, list | tuple):
        return next((found for part in output if (found := first_tensor(part)) is not None), None)
    return None


def all_tensors(output: Any) -> list[Tensor]:
    """All tensors in what a module returned, in order, but for those of its caches (`CACHES`)."""
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        output = [value for name, value in output.items() if name not in CACHES]
    return [tensor for part in output for tensor in all_tensors(part)] if isinstance(output, list | tuple) else []


def _told(module: nn.Module, names: list[str] | tuple[str, ...]) -> int | None:
    """What a module or its config tells."""
    own = _own(module, names)
    return own if own is not None else _own(getattr(module, "config", None), names)


def _own(source: Any, names: list[str] | tuple[str, ...]) -> int | None:
    for name in names:
        value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _width(part: nn.Module) -> int | None:
    """The width that a part reads."""
    if isinstance(part, nn.LayerNorm):
        return part.normalized_shape[-1]
    if isinstance(part, nn.Embedding):
        return part.embedding_dim
    weight = getattr(part, "weight", None)
    if isinstance(part, nn.RMSNorm) and isinstance(weight, torch.Tensor):
        return weight.shape[-1]
    return _own(part, _WIDTHS)
