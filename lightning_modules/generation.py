r"""Sampling text from a GPT, token by token, for many prompts at once.

The model reads a *window*, the last tokens of a text. With `L` tokens so far, it holds

- all of them while `L <= block_size`;
- afterwards `half + (L - block_size - 1) mod (block_size - half + 1)`, `half = max(1, block_size // 2)`: a
  full window is cut to its last half and grows again.

A learned position belongs to a place in the window, so a window that slid by one token would make every
cached key stale; this one moves once in half a block. Its length depends on `L` alone, so the text is the
same with and without a cache, and each row's text is its own: a function of its prompt, the seed and its
number (in a batch of another shape, up to rounding in the logits).
"""

import math
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.gpt import GPT


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    first_row: int = 0,
    use_cache: bool | None = None,
    on_token: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt by `max_new_tokens` tokens and returns prompt and continuation.

    Args:
        model: the model; it runs in evaluation mode and is left in the mode it was in.
        prompts: token ids, one list per row; lengths may differ.
        max_new_tokens: tokens to add to each row.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; those tied with the last of them stay too.
        top_p: only the most likely tokens that together reach this probability, after `top_k`; ties stay too.
        seed: of the random draws.
        first_row: number of the first prompt. Each row is drawn from a generator seeded by the seed and its
            number, so a long list of prompts may be split over several calls.
        use_cache: remember keys and values rather than recompute the window; the text is the same. `None`: where
            the model's attention has a cache.
        on_token: called after every step with the new token of each row.

    Raises:
        ValueError: for an empty prompt, a token outside the vocabulary, an option outside its range, or a
            model whose logits are not finite; for a cache asked of a model that has none.
    """
    steps = stream(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        first_row=first_row,
        use_cache=use_cache,
    )
    texts = [list(map(int, prompt)) for prompt in prompts]
    for tokens in steps:
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        if on_token is not None:
            on_token(tokens)
    return texts


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    first_row: int = 0,
    use_cache: bool | None = None,
) -> Iterator[list[int]]:
    """The tokens of `generate` as they come: in each step one list with the new token of each row.

    Bad arguments raise at the call. Between steps the model is in the mode it was in, and gradients are on.
    """
    texts = [_token_ids(prompt, number, model.config.vocab_size) for number, prompt in enumerate(prompts, 1)]
    if not texts:
        raise ValueError("there are no prompts; give at least one")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative; got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or positive and finite; got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1]; got {top_p}")

    has_cache = all(getattr(block.attention, "has_cache", True) for block in model.blocks)
    if use_cache and not has_cache:
        raise ValueError("this model's attention has no key/value cache; leave use_cache out, or give use_cache=False")
    use_cache = has_cache if use_cache is None else use_cache

    def draws(row: int) -> list[float]:
        generator = random.Random(f"{seed}/{first_row + row}")  # the same stream on every platform
        return [generator.random() for _ in range(max_new_tokens)]

    uniforms = torch.tensor([draws(row) for row in range(len(texts))], dtype=torch.float64).T

    def choose(step: int, logits: Tensor) -> Tensor:
        if not logits.amax(-1).isfinite().all():
            raise ValueError("the model's logits are not finite; use a checkpoint from before it diverged")
        if temperature == 0:
            return logits.argmax(-1)
        return sample(next_token_probabilities(logits, temperature, top_k, top_p), uniforms[step])

    return _unobserved(model, _steps(model, texts, max_new_tokens, choose, use_cache))


def window_length(num_tokens: int, block_size: int) -> int:
    """How many of a text's last tokens the model reads (the rule above).

    >>> [window_length(length, 4) for length in range(1, 12)]
    [1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2]
    """
    if num_tokens <= block_size:
        return num_tokens
    half = max(1, block_size // 2)
    return half + (num_tokens - block_size - 1) % (block_size - half + 1)


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Softmax of `logits / temperature` over the tokens that pass `top_k`, then `top_p`; in float64.

    A token passes `top_k` if fewer than k tokens are more likely, and `top_p` if the more likely ones have a
    probability below `top_p` together.

    Args:
        logits: `(..., vocab)`; the probabilities have the same shape.
        temperature: positive.
        top_k, top_p: as in `generate`.
    """
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered = probabilities.sort(descending=True).values
        more_likely = F.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
        least = ordered.gather(-1, (more_likely < top_p).sum(-1, keepdim=True) - 1)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def sample(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Inverts the distribution function: the first token whose cumulated probability exceeds the uniform.

    Args:
        probabilities: `(batch, vocab)`, float64.
        uniforms: `(batch,)`, in [0, 1).

    Returns:
        Token ids `(batch,)`.
    """
    cumulated = probabilities.cumsum(-1)
    thresholds = uniforms.to(cumulated)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, thresholds, right=True)[:, 0]


def _steps(
    model: GPT, texts: list[list[int]], steps: int, choose: Callable[[int, Tensor], Tensor], use_cache: bool
) -> Iterator[list[int]]:
    block, device = model.config.block_size, model.head.weight.device
    chosen = positions = caches = None
    windows = [0] * len(texts)
    for step in range(steps):
        before, windows = windows, [window_length(len(text), block) for text in texts]
        if caches is not None and all(now == then + 1 for now, then in zip(windows, before, strict=True)):
            tokens, padding = chosen, None
            positions = None if positions is None else positions[:, -1:] + 1
        else:  # at the start, when a window was cut, and always without a cache
            caches = model.new_caches(len(texts)) if use_cache else None
            tokens, padding, positions = _left_padded(texts, windows, device)
        states = model.hidden_states(tokens, padding, positions, caches)
        chosen = choose(step, model.head(states[:, -1])).to(device)[:, None]
        new = chosen[:, 0].tolist()
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        yield new


def _left_padded(
    texts: list[list[int]], windows: list[int], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The windows as tokens, padding and positions `(batch, seq)`; without padding, of tokens alone."""
    longest = max(windows)
    rows = [[0] * (longest - window) + text[-window:] for text, window in zip(texts, windows, strict=True)]
    tokens = torch.tensor(rows, device=device)
    if min(windows) == longest:
        return tokens, None, None
    absent = torch.tensor([longest - window for window in windows], device=device)
    positions = torch.arange(longest, device=device) - absent[:, None]
    return tokens, positions < 0, positions


def _unobserved(model: GPT, steps: Iterator[list[int]]) -> Iterator[list[int]]:
    """The same steps, each in evaluation mode and without gradients; the caller sees neither."""
    # In the modules' dictionaries, as their own way to set an attribute would take a good part of a small model's step.
    attributes = [vars(module) for module in model.modules()]
    while True:
        with _evaluation(attributes):
            tokens = next(steps, None)
        if tokens is None:
            return
        yield tokens


@contextmanager
def _evaluation(modules: Sequence[dict[str, Any]]) -> Iterator[None]:
    # no_grad, not inference_mode: an attention may keep tensors made here and use them in training later.
    in_training = [attributes for attributes in modules if attributes["training"]]
    for attributes in in_training:
        attributes["training"] = False
    try:
        with torch.no_grad():
            yield
    finally:
        for attributes in in_training:
            attributes["training"] = True


def _token_ids(prompt: Sequence[int], number: int, vocab_size: int) -> list[int]:
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(f"prompt {number} must be a list of token ids; got {prompt!r}") from None
    if not ids:
        raise ValueError(f"prompt {number} is empty; give at least one token")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt {number} holds the token {token}; the vocabulary is 0 to {vocab_size - 1}")
    return ids
