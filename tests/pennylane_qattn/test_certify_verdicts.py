"""What passes a certificate, what cannot be decided, and what is left out."""

import itertools
import json
import math

import pytest
import torch
from leaky_modules import OverTheQueries, Raises
from torch import nn

from pennylane_qattn import certify


class FourierMean(nn.Module):
    """A causal convolution by Fourier transforms: rounding moves every output."""

    embed_dim = 5

    def forward(self, x):
        length = x.shape[1]
        kernel = torch.fft.rfft(0.5 ** torch.arange(length, dtype=x.dtype), n=2 * length)
        return torch.fft.irfft(torch.fft.rfft(x, n=2 * length, dim=1) * kernel[:, None], n=2 * length, dim=1)[
            :, :length
        ]


def test_rounding_is_no_leak():
    found = certify(FourierMean())
    assert found.passes and 0 < max(check.largest for check in found.checks if check.test == "futures") < 1e-14
    leak = certify(FourierMean(), tolerance=0).leak
    assert leak.test in ("futures", "rows") and leak.size < 1e-14


class HugeFeature(nn.Module):
    """One of five features is as large as a number may be; another leaks."""

    embed_dim = 5

    def forward(self, x):
        out = x.cumsum(1)
        out[..., 4] = torch.finfo(x.dtype).max
        out[..., 0] += 1e-6 * x.detach().sum(1)[:, None, 0]
        return out


class Infinite(nn.Module):
    """Logits of minus infinity are the same infinity in both calls."""

    embed_dim = 5

    def forward(self, x):
        out = x.cumsum(1)
        out[..., 2] = -math.inf
        return out


def test_huge_and_infinite_features_hide_nothing():
    leak = certify(HugeFeature()).leak
    assert leak.test == "futures" and leak.size < 1e-4
    assert certify(Infinite()).passes


