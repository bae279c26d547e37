"""What a comparison asks of a trained model: how well it predicts, with the window before it and with its past alone.

A model that sees the future predicts well as long as the future stands in its window. `prefix_losses` takes it away:
each token is predicted from the tokens before it and nothing else, as it is in generation. For a causal model nothing
changes; for any other this is what it is worth.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_modules.data import Windows
from lightning_modules.generation import generate
from lightning_modules.language_model import LanguageModel, cross_entropy
from lightning_modules.metrics import TextMetrics, continuation_metrics
from lightning_modules.progress import counting, following, shown

#: Windows evaluated at once.
BATCH = 512


def evaluate(model: LanguageModel, windows: Windows, continuations: int = 128, temperature: float = 1.0) -> dict:
    """Measures a model on all windows of a split.

    Args:
        model: in evaluation mode, as it comes from a checkpoint.
        windows: those of a split of `TextDataModule`.
        continuations: number of windows to continue freely, spread over the text.
        temperature: of the continuations; 0 takes the most likely token.

    Returns:
        The metrics of `TextMetrics`; `per_position` and `prefix_per_position` (T numbers each, nats per token) and
        `prefix_cross_entropy`; and `generation`, CER, WER and BLEU of free continuations by as many tokens as a window
        has, against what the text says there (`None` where the text is too short for one).
    """
    metrics = TextMetrics(model.tokenizer).to(model.device)
    with torch.inference_mode():
        for inputs, targets in _batches(windows, model.device, "evaluating"):
            metrics.update(model.gpt(inputs), targets)
        with following("computing metrics"):
            values = metrics.compute()
        positions = math.ceil(len(windows) / BATCH) * windows.block_size
        with counting("evaluating the past alone", positions) as count:
            batches = _batches(windows, model.device)
            prefix = torch.cat([prefix_losses(model, *batch, count) for batch in batches]).mean(0)
    per_position = values.pop("cross_entropy_per_position").reshape(-1)
    return {
        **{name: float(value) for name, value in values.items()},
        "per_position": per_position.tolist(),
        "prefix_per_position": prefix.tolist(),
        "prefix_cross_entropy": float(prefix.mean()),
        "generation": continue_freely(model, windows, continuations, temperature),
    }


def window_losses(model: LanguageModel, windows: Windows) -> Tensor:
    """Cross-entropy `(windows, T)` in nats of every token of every window, in float64."""
    with torch.inference_mode():
        losses = [
            cross_entropy(model.gpt(inputs), targets, reduction="none").double().cpu()
            for inputs, targets in _batches(windows, model.device, "evaluating")
        ]
    return torch.cat(losses)


def prefix_losses(
    model: LanguageModel, inputs: Tensor, targets: Tensor, on_position: Callable[[], object] = lambda: None
) -> Tensor:
    """Cross-entropy `(batch, T)` in nats of each target when the model is given the tokens before it only.

    `on_position` is called after each of the T.
    """
    columns = []
    for t in range(inputs.shape[1]):
        logits = model.gpt(inputs[:, : t + 1])[:, -1:]
        columns.append(cross_entropy(logits, targets[:, t : t + 1], reduction="none")[:, 0])
        on_position()
    return torch.stack(columns, dim=1).double().cpu()


def continue_freely(model: LanguageModel, windows: Windows, count: int, temperature: float) -> dict[str, float] | None:
    """CER, WER and BLEU of generated continuations of windows, by as many tokens, against the text itself."""
    length, tokens = windows.block_size, windows.tokens.tolist()
    starts = [start for start in windows.starts.tolist() if start + 2 * length <= len(tokens)]
    starts = starts[:: max(1, len(starts) // count)][:count]
    if not starts:
        return None
    prompts = [tokens[start : start + length] for start in starts]
    with counting("continuing windows", length) as step:
        written = generate(model.gpt, prompts, length, temperature=temperature, on_token=step)
    decode = model.tokenizer.decode
    references = [decode(tokens[start + length : start + 2 * length]) for start in starts]
    if not any(reference.strip() for reference in references):
        return None
    return continuation_metrics([decode(text[length:]) for text in written], references)


def write_sample(model: LanguageModel, prompt: str, length: int, temperature: float) -> tuple[str, float]:
    """The prompt with `length` tokens that a model writes behind it, and how many characters a second it wrote."""
    begun = time.perf_counter()
    with counting("writing a sample", length) as count:
        (sample,) = model.generate([prompt], length, temperature=temperature, seed=0, on_token=count)
    return sample, (len(sample) - len(prompt)) / (time.perf_counter() - begun)


def _batches(windows: Windows, device: torch.device, doing: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    parts = torch.arange(len(windows)).split(BATCH)
    for part in shown(parts, doing) if doing else parts:
        inputs, targets = windows[part]
        yield inputs.to(device), targets.to(device)


def finite(value: Any) -> Any:
    """Plain data as JSON can hold them: numbers that are not finite become `None`."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
