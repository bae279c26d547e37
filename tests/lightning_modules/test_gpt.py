"""The GPT: configs and presets, parameter counts by hand, causality, cache, padding and initialisation."""

import ast
import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules import gpt as gpt_module
from lightning_modules.gpt import GPT, PRESETS, GPTConfig, preset
from pennylane_qattn import ATTENTION, Classical

VOCAB, BLOCK, BATCH, SEQ = 13, 7, 3, 5


def config(**overrides) -> GPTConfig:
    options = {"vocab_size": VOCAB, "block_size": BLOCK, "num_layers": 2, "num_heads": 1, "embed_dim": 5}
    return GPTConfig(**options | overrides)


def build(attention=None, *, seed=0, dtype=torch.float64, **overrides) -> GPT:
    torch.manual_seed(seed)
    attention = Classical() if attention is None else attention
    return GPT(config(**overrides), attention).to(dtype).eval()


def tokens(batch=BATCH, seq=SEQ, seed=1):
    return torch.randint(VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


every_attention = pytest.mark.parametrize(
    "attention", [pytest.param(cls(), id=name) for name, cls in ATTENTION.items()]
)
#: The published forms see the future, and have no cache.
every_causal_attention = pytest.mark.parametrize(
    "attention", [pytest.param(cls(), id=name) for name, cls in ATTENTION.items() if not cls.is_published]
)
both_norms = pytest.mark.parametrize("norm", ["pre", "post"])


class RunningMean(nn.Module):
    """An attention that is a running mean, with a parameter that is no weight of a linear layer."""

    def __init__(self, embed_dim, num_heads, block_size, *, layer):
        super().__init__()
        self.layer = layer
        self.angles = nn.Parameter(torch.arange(3.0))

    def forward(self, x, *, key_padding_mask=None, position_ids=None, cache=None):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None] * self.angles.cos().sum()


# ---- config and presets


