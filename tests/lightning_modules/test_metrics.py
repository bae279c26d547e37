"""Metrics against closed forms, hand-counted cases and an edit distance written here."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import multiprocessing

from lightning_modules.metrics import Excess, TextMetrics, below_optimum, continuation_metrics, describe_bleu
from lightning_modules.tokenizers import BPETokenizer, CharTokenizer

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")


def ids_of(*texts):
    return torch.tensor([LETTERS.encode(text) for text in texts])


def logits_of(*texts, height=5.0):
    """Logits whose argmax spells the texts."""
    return height * torch.nn.functional.one_hot(ids_of(*texts), 27).float()


def random_windows(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, length, 27, generator=generator)
    targets = torch.randint(27, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < 0.3] = 26
    copied = torch.rand(batch, length, generator=generator) < 0.5
    logits[copied] = 20 * torch.nn.functional.one_hot(targets[copied], 27).float()
    return logits, targets


def edits(a, b):
    """Levenshtein distance by recursion on prefixes, one row at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above_left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above_left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above_left + (x != y))
    return row[-1]


def computed(metrics):
    return {name: value.tolist() for name, value in metrics.compute().items()}


def test_uniform_logits_give_the_closed_forms():
    metrics = TextMetrics(LETTERS)
    metrics.update(torch.zeros(3, 5, 27), random_windows(3, 5)[1])
    values = computed(metrics)
    assert values["cross_entropy"] == pytest.approx(math.log(27), rel=1e-6)
    assert values["bits_per_character"] == pytest.approx(math.log2(27), rel=1e-6)
    assert values["perplexity"] == pytest.approx(27, rel=1e-6)
    assert values["cross_entropy_per_position"] == pytest.approx([math.log(27)] * 5, rel=1e-6)


def test_bits_are_per_character_also_for_longer_tokens():
    text = "the attention of the attention"
    tokenizer = BPETokenizer.train(text * 3, vocab_size=290)
    ids = tokenizer.encode(text)
    assert 1 < len(ids) < len(text) / 2
    metrics = TextMetrics(tokenizer)
    metrics.update(torch.zeros(1, len(ids), 290), torch.tensor([ids]))
    values = computed(metrics)
    assert values["bits_per_character"] == pytest.approx(len(ids) * math.log2(290) / 30, rel=1e-6)
    assert values["perplexity"] == pytest.approx(290, rel=1e-5)


def test_cross_entropy_by_hand_and_per_position():
    logits = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, -2.0]]]).double()
    targets = torch.tensor([[0, 0], [1, 1]])
    metrics = TextMetrics(CharTokenizer("ab"))
    metrics.update(logits, targets)
    first = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    second = (math.log(1 + math.exp(3)) + math.log(1 + math.exp(2))) / 2
    values = computed(metrics)
    assert values["cross_entropy_per_position"] == pytest.approx([first, second], abs=1e-15)
    assert values["cross_entropy"] == pytest.approx((first + second) / 2, abs=1e-15)
    assert values["perplexity"] == pytest.approx(math.exp((first + second) / 2), rel=1e-15)


def test_positions_are_not_mixed_with_windows():
    metrics = TextMetrics(LETTERS)
    logits = logits_of("abcde", "abcde", "abcde", height=50)
    logits[:, 3] = 0
    metrics.update(logits, ids_of("abcde", "abcde", "abcde"))
    expected = [0, 0, 0, math.log(27), 0]
    assert computed(metrics)["cross_entropy_per_position"] == pytest.approx(expected, abs=1e-6)


