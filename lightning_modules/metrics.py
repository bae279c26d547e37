r"""Metrics of a language model on windows of text.

With logits :math:`z` of a window, targets :math:`y` and :math:`\ell_t = -\log \mathrm{softmax}(z_t)_{y_t}`:

- cross-entropy, nats per token: the mean of :math:`\ell_t` over all tokens of all windows;
- bits per character: :math:`\sum \ell_t / (\ln 2 \cdot \text{characters})`, with the number of characters
  that the target tokens decode to, so that character and BPE models compare;
- perplexity: :math:`\exp` of the cross-entropy, hence per token (not torchmetrics' ``Perplexity``, which
  keeps its sum in float32);
- character error rate (CER), word error rate (WER) and BLEU of the teacher-forced argmax text of each window
  against its target text, from torchmetrics. CER and WER divide the edits of all windows by the characters or
  words of all targets. A window cuts words at its ends, and the pieces count as words.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import BLEUScore, CharErrorRate, WordErrorRate


class Decoder(Protocol):
    """What the metrics need of a tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


def describe_bleu() -> str:
    """For the foot of a table: level, n-grams, weights and smoothing of the BLEU reported here."""
    return (
        "BLEU (0 to 1) is at corpus level (the counts of all windows are summed first), with n-grams of "
        "1 to 4 words, uniform weights, no smoothing, and words split at white space. Without a single "
        "matching 4-gram it is 0: windows of fewer than four words can make it 0."
    )


def text_scores() -> MetricCollection:
    """CER, WER and BLEU of lists of strings, with sums in float64."""
    metrics = {"cer": CharErrorRate(), "wer": WordErrorRate(), "bleu": BLEUScore(n_gram=4, smooth=False)}
    for metric in metrics.values():
        metric.set_dtype(torch.float64)
    return MetricCollection(metrics, compute_groups=False)


def continuation_metrics(generated: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """CER, WER and BLEU of freely generated continuations against what the corpus says there.

    Args:
        generated: the continuations without their prompts.
        references: the true continuations, one for each of ``generated``.

    Returns:
        ``cer``, ``wer`` and ``bleu`` as fractions. Free text need not resemble its reference: rates near or
        above 1 are usual, and BLEU is as `describe_bleu` says.

    Raises:
        ValueError: if the lists are empty or of unequal length, or no reference holds a word.
    """
    if len(generated) != len(references):
        raise ValueError(f"each continuation needs one reference; got {len(generated)} and {len(references)}")
    if not any(reference.strip() for reference in references):
        raise ValueError(f"the references must hold at least one word; got {len(references)} blank ones")
    scores = text_scores()
    _update_text(scores, list(generated), list(references))
    return {name: float(value) for name, value in scores.compute().items()}


def _update_text(scores: MetricCollection, predictions: list[str], references: list[str]) -> None:
    scores["cer"].update(predictions, references)
    scores["wer"].update(predictions, references)
    scores["bleu"].update(predictions, [[reference] for reference in references])


class WindowCrossEntropy(Metric):
    """Cross-entropy in total and per position of the window, with sums in float64.

    The result does not depend on how the windows were split into batches (up to float64 rounding). Windows
    may be of unequal length from batch to batch; across processes the longest must be equally long.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    sums: Tensor
    counts: Tensor
    characters: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(0, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("characters", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, characters: int) -> None:
        """Add logits (B, T, V) and targets (B, T) whose tokens decode to so many characters in all."""
        precise = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(precise.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        per_position = losses.to(self.sums.device).double().sum(dim=0)
        counts = torch.full_like(per_position, len(targets), dtype=torch.int64)
        longest = max(len(self.sums), len(per_position))
        self.sums = _padded(self.sums, longest) + _padded(per_position, longest)
        self.counts = _padded(self.counts, longest) + _padded(counts, longest)
        self.characters = self.characters + characters

    def compute(self) -> dict[str, Tensor]:
        """The values that `TextMetrics.compute` names, without those of the argmax text."""
        if not int(self.counts.sum()):
            raise ValueError("no windows to compute metrics of; call update(logits, targets) first")
        nats = self.sums.sum()
        mean = nats / self.counts.sum()
        return {
            "cross_entropy": mean,
            "bits_per_character": nats / (math.log(2) * self.characters),
            "perplexity": mean.exp(),
            "cross_entropy_per_position": self.sums / self.counts,
        }


def _padded(values: Tensor, length: int) -> Tensor:
    return F.pad(values, (0, length - len(values)))


class TextMetrics(nn.Module):
    """All metrics of this module at once; is moved, reset and synchronised as a torchmetrics metric is.

    The edit distance of torchmetrics is plain Python and takes time with the square of the window: 4,096
    windows cost half a second at 16 characters and four at 64 on one core. ``text_windows`` bounds that.

    Args:
        tokenizer: turns token ids into text; only its ``decode`` is used.
        text_windows: CER, WER and BLEU look at the first so many windows (of each process) since the last
            `reset`; None takes all. The other metrics always use all windows. 1,024 suits validation during
            training, None a final test.

    Raises:
        ValueError: if ``text_windows`` is not positive.
    """

    def __init__(self, tokenizer: Decoder, text_windows: int | None = None) -> None:
        super().__init__()
        if text_windows is not None and text_windows < 1:
            raise ValueError(f"text_windows must be positive, or None for all windows; got {text_windows}")
        self.tokenizer = tokenizer
        self.text_windows = text_windows
        self.likelihood = WindowCrossEntropy()
        self.text = text_scores()
        self._text_seen = 0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch of windows.

        Args:
            logits: (B, T, V) scores of the next token, any floating dtype.
            targets: (B, T) ids of the true next tokens.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        if logits.ndim != 3 or logits.shape[:2] != targets.shape:
            shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"logits must be (windows, T, vocabulary) and targets (windows, T); got {shapes}")
        references = [self.tokenizer.decode(ids) for ids in targets.tolist()]
        self.likelihood.update(logits.detach(), targets, sum(map(len, references)))
        room = len(references) if self.text_windows is None else self.text_windows - self._text_seen
        if references[:room]:
            argmax = logits[:room].argmax(dim=-1).tolist()
            _update_text(self.text, [self.tokenizer.decode(ids) for ids in argmax], references[:room])
            self._text_seen += len(argmax)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all windows since the last `reset`, over all processes, as float64 tensors.

        Returns:
            Scalars ``cross_entropy`` (nats per token), ``bits_per_character``, ``perplexity``, ``cer``,
            ``wer`` and ``bleu`` (fractions; WER is NaN where no target holds a word), and
            ``cross_entropy_per_position``, (T,) in nats.

        Raises:
            ValueError: if there was no window.
        """
        likelihood = self.likelihood.compute()
        return {**likelihood, **self.text.compute()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Sums follow the model to its device, not to its precision: bfloat16 could not even count to 1,000.
        # MPS has no float64, so they stay where they are then.
        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor if device.type == "mps" else tensor.to(device)

        return super()._apply(move, recurse)

    def reset(self) -> None:
        """Forget all windows."""
        self.likelihood.reset()
        self.text.reset()
        self._text_seen = 0