def test_config_survives_json():
    for original in (*PRESETS.values(), config(feedforward_dim=11, layer_norm_eps=1e-6)):
        assert GPTConfig.from_plain(json.loads(json.dumps(original.to_plain()))) == original


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1; got 0"),
        ({"vocab_size": -1}, "vocab_size must be an integer of at least 1; got -1"),
        ({"embed_dim": 2.5}, "embed_dim must be an integer of at least 1; got 2.5"),
        ({"num_layers": "3"}, "num_layers must be an integer of at least 1; got '3'"),
        ({"feedforward_dim": 0}, "feedforward_dim must be an integer of at least 1; got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"embed_dropout": -0.1}, r"embed_dropout must lie in \[0, 1\); got -0.1"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must be positive and finite; got 0"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps must be positive and finite; got nan"),
        ({"activation": "gelu"}, "unknown activation 'gelu'; choose from gelu_new, relu"),
        ({"norm": "none"}, "unknown norm 'none'; choose from post, pre"),
        ({"init": "zeros"}, "unknown init 'zeros'; choose from gpt1, torch"),
    ],
)
def test_bad_config_is_refused(overrides, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        config(**overrides)


def test_unknown_names_and_fields_are_refused():
    with pytest.raises(ValueError, match="^unknown preset 'foo'; choose from gpt1, gpt1-tiny, qisa-128, qisa-16$"):
        preset("foo")
    with pytest.raises(ValueError, match="^GPTConfig has no field 'width'; its fields: activation, "):
        preset("gpt1", width=3)
    with pytest.raises(ValueError, match="^GPTConfig: .*missing"):
        GPTConfig.from_plain({"vocab_size": 3})
    with pytest.raises(ValueError, match="^embed_dim must be divisible by num_heads; got 5 and 2$"):
        build(num_heads=2)


def test_preset_replaces_fields_and_keeps_the_others():
    assert preset("qisa-16", block_size=31) == dataclasses.replace(PRESETS["qisa-16"], block_size=31)
    assert preset("qisa-16").block_size == 16
    with pytest.raises(ValueError, match="block_size"):
        preset("qisa-16", block_size=0)


def test_gpt1_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(PRESETS["gpt1"], Classical(bias=True, dropout=0.1))
    block = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert sum(p.numel() for p in model.parameters()) == 40478 * 768 + 512 * 768 + 12 * block == 116_534_784
    assert sum(model.parameter_counts().values()) == 116_534_784
    assert "head" not in model.parameter_counts()


def test_parameter_counts_by_hand():
    d, vocab = 16, 65
    counts = GPT(PRESETS["qisa-16"], Classical()).parameter_counts()
    assert counts == {
        "token_embedding": vocab * d,
        "position_embedding": 16 * d,
        "attention": 6 * (3 * d * d + d * d + d),
        "attention_norm": 6 * 2 * d,
        "feedforward_norm": 6 * 2 * d,
        "feedforward": 6 * (8 * d * d + 4 * d + d),
        "final_norm": 2 * d,
        "head": d * vocab + vocab,
    }


def test_presets_follow_their_papers():
    gpt1, tiny, small, large = (PRESETS[name] for name in ("gpt1", "gpt1-tiny", "qisa-16", "qisa-128"))
    for one in (gpt1, tiny):
        assert (one.norm, one.activation, one.tied_head, one.head_bias) == ("post", "gelu_new", True, False)
        assert (one.dropout, one.embed_dropout, one.layer_norm_eps, one.init) == (0.1, 0.1, 1e-5, "gpt1")
    for one, d in ((small, 16), (large, 128)):
        assert (one.norm, one.activation, one.tied_head, one.head_bias) == ("pre", "relu", False, True)
        assert (one.embed_dim, one.num_layers, one.num_heads, one.block_size, one.vocab_size) == (
            d,
            6,
            1,
            16,
            65,
        )
        assert (one.dropout, one.embed_dropout, one.init) == (0.2, 0.0, "torch")


def test_gpt_imports_torch_only():
    tree = ast.parse(Path(gpt_module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch"}


# ---- the forward pass


@pytest.mark.parametrize("overrides", [{}, {"norm": "post", "activation": "gelu_new", "tied_head": True}])
def test_forward_against_the_equations_by_hand(overrides):
    model = build(num_heads=5, layer_norm_eps=0.01, **overrides)
    ids = tokens()
    weights = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 0.01).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(x, name):  # five heads of one feature each: the score is a plain product
        q, k, v = (linear(x, f"{name}.{part}_map.linear") for part in ("query", "key", "value"))
        out = torch.zeros_like(v)
        for t in range(x.shape[1]):
            w = (q[:, t, None] * k[:, : t + 1]).exp()
            out[:, t] = (w * v[:, : t + 1]).sum(1) / w.sum(1)
        return linear(out, f"{name}.out_proj")

    def feed(x, name):
        x = linear(x, f"{name}.0")
        if "norm" in overrides:
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        else:
            x = x.clamp(min=0)
        return linear(x, f"{name}.2")

    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"][:SEQ]
    for block in ("blocks.0", "blocks.1"):
        parts = (
            f"{block}.attention",
            f"{block}.attention_norm",
            f"{block}.feedforward",
            f"{block}.feedforward_norm",
        )
        attention, attention_norm, feedforward, feedforward_norm = parts
        if "norm" in overrides:
            x = norm(x + attend(x, attention), attention_norm)
            x = norm(x + feed(x, feedforward), feedforward_norm)
        else:
            x = x + attend(norm(x, attention_norm), attention)
            x = x + feed(norm(x, feedforward_norm), feedforward)
    if "norm" not in overrides:
        x = norm(x, "final_norm")
    torch.testing.assert_close(model(ids), linear(x, "head"), rtol=0, atol=1e-12)


@every_causal_attention
@both_norms
def test_no_token_sees_a_later_one(attention, norm):
    model, ids = build(attention, norm=norm), tokens()
    with torch.no_grad():
        logits = model(ids)
        for t in range(1, SEQ):
            other = ids.clone()
            other[:, t] = (other[:, t] + 1) % VOCAB
            changed = model(other)
            assert torch.equal(changed[:, :t], logits[:, :t])
            assert not torch.equal(changed[:, t], logits[:, t])


@every_causal_attention
@both_norms
def test_cached_equals_uncached(attention, norm):
    model, ids = build(attention, norm=norm), tokens(seq=BLOCK)
    with torch.no_grad():
        whole = model(ids)
        for chunks in ((1,) * BLOCK, (3, 1, 2, 1), (BLOCK,)):
            caches = model.new_caches(BATCH)
            parts = [model(part, caches=caches) for part in ids.split(chunks, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@every_attention
def test_padding_changes_no_real_token(attention):
    model, ids = build(attention), tokens()
    with torch.no_grad():
        logits = model(ids)
        for left in (0, 1, 2):
            padded = torch.full((BATCH, BLOCK), 3)
            mask = torch.ones(BATCH, BLOCK, dtype=torch.bool)
            padded[:, left : left + SEQ], mask[:, left : left + SEQ] = ids, False
            found = model(padded, key_padding_mask=mask)[:, left : left + SEQ]
            torch.testing.assert_close(found, logits, rtol=0, atol=1e-12)


@every_causal_attention
def test_padded_rows_with_a_cache(attention):
    """Rows of 5, 3 and 1 tokens, two more fed one by one: each row as if it were alone."""
    model, ids = build(attention), tokens(seq=BLOCK)
    lengths = torch.tensor([5, 3, 1])
    mask = torch.arange(5) < 5 - lengths[:, None]
    prompt = torch.stack([F.pad(row[:n], (5 - n, 0)) for row, n in zip(ids, lengths.tolist(), strict=True)])
    with torch.no_grad():
        caches = model.new_caches(BATCH)
        steps = [model(prompt, key_padding_mask=mask, caches=caches)[:, -1]]
        for extra in range(2):
            new = ids.gather(1, (lengths + extra)[:, None])
            steps.append(model(new, position_ids=(lengths + extra)[:, None], caches=caches)[:, -1])
        for row, n in enumerate(lengths.tolist()):
            alone = model(ids[row : row + 1, : n + 2])[0, n - 1 :]
            torch.testing.assert_close(torch.stack(steps)[:, row], alone, rtol=0, atol=1e-12)


@every_attention
@both_norms
def test_wholly_padded_rows_are_finite(attention, norm):
    model, ids = build(attention, norm=norm), tokens()
    mask = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    mask[1] = True
    logits = model(ids, key_padding_mask=mask)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_position_ids_choose_the_learned_position():
    model = build()
    one = tokens(seq=1)
    places = torch.tensor([[6], [0], [3]])
    with torch.no_grad():
        found = model(one, position_ids=places)
        model.position_embedding.weight.copy_(model.position_embedding.weight[[3, 1, 2, 0, 4, 5, 6]])
        assert torch.equal(model(one, position_ids=torch.tensor([[6], [3], [0]])), found)
        assert not torch.equal(model(one, position_ids=places), found)


def test_any_attention_may_be_handed_in():
    model = build(RunningMean)
    assert [block.attention.layer for block in model.blocks] == [0, 1]
    assert model(tokens()).shape == (BATCH, SEQ, VOCAB)


# ---- initialisation and dropout


def test_gpt1_init_leaves_other_parameters_alone():
    model = build(RunningMean, init="gpt1", vocab_size=211, embed_dim=53, norm="post")
    for name, parameter in model.named_parameters():
        if name.endswith("angles"):
            assert torch.equal(parameter, torch.arange(3.0, dtype=torch.float64))
        elif "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight")))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
            assert abs(parameter.mean().item()) < 0.003


def test_torch_init_is_torchs_own():
    model = build(vocab_size=211, embed_dim=53)
    assert model.token_embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    assert model.head.weight.abs().max().item() == pytest.approx(53**-0.5, rel=0.01)


def test_tied_head_shares_its_weights_and_keeps_them_tied():
    model = build(tied_head=True, head_bias=False)
    for one in (model, copy.deepcopy(model), copy.deepcopy(model).float()):
        assert one.head.weight is one.token_embedding.weight
    model(tokens()).sum().backward()
    assert model.token_embedding.weight.grad.any(1).all()  # tokens that do not occur are still scored
    other = build(tied_head=True, head_bias=False, seed=1)
    other.load_state_dict(model.state_dict())
    assert other.head.weight is other.token_embedding.weight
    assert torch.equal(other(tokens()), model(tokens()))


@both_norms
def test_dropout_where_the_config_says(norm):
    model = build(dropout=0.3, embed_dropout=0.2, norm=norm)
    dropouts = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert dropouts == {
        "embed_dropout": 0.2,
        "blocks.0.attention_dropout": 0.3,
        "blocks.0.feedforward.3": 0.3,
        "blocks.1.attention_dropout": 0.3,
        "blocks.1.feedforward.3": 0.3,
    }
    ids, called = tokens(), []
    assert torch.equal(model(ids), model(ids))
    model.train()
    for name in dropouts:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    assert not torch.equal(model(ids), model(ids))
    assert called == list(dropouts) * 2


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m(tokens(seq=8)),
            "a sequence of 8 tokens is longer than block_size=7; shorten it or build the",
        ),
        (
            lambda m: m(torch.zeros(2, 0, dtype=torch.long)),
            r"tokens must be \(batch, seq\), seq at least 1; got ",
        ),
        (
            lambda m: m(torch.zeros(3, dtype=torch.long)),
            r"tokens must be \(batch, seq\), seq at least 1; got ",
        ),
        (lambda m: m(torch.zeros(2, 3)), "tokens must be int64 or int32; got torch.float32"),
        (lambda m: m(torch.tensor([[0, 13]])), r"token ids must lie in \[0, 13\); got values from 0 to 13"),
        (lambda m: m(torch.tensor([[-1, 2]])), r"token ids must lie in \[0, 13\); got values from -1 to 2"),
        (
            lambda m: m(torch.tensor([[1]]), position_ids=torch.tensor([[7]])),
            r"position ids must lie in \[0, 7\); got values from 7 to 7",
        ),
        (
            lambda m: m(tokens(), key_padding_mask=torch.ones(3, 5)),
            r"key_padding_mask must be bool of shape \(3, 5\)",
        ),
        (lambda m: m(tokens(), caches=m.new_caches(3)[:1]), "2 layers need as many caches; got 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        call(build())
    assert "\n" not in str(error.value)


def test_a_full_cache_is_refused_before_anything_is_written():
    model = build()
    caches = model.new_caches(BATCH)
    model(tokens(), caches=caches)
    with pytest.raises(ValueError, match="^a sequence of 8 tokens is longer than block_size=7"):
        model(tokens(seq=3), caches=caches)
    assert [len(cache) for cache in caches] == [SEQ, SEQ]
    with pytest.raises(ValueError, match="^padding beside a filled cache needs position_ids"):
        model(tokens(seq=1), caches=caches, key_padding_mask=torch.zeros(BATCH, 1, dtype=torch.bool))


def test_compiles_as_one_graph():
    """In a process of its own, since the shape checks of the test suite do not compile."""
    program = """
import torch
from lightning_modules.gpt import GPT, preset
from pennylane_qattn import Classical
model = GPT(preset("qisa-16", num_layers=2), Classical()).eval()
compiled = torch.compile(model, backend="eager", fullgraph=True)
tokens = torch.arange(14).view(2, 7)
for options in ({}, {"key_padding_mask": tokens < 3}):
    assert torch.equal(compiled(tokens, **options), model(tokens, **options))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@every_attention
def test_blocks_that_run_again_give_the_same_gradients(attention):
    """With dropout: the random numbers of the first run come again. Less is kept in between."""
    model, ids = build(attention, dropout=0.3), tokens(seq=BLOCK)
    model.train()
    found = []
    for runs_again in (False, True):
        model.gradient_checkpointing = runs_again
        torch.manual_seed(7)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = model(ids).square().sum()
        found.append((loss.detach(), sum(kept), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    (loss, kept, gradients), (loss_again, kept_again, gradients_again) = found
    assert torch.equal(loss, loss_again) and kept_again < kept / 2
    for gradient, again in zip(gradients, gradients_again, strict=True):
        assert (gradient is None) == (again is None)
        if gradient is not None:
            torch.testing.assert_close(again, gradient, rtol=1e-12, atol=1e-12)
