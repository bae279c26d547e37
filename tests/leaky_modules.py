"""Attention with one mistake each, and modules that a certificate of causality is tried on."""

import math

import torch
from torch import nn

from pennylane_qattn import build_attention

WIDTH, HEADS, BLOCK = 6, 2, 7


class Attend(nn.Module):
    """One head of plain attention, with a place for each mistake."""

    block_size, embed_dim = BLOCK, WIDTH

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def visible(self, length):
        return torch.ones(length, length, dtype=torch.bool).tril()

    def normalise(self, scores):
        return scores.masked_fill(~self.visible(scores.shape[-1]), -math.inf).softmax(-1)

    def mix(self, weights, values):
        return weights @ values

    def forward(self, x):
        weights = self.normalise(self.q(x) @ self.k(x).transpose(1, 2))
        return self.mix(weights, self.v(x))


class Transposed(Attend):
    def mix(self, weights, values):
        return weights.transpose(1, 2) @ values


class MaskOffByOne(Attend):
    def visible(self, length):
        return torch.ones(length, length, dtype=torch.bool).tril(1)


class MaskInTrainingOnly(Attend):
    def visible(self, length):
        return super().visible(length) if self.training else torch.ones(length, length, dtype=torch.bool)


class MaskInEvaluationOnly(Attend):
    def visible(self, length):
        return torch.ones(length, length, dtype=torch.bool) if self.training else super().visible(length)


class MeanOfTheBatch(Attend):
    """The weights are moved by their mean over the batch."""

    def normalise(self, scores):
        weights = super().normalise(scores)
        return weights + 0.1 * weights.mean(0)


class OverTheQueries(Attend):
    """The softmax runs over the wrong axis."""

    def normalise(self, scores):
        return scores.masked_fill(~self.visible(scores.shape[-1]), -math.inf).softmax(-2)


class NormOverTime(Attend):
    def forward(self, x):
        return super().forward((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))


class Tiny(Attend):
    """1e-6 of the next value."""

    def mix(self, weights, values):
        return super().mix(weights, values) + 1e-6 * values.roll(-1, 1).index_fill(1, torch.tensor([BLOCK - 1]), 0.0)


class Detached(Attend):
    """Not differentiable: the gradient knows nothing of it."""

    def mix(self, weights, values):
        return super().mix(weights, values) + values.detach().cumsum(1).flip(1).sign()


class Counted(Attend):
    """By an argmax over all of the sequence."""

    def mix(self, weights, values):
        return super().mix(weights, values) + 0.01 * values.argmax(1, keepdim=True)


class Saturated(Attend):
    """The future goes through a step that random inputs never reach, but that has a slope."""

    def mix(self, weights, values):
        return super().mix(weights, values) + _Step.apply(values.roll(-1, 1)) * (torch.arange(BLOCK) < 6)[:, None]


class _Step(torch.autograd.Function):
    """A sign with the slope of a line, as quantised models have it; and what it gives is thrown away."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, upstream):
        return 0.3 * upstream


class SomePositions(Attend):
    """Position 3 sees position 5; nothing else does."""

    def mix(self, weights, values):
        out = super().mix(weights, values)
        if out.shape[1] > 5:
            out[:, 3] = out[:, 3] + values[:, 5]
        return out


class Together(nn.Module):
    """The first output sees later tokens by a rule that knows no gradient."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.embedding = rule, nn.Embedding(11, 5)

    def forward(self, tokens):
        out = self.embedding(tokens).cumsum(1)
        return out + self.rule(tokens)[:, None, None] * (torch.arange(tokens.shape[1]) == 0)[:, None]


class Normed(nn.Module):
    """BatchNorm over rows and time."""

    embed_dim = 5

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)


class Cached(Attend):
    """Remembers keys and values; with a cache, each query sees so many keys too many."""

    def __init__(self, excess):
        super().__init__()
        self.excess = excess

    def new_cache(self, batch_size):
        return [torch.zeros(batch_size, 0, WIDTH, dtype=torch.float64) for _ in range(2)]

    def forward(self, x, *, cache=None):
        if cache is None:
            return super().forward(x)
        past = cache[0].shape[1]
        cache[:] = [torch.cat((held, new(x)), 1) for held, new in zip(cache, (self.k, self.v), strict=True)]
        scores = self.q(x) @ cache[0].transpose(1, 2)
        visible = torch.ones_like(scores[0], dtype=torch.bool).tril(past + (self.excess if past else 0))
        return scores.masked_fill(~visible, -math.inf).softmax(-1) @ cache[1]


class Raises(nn.Module):
    embed_dim = 5

    def forward(self, x):
        if self.training:
            raise RuntimeError("no training here\nat all")
        return x


def attention(cls, name="qisa", **options):
    torch.manual_seed(2)
    module = build_attention(name, WIDTH, HEADS, BLOCK, **options)
    module.__class__ = cls
    return module


def coverage(found, test, mode):
    return next((c.done, c.total) for c in found.checks if (c.test, c.mode) == (test, mode))