def test_error_rates_and_bleu_by_hand():
    metrics = TextMetrics(LETTERS)
    truth = "the cat sat on the mat"
    guess = "the cat sit on tha mat"
    metrics.update(logits_of(guess), ids_of(truth))
    values = computed(metrics)
    assert values["cer"] == pytest.approx(2 / 22)
    assert values["wer"] == pytest.approx(2 / 6)
    assert values["bleu"] == 0  # no matching 4-gram

    metrics.reset()
    metrics.update(logits_of("a b c d x f g"), ids_of("a b c d e f g"))
    # matches: 6 of 7 words, 4 of 6 pairs (ab bc cd fg), 2 of 5 triples, 1 of 4 quadruples; no brevity penalty
    assert computed(metrics)["bleu"] == pytest.approx((6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_bleu_sums_the_counts_of_all_windows():
    metrics = TextMetrics(LETTERS)
    truth = ["a b c d", "e f g h"]
    metrics.update(logits_of("a b c d", "e f x h"), ids_of(*truth))
    # 1..4-grams: 7 of 8, 4 of 6, 2 of 4, 1 of 2
    assert computed(metrics)["bleu"] == pytest.approx((7 / 8 * 4 / 6 * 2 / 4 * 1 / 2) ** 0.25)


def test_a_perfect_model():
    metrics = TextMetrics(LETTERS)
    metrics.update(logits_of("one two three four", height=100), ids_of("one two three four"))
    values = computed(metrics)
    assert values["cer"] == values["wer"] == 0 and values["bleu"] == pytest.approx(1)
    assert values["cross_entropy"] == pytest.approx(0, abs=1e-12) and values["perplexity"] == pytest.approx(1)


def test_error_rates_equal_an_independent_edit_distance():
    logits, targets = random_windows(23, 31)
    metrics = TextMetrics(LETTERS)
    metrics.update(logits, targets)
    truth = [LETTERS.decode(row) for row in targets.tolist()]
    guess = [LETTERS.decode(row) for row in logits.argmax(-1).tolist()]
    words = [(a.split(), b.split()) for a, b in zip(guess, truth, strict=True)]
    values = computed(metrics)
    assert values["cer"] == pytest.approx(sum(map(edits, guess, truth)) / (23 * 31))
    assert values["wer"] == pytest.approx(sum(edits(a, b) for a, b in words) / sum(len(b) for _, b in words))
    assert 0 < values["cer"] < 1 and 0 < values["wer"] < 1.5


@pytest.mark.parametrize("sizes", [[1] * 13, [5, 7, 1], [11, 0, 2]])
def test_the_split_into_batches_does_not_matter(sizes):
    logits, targets = random_windows(13, 7)
    whole, parts = TextMetrics(LETTERS, text_windows=11), TextMetrics(LETTERS, text_windows=11)
    whole.update(logits, targets)
    for some_logits, some_targets in zip(logits.split(sizes), targets.split(sizes), strict=True):
        parts.update(some_logits, some_targets)
    for name, value in computed(whole).items():
        assert computed(parts)[name] == pytest.approx(value, rel=1e-13, abs=0), name


def test_sums_survive_a_million_tokens():
    """A running sum in float32 loses its last digits here."""
    metrics = TextMetrics(CharTokenizer("ab"), text_windows=1)
    logits = torch.tensor([0.3, 0.1]).expand(100, 100, 2)
    targets = torch.ones(100, 100, dtype=torch.int64)
    exact = torch.nn.functional.cross_entropy(logits[0, :1], targets[0, :1]).double().item()
    for _ in range(100):
        metrics.update(logits, targets)
    assert computed(metrics)["cross_entropy"] == pytest.approx(exact, rel=1e-12)


def test_low_precision_logits_are_computed_in_float32():
    logits, targets = random_windows(3, 5)
    logits = logits.bfloat16()
    low, high = TextMetrics(LETTERS), TextMetrics(LETTERS)
    low.update(logits, targets)
    high.update(logits.float(), targets)
    assert computed(low) == computed(high)


def test_windows_of_unequal_length():
    metrics = TextMetrics(LETTERS)
    metrics.update(torch.zeros(2, 3, 27), ids_of("abc", "bcd"))
    metrics.update(logits_of("abcde", height=50), ids_of("abcde"))
    metrics.update(torch.zeros(1, 2, 27), ids_of("ab"))
    log = math.log(27)
    expected = [log * 3 / 4, log * 3 / 4, log * 2 / 3, 0, 0]
    assert computed(metrics)["cross_entropy_per_position"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_text_windows_bounds_the_text_metrics_only():
    truth = ids_of("aaaa", "aaaa", "aaaa", "aaaa", "aaaa")
    guess = logits_of("aaaa", "aaab", "bbbb", "bbbb", "bbbb", height=0.5)
    everything, some = TextMetrics(LETTERS), TextMetrics(LETTERS, text_windows=2)
    for metrics in (everything, some):
        metrics.update(guess[:1], truth[:1])
        metrics.update(guess[1:], truth[1:])
    assert computed(everything)["cer"] == 13 / 20 and computed(some)["cer"] == 1 / 8
    assert computed(everything)["cross_entropy"] == computed(some)["cross_entropy"]
    some.reset()
    some.update(guess[2:], truth[2:])
    assert computed(some)["cer"] == 1


def test_reset_forgets():
    metrics = TextMetrics(LETTERS)
    metrics.update(*random_windows(3, 7, seed=1))
    metrics.compute()
    metrics.reset()
    metrics.update(*random_windows(3, 5, seed=2))
    fresh = TextMetrics(LETTERS)
    fresh.update(*random_windows(3, 5, seed=2))
    assert computed(metrics) == computed(fresh)


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), copy.deepcopy])
def test_the_precision_of_the_model_does_not_touch_the_sums(change):
    metrics = TextMetrics(LETTERS)
    metrics.update(*random_windows(3, 7, seed=1))
    before = computed(metrics)
    metrics = change(metrics)
    assert computed(metrics) == before
    metrics.update(*random_windows(301, 7, seed=3))
    whole = TextMetrics(LETTERS)
    whole.update(*random_windows(3, 7, seed=1))
    whole.update(*random_windows(301, 7, seed=3))
    assert computed(metrics) == computed(whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_metrics_move_with_their_module():
    logits, targets = random_windows(5, 7)
    metrics, reference = TextMetrics(LETTERS).cuda(), TextMetrics(LETTERS)
    metrics.update(logits.cuda(), targets.cuda())
    reference.update(logits, targets)
    for name, value in metrics.compute().items():
        assert value.is_cuda and value.tolist() == pytest.approx(computed(reference)[name], rel=1e-5)


def optimum(targets):
    return targets / 27.0


def _rank(rank, meeting, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    some, whole = TextMetrics(LETTERS, text_windows=43), TextMetrics(LETTERS)
    for logits, targets in zip(*(values.split(40) for values in random_windows(97, 5)), strict=True):
        for metrics in (some, whole):
            metrics.update(logits[rank::2], targets[rank::2], optimum(targets[rank::2]))
    queue.put((computed(some), computed(whole)))
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_rank, args=(rank, tmp_path / "meeting", queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    logits, targets = random_windows(97, 5)
    for text_windows, found in zip((43, None), zip(*results, strict=True), strict=True):
        one = TextMetrics(LETTERS, text_windows)
        one.update(logits, targets, optimum(targets))
        for result in found:
            for name, value in computed(one).items():
                assert result[name] == pytest.approx(value, rel=1e-13), name


def test_continuations():
    values = continuation_metrics(["abc", "x y"], ["abcd", "x z"])
    assert values == {"cer": pytest.approx(2 / 7), "wer": pytest.approx(2 / 3), "bleu": 0}
    assert continuation_metrics(["a b c d"], ["a b c d"])["bleu"] == pytest.approx(1)


def test_an_empty_continuation_is_all_deletions():
    assert continuation_metrics([""], ["to be"]) == {"cer": 1, "wer": 1, "bleu": 0}


@pytest.mark.parametrize(
    ("generated", "references", "message"),
    [
        (["a"], ["a", "b"], "got 1 and 2"),
        ([], [], "got 0 blank ones"),
        (["a"], [" \n"], "got 1 blank ones"),
    ],
)
def test_continuations_without_their_references(generated, references, message):
    with pytest.raises(ValueError, match=message):
        continuation_metrics(generated, references)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input():
    with pytest.raises(ValueError, match="text_windows must be positive.*got 0"):
        TextMetrics(LETTERS, text_windows=0)
    metrics = TextMetrics(LETTERS)
    with pytest.raises(ValueError, match=r"got \(3, 5, 27\) and \(3, 7\)"):
        metrics.update(torch.zeros(3, 5, 27), torch.zeros(3, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(15, 27\) and \(15,\)"):
        metrics.update(torch.zeros(15, 27), torch.zeros(15, dtype=torch.int64))
    with pytest.raises(ValueError, match="no windows"):
        metrics.compute()


def test_bleu_is_described():
    sentence = describe_bleu()
    for word in ("corpus", "1 to 4", "uniform", "no smoothing", "white space"):
        assert word in sentence
    assert "16" not in sentence  # it stands below the metrics of windows of any length


# Excess over the optimum


def excess_of(losses, optimal, sizes=None):
    metric = Excess()
    for batch in zip(losses.split(sizes or len(losses)), optimal.split(sizes or len(optimal)), strict=True):
        metric.update(*batch)
    return {name: value.tolist() for name, value in metric.compute().items()}


def test_excess_of_no_windows():
    with pytest.raises(ValueError, match=r"no windows to compute the excess of; call update\(losses, optimal\) first"):
        excess_of(torch.zeros(0, 3), torch.zeros(0, 3), sizes=1)


def test_excess_by_hand():
    losses = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.5, 0.5]])
    optimal = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 2.0]])
    values = excess_of(losses, optimal)
    # Means over the windows: 0.5, 2 and -1. Their standard deviation (n - 1) is 1.5.
    assert values["excess"] == pytest.approx(0.5) and values["excess_error"] == pytest.approx(1.5 / math.sqrt(3))
    assert values["optimum"] == pytest.approx(7 / 6)
    assert values["optimum_per_position"] == pytest.approx([1, 4 / 3])
    assert values.keys() == {"excess", "excess_error", "optimum", "optimum_per_position"}


