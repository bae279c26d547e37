"""The certificate finds leaks that are planted, and the first layer and the positions of each."""

import copy

import pytest
import torch
from leaky_modules import (
    BLOCK,
    WIDTH,
    Attend,
    Cached,
    Counted,
    Detached,
    MaskInEvaluationOnly,
    MaskInTrainingOnly,
    MaskOffByOne,
    MeanOfTheBatch,
    Normed,
    NormOverTime,
    OverTheQueries,
    Saturated,
    SomePositions,
    Tiny,
    Together,
    Transposed,
    attention,
    coverage,
)
from torch import nn

from pennylane_qattn import build_attention, certify
from pennylane_qattn.attention import Attention


@pytest.mark.parametrize(
    ("cls", "mode", "test", "positions"),
    [
        (Transposed, "eval", "futures", (0, 1)),
        (MaskOffByOne, "eval", "futures", (0, 1)),
        (MaskInTrainingOnly, "eval", "futures", (0, 1)),
        (MaskInEvaluationOnly, "train", "futures", (0, 1)),
        (OverTheQueries, "eval", "futures", (0, 1)),
        (NormOverTime, "eval", "futures", (0, 1)),
        (Tiny, "eval", "futures", (0, 1)),
        (Detached, "eval", "futures", (0, 1)),
        (Counted, "eval", "futures", (0, 1)),
        (Saturated, "eval", "jacobians", (0, 1)),
        (SomePositions, "eval", "futures", (3, 5)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_planted_leaks_in_time(cls, mode, test, positions):
    found = certify(nn.Sequential(nn.Linear(WIDTH, WIDTH), cls(), nn.Tanh()))
    leak = found.leak
    assert (found.verdict, found.passes, found.label) == ("LEAKS", False, "LEAKS")
    assert (leak.mode, leak.test, leak.layer, leak.across) == (mode, test, "1", "time")
    # the input is the smallest whose change is felt; an argmax need not feel the first
    assert leak.output == positions[0] and (leak.input == positions[1] or cls in (Counted, Detached))
    assert 0 < leak.size <= leak.largest < 1e2
    assert f"in 1, output {leak.output} depends on input {leak.input}" in found.summary()


def test_only_the_mode_that_leaks_is_blamed():
    assert certify(MaskInTrainingOnly(), modes=("train",)).passes
    assert certify(MaskInEvaluationOnly(), modes=["eval"]).passes
    assert not certify(MaskInEvaluationOnly(), modes=["train"]).passes


@pytest.mark.parametrize(
    ("rule", "position"),
    [
        # only where two tokens change together: all from 3 on
        (lambda tokens: (tokens[:, 3] != 0) & (tokens[:, 4] != 0), 3),
        # only where one changes and its neighbour does not: none of all that change from somewhere on
        (lambda tokens: (tokens[:, 3] != 0) & (tokens[:, 4] == 0), 3),
    ],
    ids=["together", "alone"],
)
def test_tokens_are_changed_together_and_alone(rule, position):
    leak = certify(Together(rule), inputs=torch.zeros(3, 7, dtype=torch.int64)).leak
    assert (leak.test, leak.output, leak.input, leak.size) == ("futures", 0, position, 1)


class TwoTokens(nn.Module):
    """With two tokens there is one change only, so its effect is known."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2, 5)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return x + 1e-6 * nn.functional.pad(x[:, 1:], (0, 0, 0, 1))


def test_a_small_leak_is_measured():
    module = TwoTokens().double()
    leak = certify(module).leak
    expected = 1e-6 * float((module.embedding.weight[0] - module.embedding.weight[1]).abs().max().detach())
    assert (leak.output, leak.input) == (0, 1)
    assert leak.size == pytest.approx(expected, rel=1e-8) == leak.largest
    # relative to the outputs, 1e-6 is a leak, and less than the tolerance is none
    assert certify(module, tolerance=1e-4).passes


@pytest.mark.parametrize("cls", [Tiny, Saturated])
def test_gradients_find_what_moves_nothing(cls):
    """With tolerances that hide the change, or where there is none."""
    module = cls()
    leak = certify(nn.Sequential(nn.Linear(WIDTH, WIDTH), module), tolerance=0 if cls is Saturated else 1e-12).leak
    assert (leak.output, leak.input, leak.layer) == (0, 1, "1")


def test_a_leak_across_the_batch():
    found = certify(nn.Sequential(nn.Linear(WIDTH, WIDTH), MeanOfTheBatch()))
    leak = found.leak
    assert (leak.test, leak.across, leak.mode, leak.layer) == ("rows", "batch", "eval", "1")
    # at position 0 every weight is 1, whatever the row
    assert (leak.output_row, leak.input_row, leak.output, leak.input) == (1, 0, 1, 0)
    assert "output 1 of row 1 depends on input 0 of row 0" in str(found)


def test_batch_norm_in_training():
    assert certify(Normed(), modes=("eval",)).passes
    leak = certify(Normed()).leak
    assert (leak.mode, leak.layer, leak.across, leak.test) == ("train", "norm", "batch", "rows")
    # alone in its batch, it is a leak in time
    leak = certify(Normed(), batch_size=1).leak
    assert (leak.mode, leak.layer, leak.across, leak.output, leak.input) == ("train", "norm", "time", 0, 1)


class DividesByTheBatch(Attend):
    def forward(self, x):
        return super().forward(x) / len(x)


def test_what_depends_on_the_size_of_the_batch():
    leak = certify(DividesByTheBatch()).leak
    assert (leak.test, leak.across, leak.output_row, leak.input) == ("single rows", "batch", 0, None)
    assert "output 0 of row 0 is another when the row is alone" in str(leak)


class WithCaches(nn.Module):
    """Layers that hand their caches on, as a GPT does."""

    embed_dim, block_size = WIDTH, BLOCK

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def new_caches(self, batch_size):
        return [layer.new_cache(batch_size) for layer in self.layers]

    def forward(self, x, *, caches=None):
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = x + layer(x, cache=cache)
        return x


class WeightsAhead(Attention):
    """What it shows is not what it does."""

    def weights(self, x, **options):
        return super().weights(x, **options).roll(1, -1)


class WeightsOff(Attention):
    def weights(self, x, **options):
        return super().weights(x, **options) * 0.5


def test_a_cache_that_is_off_by_one():
    assert coverage(certify(Cached(0)), "cache", "eval") == (2, 2)
    leak = certify(Cached(-1)).leak
    assert (leak.test, leak.across, leak.mode, leak.output, leak.input) == ("cache", "cache", "eval", 1, None)
    assert "output 1 is another with a cache than without" in str(leak)
    # one token at a time there is nothing ahead; the pieces are of 3, 1, 2 and 1 tokens
    leak = certify(Cached(1)).leak
    assert (leak.test, leak.output, leak.layer) == ("cache", 4, "Cached")


def test_the_layer_whose_cache_is_off_by_one():
    assert coverage(certify(WithCaches(Cached(0), Cached(0))), "cache", "eval") == (2, 2)
    leak = certify(WithCaches(Cached(0), Cached(-1), Cached(-1))).leak
    assert (leak.test, leak.output, leak.layer) == ("cache", 1, "layers.1")


class RefusesItsCache(Cached):
    def new_cache(self, batch_size):
        raise ValueError("no memory")


class RaisesWithItsCache(Cached):
    def forward(self, x, *, cache=None):
        if cache is not None and x.shape[1] == 1:
            raise RuntimeError("no single tokens")
        return super().forward(x, cache=cache)


@pytest.mark.parametrize(
    ("cls", "why"),
    [(RefusesItsCache, "ValueError: no memory"), (RaisesWithItsCache, "RuntimeError: no single tokens")],
)
def test_a_cache_that_does_not_run_is_undecided(cls, why):
    found = certify(cls(0))
    (check,) = (check for check in found.checks if check.test == "cache")
    assert found.verdict == "undecided" and why in found.summary()
    assert (
        found.reason
        == check.left_out
        == (f"it does not run with the cache that it offers ({why}); has_cache = False says that it has none")
    )
    module = cls(0)
    module.has_cache = False
    assert certify(module).passes


class CacheInDefaultDtype(Cached):
    """Made in advance, and without a dtype: torch's products take one dtype only."""

    def new_cache(self, batch_size):
        return [torch.zeros(batch_size, 0, WIDTH) for _ in range(2)]

    def forward(self, x, *, cache=None):
        assert cache is None or cache[0].dtype == x.dtype
        return super().forward(x, cache=cache)


def test_a_cache_is_made_in_the_precision_of_the_copy():
    assert coverage(certify(CacheInDefaultDtype(0)), "cache", "eval") == (2, 2)
    assert torch.get_default_dtype() == torch.float32


def test_weights_are_looked_at_where_they_are_shown():
    leak = certify(attention(WeightsAhead)).leak
    assert (leak.test, leak.output, leak.input, leak.layer) == ("weights", 0, 1, "QISA") and leak.size == 1
    found = certify(attention(WeightsOff))
    assert found.passes and "1 of 1; rows sum to 0.5 to 0.5, not 1" in str(found)
    assert "1 of 1; rows sum to 1" in str(certify(attention(Attention)))


@pytest.mark.parametrize("name", ["overlap", "gaussian"])
def test_layers_are_told_where_channels_are_as_many_as_tokens(name):
    """Scores `(B, H, T, T)` see what comes later, and are masked afterwards: no leak of theirs."""
    good, bad = (build_attention(name, 7, 1, 7, is_causal=is_causal) for is_causal in (True, False))
    assert certify(nn.Sequential(good, nn.Linear(7, 7), bad, copy.deepcopy(bad)), length=7).leak.layer == "2"


class Flattened(nn.Module):
    """Works on `(B T, C)`, then on `(T, B, C)`, then on `(B, C, T)`, and leaks in the last."""

    def __init__(self):
        super().__init__()
        self.flatten, self.flat, self.early = nn.Flatten(0, 1), nn.Linear(5, 5), nn.Linear(5, 5)
        self.late = nn.Conv1d(5, 5, 3, padding=1)

    def forward(self, x):
        x = self.flat(self.flatten(x)).unflatten(0, x.shape[:2])
        x = self.early(x.transpose(0, 1)).transpose(0, 1)
        return self.late(x.transpose(1, 2)).transpose(1, 2)


def test_layers_are_told_in_other_layouts():
    leak = certify(Flattened()).leak
    assert (leak.layer, leak.output, leak.input) == ("late", 0, 1)


class LastChannel(nn.Module):
    """Leaks into the last of as many channels as there are tokens."""

    def forward(self, x):
        return torch.cat((x[..., :-1], x[..., -1:].flip(1)), -1)


def test_layers_are_told_where_the_leak_is_in_one_channel():
    leak = certify(nn.Sequential(nn.Linear(7, 7), LastChannel(), nn.Linear(7, 7)), length=7).leak
    assert (leak.layer, leak.output, leak.input) == ("1", 0, 6)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(x).flip(1)


class InPlace(Functional):
    """The leak is added, in place, to what an innocent layer gave."""

    def forward(self, x):
        out = self.inner(x)
        out += x.flip(1)
        return out


def test_what_is_in_no_layer_has_the_modules_name():
    assert certify(InPlace(), name="mine").leak.layer == "mine"
    assert certify(Functional(), name="mine").leak.layer == "mine"
    leak = certify(nn.Sequential(nn.Linear(5, 5), Functional()), length=7).leak
    assert (leak.layer, leak.output, leak.input) == ("1", 0, 6)