class SinglePrecision(nn.Module):
    """Computes in float32 whatever comes: rows by themselves differ by its rounding."""

    embed_dim = 29

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(29, 29, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        scale = 1 + 1e-7 * (len(x) == 1)  # as other blocks of a matrix product would have it
        return (x.float() @ self.weight.float()).to(x.dtype) * scale


def test_single_precision_inside_is_seen_and_said():
    found = certify(SinglePrecision())
    assert found.passes and "up to 1e-04, as it computes in 32 bits inside" in str(found)


class OnlyFloat32(nn.Module):
    embed_dim = 5

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(5, 5), torch.eye(5)

    def forward(self, x):
        return self.linear(x) @ self.table


class DefaultDtype(nn.Module):
    embed_dim = 5

    def forward(self, x):
        return x @ torch.eye(5)


class ComplexWeights(nn.Module):
    embed_dim = 5

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return (x.cumsum(1) + 0j).to(self.weight.dtype) @ self.weight


def test_complex_weights_and_outputs():
    found = certify(ComplexWeights())
    assert found.passes and found.form == "float64 copy"
    assert {check.remark for check in found.checks if check.test == "single rows"} == {"up to 1e-09"}
    assert certify(nn.Sequential(OverTheQueries(), nn.Linear(6, 5), ComplexWeights())).leak.layer == "0"


def test_what_does_not_run_in_float64():
    found = certify(OnlyFloat32())
    assert found.passes and found.form.startswith("float32 copy, as it does not run in float64 (RuntimeError: ")
    found = certify(DefaultDtype())
    assert found.passes and found.form == "float64 copy, float64 as default dtype"
    assert torch.get_default_dtype() == torch.float32


class Dropped(nn.Module):
    """Drops weights in training, and so rarely that two calls may agree."""

    embed_dim = 5

    def __init__(self, probability):
        super().__init__()
        self.inner, self.dropout = nn.Linear(5, 5), nn.Dropout(probability)

    def forward(self, x):
        return self.dropout(self.inner(x)).cumsum(1) / len(x) ** self.training


@pytest.mark.parametrize("probability", [0.5, 1e-6])
def test_with_dropout_only_equal_shapes_are_compared(probability):
    found = certify(Dropped(probability))
    assert found.passes
    (alone,) = (check for check in found.checks if (check.test, check.mode) == ("single rows", "train"))
    assert alone.left_out == "random numbers are drawn, and other shapes draw others" and not alone.done
    assert certify(Dropped(0.0)).leak.test == "single rows"


class Memorises(nn.Module):
    """Adds what the last call was given: by a buffer, an attribute, a list, or a number."""

    embed_dim = 5

    def __init__(self, where):
        super().__init__()
        self.where, self.number, self.kept, self.last = where, 0.0, [0.0], torch.zeros(())
        self.register_buffer("buffer", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        told = float(x.detach().sum())
        out = x.cumsum(1)
        if self.where == "buffer":
            out = out + self.buffer
            self.buffer += told
        elif self.where == "another buffer":
            out, self.buffer = out + self.buffer, x.sum().detach()
        elif self.where == "tensor":
            out = out + self.last
            self.last.add_(told)
        elif self.where == "list":
            out = out + sum(self.kept)
            self.kept.append(told)
        elif self.where == "generator":
            out = out + torch.randn((), generator=self.generator)
        else:
            out = out + self.number + getattr(self, "unheard_of", 0.0)
            self.number, self.unheard_of = told, told
        return out


@pytest.mark.parametrize("where", ["buffer", "another buffer", "tensor", "list", "number", "generator"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_what_a_module_remembers_is_put_back(where, mode):
    module = Memorises(where)
    assert certify(module, modes=(mode,)).passes
    assert module.kept == [0.0] and module.number == 0.0 and not hasattr(module, "unheard_of")
    assert module.buffer == 0 and module.last == 0
    expected = torch.randn((), generator=torch.Generator().manual_seed(1))
    assert torch.randn((), generator=module.generator) == expected


class Restless(nn.Module):
    embed_dim = 5
    calls = itertools.count()

    def forward(self, x):
        return x.cumsum(1) + next(self.calls)


class DrawsByContent(nn.Module):
    """As many random numbers as there are positive entries: calls with other inputs draw others."""

    embed_dim = 5

    def forward(self, x):
        return x.cumsum(1) + torch.rand(int((x > 0).sum())).sum()


class NotANumber(nn.Module):
    embed_dim = 5

    def forward(self, x):
        out = x.cumsum(1)
        return out.masked_fill(torch.arange(x.shape[1])[:, None] == 4, math.nan) if self.training else out


class NotANumberInLargeBatches(nn.Module):
    embed_dim = 5

    def forward(self, x):
        return x.cumsum(1) * (math.nan if len(x) > 3 else 1)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (NotANumberInLargeBatches, "its output has NaN in eval mode, and a change of NaN says nothing"),
        (Restless, "two equal calls in eval mode differ by 1.0e+00"),
        (DrawsByContent, "what it draws at random in eval mode depends on its inputs, so calls do not compare"),
        (NotANumber, "its output has NaN in train mode, and a change of NaN says nothing"),
        (Raises, "it raises RuntimeError in train mode: no training here at all"),
    ],
)
def test_what_cannot_be_decided(cls, reason):
    found = certify(cls(), embed_dim=5)
    assert (found.verdict, found.leak, found.label, found.passes) == ("undecided", None, "", False)
    assert reason in found.reason and found.summary() == f"{cls.__name__}: undecided: {found.reason}"


class Breaks(nn.Module):
    """Not a number where later tokens are anything but 0."""

    def forward(self, x):
        return x.cumsum(1) + 0 * (1e-3 - x[:, 1:].abs().sum(1, keepdim=True)).sqrt()


def test_a_number_that_the_future_takes_away_is_a_leak():
    inputs = torch.zeros(1, 5, 3)
    inputs[0, 0, 0] = 9.0
    leak = certify(Breaks(), inputs=inputs, batch_size=1).leak
    assert (leak.output, leak.input) == (0, 1)
    assert leak.size == torch.finfo(torch.float64).max and json.loads(json.dumps(leak.size)) == leak.size


class NoGradient(nn.Module):
    """None by its input; its parameters would have one."""

    embed_dim = 5

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(x.cumsum(1).detach())


class NoBackward(nn.Module):
    embed_dim = 5

    def forward(self, x):
        return _NoBackward.apply(x).cumsum(1)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        raise NotImplementedError("not yet")


class InfiniteGradient(nn.Module):
    embed_dim = 5

    def forward(self, x):
        return (x - x).abs().sqrt() + x.cumsum(1)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (NoGradient, "its output has no gradient"),
        (NoBackward, "it has no gradient (NotImplementedError: not yet)"),
        (InfiniteGradient, "its gradient is not finite"),
    ],
)
def test_gradients_that_are_not_there_are_left_out(cls, reason):
    found = certify(cls())
    assert found.passes
    assert {c.left_out for c in found.checks if c.test == "jacobians"} == {reason}