def test_excess_of_windows_of_unequal_length_is_per_token():
    metric = Excess()
    metric.update(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3))
    metric.update(torch.tensor([[4.0]]), torch.ones(1, 1))
    values = metric.compute()
    assert float(values["excess"]) == pytest.approx(9 / 4) and float(values["optimum"]) == pytest.approx(1 / 4)
    # D - e n: 6 - 27/4 and 3 - 9/4, so the sum of squares is 9/8; times 2 (G / (G - 1)), the root over 4 tokens.
    assert float(values["excess_error"]) == pytest.approx(math.sqrt(9 / 4) / 4)
    assert values["optimum_per_position"].tolist() == pytest.approx([1 / 2, 0, 0])


@pytest.mark.parametrize(("windows", "length", "groups"), [(6400, 5, 64), (640, 10, 32), (331, 11, 16), (13, 2, 13)])
def test_groups_are_of_consecutive_windows(windows, length, groups):
    """Losses that are the same within a group: its error is that of so many independent numbers."""
    generator = torch.Generator().manual_seed(7)
    numbers = torch.randn(groups, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([len(part) for part in np.array_split(np.arange(windows), groups)])
    # np.array_split puts the larger groups first; here they are spread.
    member = torch.arange(windows) * groups // windows
    assert sorted(member.bincount().tolist()) == sorted(sizes.tolist())
    values = excess_of(numbers[member][:, None].expand(-1, length), torch.zeros(windows, length))
    weights = member.bincount().double()
    residuals = weights * (numbers - float(values["excess"]))
    expected = math.sqrt(groups / (groups - 1) * float(residuals.square().sum())) / windows
    assert values["excess_error"] == pytest.approx(expected, rel=1e-12)
    assert values["excess_error"] == pytest.approx(float(numbers.std()) / math.sqrt(groups), rel=0.05)


@pytest.mark.parametrize("sizes", [[1] * 213, [100, 100, 13], [0, 211, 2]])
def test_the_split_into_batches_does_not_matter_for_the_excess(sizes):
    losses, optimal = torch.rand(2, 213, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, value in excess_of(losses, optimal, sizes).items():
        assert value == pytest.approx(excess_of(losses, optimal)[name], rel=1e-13), name


def test_the_error_of_an_excess_is_that_of_repeated_texts():
    """z-scores have the variance of Student's t, also with windows that overlap and losses that depend on the past."""
    generator = torch.Generator().manual_seed(5)

    def texts(tokens, memory=0.7, repetitions=300):
        differences = torch.randn(repetitions, tokens, generator=generator, dtype=torch.float64)
        for t in range(1, tokens):
            differences[:, t] += memory * differences[:, t - 1]
        return differences + 0.25

    def deviation(text_of_each, starts, length):
        scores, naive = [], []
        for differences in text_of_each:
            windows = differences.unfold(0, length, 1)[starts]
            values = excess_of(windows, torch.zeros_like(windows))
            scores.append((values["excess"] - 0.25) / values["excess_error"])
            naive.append((values["excess"] - 0.25) / (float(windows.std()) / math.sqrt(windows.numel())))
        assert 0.92 < np.mean(np.abs(scores) < 2) < 0.98  # nominally 0.95
        return np.std(scores), np.std(naive)

    every = torch.arange(1500)
    some = torch.randperm(6000, generator=generator)[:1024].sort().values
    for starts, length in ((every, 11), (some, 16)):
        honest, naive = deviation(texts(starts[-1] + length), starts, length)
        assert 0.9 < honest < 1.2 and naive > 3


def test_one_window_has_no_error():
    values = excess_of(torch.ones(1, 3), torch.zeros(1, 3))
    assert values["excess"] == 1 and math.isnan(values["excess_error"])
    assert not below_optimum(-1.0, math.nan)


def test_below_optimum_is_beyond_five_standard_errors():
    assert below_optimum(-0.0501, 0.01) and not below_optimum(-0.0499, 0.01) and not below_optimum(0.0501, 0.01)
    assert not below_optimum(-3e-7, 1e-9)  # the rounding of a perfect model in float32
    assert below_optimum(-1.0, 0.01, windows=64) and not below_optimum(-1.0, 0.01, windows=63)


def test_text_metrics_with_an_optimum():
    logits, targets = random_windows(71, 5)
    optimal = torch.rand(71, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with_it, without = TextMetrics(LETTERS), TextMetrics(LETTERS)
    with_it.update(logits, targets, optimal)
    without.update(logits, targets)
    values, plain = computed(with_it), computed(without)
    assert values["excess"] == pytest.approx(values["cross_entropy"] - float(optimal.mean()), rel=1e-6)
    assert values["optimum_per_position"] == pytest.approx(optimal.mean(0).tolist())
    assert {name: values[name] for name in plain} == plain and "excess" not in plain
    with_it.reset()
    with_it.update(logits, targets)
    assert computed(with_it) == plain


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), copy.deepcopy])
def test_the_precision_of_the_model_does_not_touch_the_excess(change):
    logits, targets = random_windows(71, 5)
    metrics = TextMetrics(LETTERS)
    metrics.update(logits, targets, torch.full((71, 5), 0.3))
    before = computed(metrics)
    assert computed(change(metrics)) == before


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_excess_of_bad_input():
    with pytest.raises(ValueError, match=r"must both be \(windows, T\); got \(3, 5\) and \(3, 7\)"):
        Excess().update(torch.zeros(3, 5), torch.zeros(3, 7))
    with pytest.raises(ValueError, match="no windows"):
        Excess().compute()
