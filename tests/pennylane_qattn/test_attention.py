"""The mixer by itself: the fused path against explicit weights."""

import pytest
import torch
from largest_tensor import LargestTensor

from pennylane_qattn import (
    ATTENTION,
    GaussianScore,
    ScaledDotScore,
    attention,
    build_attention,
    distance_attention,
    double_exponential,
)
from pennylane_qattn.attention import KeyValueCache, Visibility, attention_weights, fused_attention
from pennylane_qattn.grover import support


@pytest.mark.parametrize("score", [ScaledDotScore, GaussianScore])
@pytest.mark.parametrize("case", ["all", "triangle", "last queries", "padded", "positions"])
@pytest.mark.parametrize("width", [3, 5, 17])
def test_fused_equals_weights(score, case, width, dtype, close, rng):
    score = score(2, 5).to(dtype)
    queries = 3 if case == "last queries" else 7
    q = score.queries(torch.randn(3, 2, queries, 5, dtype=dtype, generator=rng)).detach()
    k = score.keys(torch.randn(3, 2, 7, 5, dtype=dtype, generator=rng)).detach()
    v = torch.randn(3, 2, 7, width, dtype=dtype, generator=rng)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, :2] = True  # its first two queries see nothing
    padding[1] = True  # and no query of this row sees anything
    positions = torch.stack([torch.randperm(7, generator=rng) for _ in range(3)])
    visibility = {
        "all": Visibility(queries, 7, is_causal=False),
        "triangle": Visibility(queries, 7, is_causal=True),
        "last queries": Visibility(queries, 7, is_causal=True),
        "padded": Visibility(queries, 7, is_causal=True, padding=padding),
        "positions": Visibility(queries, 7, True, None, positions, positions),
    }[case]
    weights = attention_weights(score, q, k, visibility)
    fused = fused_attention(score, q, k, v, visibility, dropout=0.0)
    close(fused, weights @ v, factor=10)
    if case == "padded":
        assert (fused[0, :, :2] == 0).all() and (fused[1] == 0).all()


def test_the_last_queries_see_what_came_before(rng):
    q, k = (torch.randn(1, 1, n, 2, generator=rng) for n in (2, 4))
    weights = attention_weights(ScaledDotScore(1, 2), q, k, Visibility(2, 4, is_causal=True))
    assert (weights[0, 0] > 0).tolist() == [[True, True, True, False], [True, True, True, True]]


def test_two_tokens_by_hand():
    """Scores 0 and ln 3 give weights 1/4 and 3/4."""
    q = torch.tensor([[[[0.0], [1.0]]]])
    k = torch.tensor([[[[1.0], [3.0]]]]).log()
    weights = attention_weights(ScaledDotScore(1, 1), q, k, Visibility(2, 2, is_causal=True))
    torch.testing.assert_close(weights[0, 0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


def test_cache_grows_by_what_is_appended(rng):
    cache = KeyValueCache(2, 5)
    for new in (2, 1):
        keys = torch.randn(2, 1, new, 3, generator=rng)
        held, *_ = cache.append(keys, keys, None, None)
        assert torch.equal(held[:, :, -new:], keys)
    assert len(cache) == held.shape[2] == 3


CAUSAL = sorted(name for name, cls in ATTENTION.items() if not getattr(cls, "is_published", False))


@pytest.mark.parametrize("name", ["overlap", "grover", "qisa", "gaussian"])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("case", ["triangle", "all", "padded", "positions", "last queries"])
def test_blocks_of_rows_equal_weights(name, structured, case, rng, monkeypatch):
    """Values and gradients, however few weights are written out at a time."""
    if structured and name not in ("grover", "qisa"):
        pytest.skip("its rows have no structure")
    torch.manual_seed(1)
    layer = build_attention(name, 6, 2, 7, is_causal=case != "all").double()
    x = torch.randn(3, 7, 6, dtype=torch.float64, generator=rng).requires_grad_()
    options = {}
    if case == "padded":
        options["key_padding_mask"] = torch.rand(3, 7, generator=rng) < 0.3
    if case == "positions":
        options["position_ids"] = torch.stack([torch.randperm(7, generator=rng) for _ in range(3)])

    def run():
        if case == "last queries":
            cache = layer.new_cache(3)
            return torch.cat([layer(x[:, :3], cache=cache), layer(x[:, 3:], cache=cache)], dim=1)
        return layer(x, **options)

    monkeypatch.setattr(distance_attention, "serve", lambda q, k, v: False)
    found = []
    for most in (2**24, 100):
        monkeypatch.setattr(attention, "MAX_WEIGHTS", {"cpu": most})
        monkeypatch.setattr(attention, "is_fused", lambda device, dropout: False)
        monkeypatch.setattr(type(layer.score), "is_structured", structured)
        monkeypatch.setattr(type(layer.score), "is_sparing", False)
        out = run()
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))))
    for whole, blocked in zip(*found, strict=True):
        torch.testing.assert_close(blocked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_matrix_of_weights(name, dropout, rng, monkeypatch):
    """Nothing as large as the square of the tokens is made, forwards or backwards."""
    monkeypatch.setattr(attention, "MAX_WEIGHTS", {"cpu": 2**16})
    monkeypatch.setattr(double_exponential, "BLOCK_ELEMENTS", {"cpu": 2**16})
    monkeypatch.setattr(support, "SCORE_ELEMENTS", 2**16)
    monkeypatch.setattr(distance_attention, "serve", lambda q, k, v: False)
    tokens = 700
    layer = build_attention(name, 8, 1, tokens, dropout=dropout)
    x = torch.randn(1, tokens, 8, generator=rng).requires_grad_()
    with LargestTensor() as seen:
        layer(x).square().sum().backward()
    assert seen.numbers < tokens**2 / 2
    assert x.grad.isfinite().all() and x.grad[0, 0].abs().sum() > 0


@pytest.mark.parametrize("name", CAUSAL)
def test_4096_tokens_of_width_128(name, rng):
    """With the package's own sizes of blocks."""
    tokens = 4096
    layer = build_attention(name, 128, 1, tokens)
    x = torch.randn(1, tokens, 128, generator=rng).requires_grad_()
    with LargestTensor() as seen:
        layer(x).square().sum().backward()
    assert seen.numbers < tokens**2 / 2
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["overlap", "classical"])
def test_blocks_of_rows_drop_the_same_weights_in_both_runs(name, rng, monkeypatch):
    monkeypatch.setattr(attention, "MAX_WEIGHTS", {"cpu": 50})
    torch.manual_seed(1)
    layer = build_attention(name, 4, 1, 9, dropout=0.5).double()
    x = torch.randn(1, 9, 4, dtype=torch.float64, generator=rng)

    def loss(x):
        torch.manual_seed(5)
        return layer(x).square().sum()

    assert torch.autograd.gradcheck(loss, x.requires_grad_())
