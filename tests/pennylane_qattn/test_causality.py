import pytest
import torch

from pennylane_qattn import ATTENTION, build_attention
from pennylane_qattn.causality import largest_leak


@pytest.fixture
def pair(rng):
    return torch.randn(5, 6, generator=rng).double(), torch.randn(5, 6, generator=rng).double()


@pytest.mark.parametrize("name", ATTENTION)
def test_causal_mechanisms_leak_nothing(name, pair):
    assert largest_leak(build_attention(name, 6, 2, 7).double(), *pair) == 0.0


def test_a_leak_is_found_and_measured(pair):
    assert largest_leak(build_attention("qisa", 6, 2, 7, is_causal=False).double(), *pair) > 1e-3

    def one_late_leak(x):
        out = x.clone()
        out[:, 3] += 1e-9 * x[:, 4]  # the next token only, and little of it
        return out

    expected = 1e-9 * (pair[0][4] - pair[1][4]).abs().max()
    assert largest_leak(one_late_leak, *pair) == pytest.approx(float(expected), rel=1e-4)


def test_the_past_may_be_seen(pair):
    assert largest_leak(lambda x: x.cumsum(1), *pair) == 0.0


def test_bad_pairs(pair):
    with pytest.raises(ValueError, match="must differ at every position; they agree at 0"):
        largest_leak(lambda x: x, pair[0], pair[0])
    with pytest.raises(ValueError, match="of one shape and two tokens or more"):
        largest_leak(lambda x: x, pair[0][:1], pair[1][:1])
