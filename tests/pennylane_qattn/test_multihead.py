"""Against `torch.nn.MultiheadAttention` with the same weights, and inside torch's own encoder."""

import pytest
import torch
from torch import nn

from pennylane_qattn import ATTENTION, MultiheadAttention

BATCH, LENGTH, WIDTH, HEADS = 3, 7, 12, 2


def twins(dtype, is_causal, batch_first):
    """Torch's module, and ours with its weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).to(dtype)
    ours = MultiheadAttention(
        WIDTH, HEADS, batch_first=batch_first, attention="classical", bias=True, block_size=LENGTH, is_causal=is_causal
    ).to(dtype)
    maps = ours.attention.query_map, ours.attention.key_map, ours.attention.value_map
    with torch.no_grad():
        theirs.in_proj_bias.uniform_(-1, 1)
        theirs.out_proj.bias.uniform_(-1, 1)
        weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
        for one, weight, bias in zip(maps, weights, biases, strict=True):
            one.linear.weight.copy_(weight)
            one.linear.bias.copy_(bias)
        ours.attention.out_proj.load_state_dict(theirs.out_proj.state_dict())
    return theirs, ours


def later(length=LENGTH):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def numbers(mask):
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


@pytest.mark.parametrize("padded", ["none", "boolean", "numbers"])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_equals_torch(is_causal, batch_first, average, padded, dtype, close, rng):
    theirs, ours = twins(dtype, is_causal, batch_first)
    shape = (BATCH, LENGTH, WIDTH) if batch_first else (LENGTH, BATCH, WIDTH)
    x = torch.randn(shape, dtype=dtype, generator=rng)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 4:] = True
    given = {"none": None, "boolean": padding, "numbers": numbers(padding).to(dtype)}[padded]
    mask = later() if is_causal else None
    if padded == "numbers" and is_causal:
        mask = numbers(mask).to(dtype)
    options = {"key_padding_mask": given, "attn_mask": mask, "average_attn_weights": average}
    for one, other in zip(ours(x, x, x, **options), theirs(x, x, x, **options), strict=True):
        assert one.shape == other.shape
        close(one.detach(), other.detach(), factor=10)
    assert ours(x, x, x, **options, need_weights=False)[1] is None


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch(batch_first, dtype, close, rng):
    theirs, ours = twins(dtype, False, batch_first)
    x = torch.randn(LENGTH, WIDTH, dtype=dtype, generator=rng)
    padding = torch.arange(LENGTH) > 4
    for one, other in zip(ours(x, x, x, padding), theirs(x, x, x, padding), strict=True):
        assert one.shape == other.shape
        close(one.detach(), other.detach(), factor=10)


@pytest.mark.parametrize("mechanism", [name for name in ATTENTION if not ATTENTION.build(name).is_published])
def test_in_an_encoder_of_torch(mechanism, rng):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(8, 2, batch_first=True, attention=mechanism, block_size=LENGTH)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(BATCH, LENGTH, 8, generator=rng)
    out = encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(LENGTH), is_causal=True)
    changed = x.clone()
    changed[:, 4:] += 1
    again = encoder(changed, mask=nn.Transformer.generate_square_subsequent_mask(LENGTH), is_causal=True)
    torch.testing.assert_close(again[:, :4], out[:, :4])
    assert not torch.allclose(again[:, 4:], out[:, 4:], atol=1e-3)
    out.square().sum().backward()
    assert all(p.grad is not None for p in encoder.layers[0].self_attn.parameters())
    encoder.eval()
    with torch.no_grad():
        evaluated = encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(LENGTH), is_causal=True)
    torch.testing.assert_close(evaluated, out.detach(), rtol=1e-4, atol=1e-5)


def test_what_it_does_not_do_is_refused(rng):
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=rng)
    causal = MultiheadAttention(WIDTH, HEADS, batch_first=True, attention="classical", block_size=LENGTH)
    plain = MultiheadAttention(
        WIDTH, HEADS, batch_first=True, attention="classical", block_size=LENGTH, is_causal=False
    )
    with pytest.raises(ValueError, match="query, key and value must be one and the same tensor"):
        causal(x, x.clone(), x, is_causal=True)
    with pytest.raises(ValueError, match="the attention is causal and the call is not: pass is_causal=True"):
        causal(x, x, x)
    for options in ({"is_causal": True}, {"attn_mask": later()}):
        with pytest.raises(ValueError, match="the call is causal and the attention is not"):
            plain(x, x, x, **options)
    wrong = later()
    wrong[3, 1] = True
    for mask in (wrong, wrong[:5, :5], later().T):
        with pytest.raises(ValueError, match="attn_mask must be None or the causal mask"):
            causal(x, x, x, attn_mask=mask)
    with pytest.raises(ValueError, match="key_padding_mask must be boolean, or of 0 and minus infinity"):
        causal(x, x, x, torch.full((BATCH, LENGTH), -1.0), is_causal=True)
    with pytest.raises(ValueError, match="unknown attention 'qiza'"):
        MultiheadAttention(WIDTH, HEADS, attention="qiza")


def test_state_survives(rng, tmp_path):
    first = MultiheadAttention(8, 2, batch_first=True, block_size=LENGTH, seed=3)
    second = MultiheadAttention(8, 2, batch_first=True, block_size=LENGTH)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(2, LENGTH, 8, generator=rng)
    assert torch.equal(first(x, x, x, is_causal=True)[0], second(x, x, x, is_causal=True)[0])
