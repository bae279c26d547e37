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

Where the language of the text is known (`lightning_modules.sources`), so is the lowest cross-entropy that any predictor
of these windows can have on average. What a model has above it is its excess (`Excess`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import BLEUScore, CharErrorRate, WordErrorRate
from torchmetrics.utilities import dim_zero_cat

#: Groups of consecutive windows that the standard error of an excess comes from.
FEWEST_GROUPS, MOST_GROUPS = 16, 64
#: A model below the optimum by more standard errors than these, in no fewer windows, and by more nats, sees the future.
STANDARD_ERRORS, FEWEST_WINDOWS, ROUNDING = 5.0, 64, 1e-6


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

    def update(self, losses: Tensor, characters: int) -> None:
        """Add cross-entropies (B, T), in nats, of targets that decode to so many characters in all."""
        per_position = losses.to(self.sums.device).double().sum(dim=0)
        counts = torch.full_like(per_position, len(losses), dtype=torch.int64)
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


class Excess(Metric):
    r"""Cross-entropy of a model above the optimum, over the same windows, with its standard error.

    The error is that of batch means. Windows come in the order of the text and may share tokens, and the text has a
    memory, so that their differences are not independent; means over groups of consecutive windows nearly are. With
    sums :math:`D_g` of the differences of the :math:`n_g` tokens of group g of G, and the excess
    :math:`e = \sum D_g / \sum n_g`, its error is

    .. math:: \sqrt{\tfrac{G}{G - 1} \sum_g (D_g - e n_g)^2} / \sum_g n_g.

    There are up to 64 groups. They hold 2T windows at least, where that leaves 16 of them: each of the windows that
    begin at neighbouring tokens has T - 1 tokens in common with the next. Fewer windows give fewer groups, and an error
    that is itself less certain; of a single window there is none (NaN).

    The result does not depend on how the windows were split into batches (up to float64 rounding). Several processes
    are taken to have shared out each batch in turns, as `lightning_modules.data.Batches` does.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    differences: list[Tensor]
    lengths: list[Tensor]
    places: list[Tensor]
    sums: Tensor
    counts: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name in ("differences", "lengths", "places"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("sums", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(0, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def windows(self) -> int:
        """The number of windows of this process since the last `reset`."""
        return sum(map(len, self.lengths))

    def update(self, losses: Tensor, optimal: Tensor) -> None:
        """Add windows, which follow those before in the text.

        Args:
            losses: (B, T) cross-entropies of the model in nats.
            optimal: (B, T) those of the best predictor, `lightning_modules.sources.Source.cross_entropy`.

        Raises:
            ValueError: if the shapes differ.
        """
        if losses.ndim != 2 or losses.shape != optimal.shape:
            shapes = f"{tuple(losses.shape)} and {tuple(optimal.shape)}"
            raise ValueError(f"losses and optimal must both be (windows, T); got {shapes}")
        losses, optimal = (values.detach().to(self.sums.device).double() for values in (losses, optimal))
        windows, length = losses.shape
        first = self.windows
        self.differences.append((losses - optimal).sum(1))
        self.lengths.append(torch.full((windows,), length, device=self.sums.device))
        self.places.append(torch.arange(first, first + windows, device=self.sums.device))
        longest = max(len(self.sums), length)
        self.sums = _padded(self.sums, longest) + _padded(optimal.sum(0), longest)
        counts = torch.full((length,), windows, device=self.sums.device)
        self.counts = _padded(self.counts, longest) + _padded(counts, longest)

    def compute(self) -> dict[str, Tensor]:
        """Of all windows since the last `reset`, over all processes, as float64 tensors.

        Returns:
            Scalars ``optimum``, ``excess`` and ``excess_error``, in nats per token, and ``optimum_per_position``, (T,).

        Raises:
            ValueError: if there was no window.
        """
        if not int(self.counts.sum()):
            raise ValueError("no windows to compute the excess of; call update(losses, optimal) first")
        # Window i of each process belongs beside window i of the others.
        order = dim_zero_cat(self.places).argsort(stable=True)
        differences, lengths = (dim_zero_cat(values)[order] for values in (self.differences, self.lengths))
        excess = differences.sum() / lengths.sum()
        groups = _number_of_groups(len(order), int(lengths.max()))
        group = torch.arange(len(order), device=order.device) * groups // len(order)
        residuals = differences.new_zeros(groups).index_add_(0, group, differences - excess * lengths)
        variance = residuals.square().sum() * groups / (groups - 1) if groups > 1 else excess * math.nan
        return {
            "optimum": self.sums.sum() / self.counts.sum(),
            "excess": excess,
            "excess_error": variance.sqrt() / lengths.sum(),
            "optimum_per_position": self.sums / self.counts,
        }


def _number_of_groups(windows: int, length: int) -> int:
    return min(windows, max(FEWEST_GROUPS, min(MOST_GROUPS, windows // (2 * length))))


def below_optimum(excess: float, excess_error: float, windows: int | None = None) -> bool:
    """Whether a model is so far below the optimum that it must have seen what it predicts.

    Args:
        excess: nats per token, as `Excess` computes it.
        excess_error: its standard error.
        windows: if given, fewer than 64 of them, whose error is too uncertain, are no sign of anything.

    Returns:
        True if the excess is negative by more than 5 standard errors, and more than float32 may have rounded.
    """
    if windows is not None and windows < FEWEST_WINDOWS:
        return False
    return excess < -(STANDARD_ERRORS * excess_error + ROUNDING)


def _share(windows: int) -> int:
    """How many of the first windows are this process's, where processes share out each batch in turns."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return windows
    return -((distributed.get_rank() - windows) // distributed.get_world_size())


def _padded(values: Tensor, length: int) -> Tensor:
    return F.pad(values, (0, length - len(values)))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies (B, T) in nats, in float32 at least."""
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(precise.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class TextMetrics(nn.Module):
    """All metrics of this module at once; is moved, reset and synchronised as a torchmetrics metric is.

    The edit distance of torchmetrics is plain Python and takes time with the square of the window: 4,096
    windows cost half a second at 16 characters and four at 64 on one core. ``text_windows`` bounds that.

    Args:
        tokenizer: turns token ids into text; only its ``decode`` is used.
        text_windows: CER, WER and BLEU look at the first so many windows, of all processes, since the last
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
        self.excess = Excess()
        self.text = text_scores()
        self._text_seen = 0

    def update(self, logits: Tensor, targets: Tensor, optimal: Tensor | None = None) -> None:
        """Add a batch of windows.

        Args:
            logits: (B, T, V) scores of the next token, any floating dtype.
            targets: (B, T) ids of the true next tokens.
            optimal: (B, T) lowest cross-entropies that can be had on average; where they are known, give them with
                every batch.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        if logits.ndim != 3 or logits.shape[:2] != targets.shape:
            shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"logits must be (windows, T, vocabulary) and targets (windows, T); got {shapes}")
        references = [self.tokenizer.decode(ids) for ids in targets.tolist()]
        losses = _losses(logits.detach(), targets)
        if optimal is not None:
            self.excess.update(losses, optimal)
        self.likelihood.update(losses, sum(map(len, references)))
        room = len(references) if self.text_windows is None else _share(self.text_windows) - self._text_seen
        if room > 0:
            argmax = logits[:room].argmax(dim=-1).tolist()
            _update_text(self.text, [self.tokenizer.decode(ids) for ids in argmax], references[:room])
            self._text_seen += len(argmax)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all windows since the last `reset`, over all processes, as float64 tensors.

        Returns:
            Scalars ``cross_entropy`` (nats per token), ``bits_per_character``, ``perplexity``, ``cer``,
            ``wer`` and ``bleu`` (fractions; WER is NaN where no target holds a word), and
            ``cross_entropy_per_position``, (T,) in nats; where the optimum is known, also what `Excess.compute` gives.

        Raises:
            ValueError: if there was no window.
        """
        likelihood = self.likelihood.compute()
        excess = self.excess.compute() if self.excess.windows else {}
        return {**likelihood, **self.text.compute(), **excess}

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
        self.excess.reset()
        self.text.reset()
        self._text_seen = 0
