"""Certificates of whole models: what is registered here, what others wrote, and two hundred at random."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.gpt import GPT, GPTConfig, preset
from pennylane_qattn import ATTENTION, build_attention, certify

CAUSAL = sorted(name for name, cls in ATTENTION.items() if not getattr(cls, "is_published", False))
LEAKING = sorted(set(ATTENTION) - set(CAUSAL))
WITH_CIRCUITS = ("overlap", "qsann")
SIZES = {"vocab_size": 13, "block_size": 7, "num_heads": 2, "embed_dim": 6}


def gpt(attention, **options) -> GPT:
    torch.manual_seed(4)
    return GPT(GPTConfig(**SIZES | {"num_layers": 2} | options), attention)


def left_out(found):
    return {(check.test, check.mode): check.left_out for check in found.checks if check.left_out}


# --- what is registered -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_registered_mechanisms_are_causal(name):
    torch.manual_seed(4)
    found = certify(build_attention(name, 6, 2, 7))
    assert found.passes and not left_out(found)
    assert all(
        check.largest == 0 for check in found.checks if check.test in ("rows", "futures", "jacobians", "weights")
    )
    has_circuits = name in ("qisa", "grover") or name.startswith(WITH_CIRCUITS)
    assert found.form == ("float64 copy, circuits folded" if has_circuits else "float64 copy")


@pytest.mark.parametrize("name", CAUSAL)
def test_gpts_of_registered_mechanisms_are_causal(name):
    found = certify(gpt(ATTENTION.build(name)))
    assert found.passes and not left_out(found)
    assert found.coverage == (
        "6 of 6 rows, 12 of 12 futures, 12 of 12 jacobians, 6 of 6 single rows, 4 of 4 weights, 2 of 2 cache"
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_registered_mechanisms_without_a_mask_leak(name):
    leak = certify(gpt(ATTENTION.build(name, is_causal=False))).leak
    assert (leak.layer, leak.output, leak.input) == ("blocks.0.attention", 0, 1)


@pytest.mark.parametrize("name", LEAKING)
@pytest.mark.parametrize("whole", [False, True], ids=["alone", "GPT"])
def test_published_forms_leak(name, whole):
    torch.manual_seed(4)
    found = certify(gpt(ATTENTION.build(name)) if whole else build_attention(name, 6, 2, 7))
    assert found.verdict == "LEAKS" and (found.leak.output, found.leak.input) == (0, 1)
    assert found.leak.layer == ("blocks.0.attention" if whole else type(ATTENTION.build(name)).__name__)


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("name", ["classical", "qisa"])
def test_a_leak_in_one_layer_of_six(name, layer):
    """In the published setting: width and length are the same number."""
    torch.manual_seed(1)
    model = GPT(preset("qisa-16"), ATTENTION.build(name))
    model.blocks[layer].attention.is_causal = False
    leak = certify(model).leak
    assert (leak.layer, leak.output, leak.input, leak.mode) == (f"blocks.{layer}.attention", 0, 1, "eval")


def test_dropout_of_the_published_setting():
    torch.manual_seed(1)
    found = certify(GPT(preset("qisa-16"), ATTENTION.build("qisa", dropout=0.3)))
    assert found.passes
    assert left_out(found) == {("single rows", "train"): "random numbers are drawn, and other shapes draw others"}
    assert found.seconds < 20  # a fraction of a second where nothing else runs


# --- what others wrote ------------------------------------------------------------------------------------------


def hugging_face(kind):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    small = {"vocab_size": 37, "n_positions": 11, "n_embd": 20, "n_layer": 2, "n_head": 2, **ends}
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    if kind == "openai-gpt":
        return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**small))
    sizes = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2, **ends}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 11}
    if kind == "bert":
        sizes |= heads | {"pad_token_id": 0}
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, num_key_value_heads=2))


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "llama"])
def test_hugging_faces_causal_models(kind):
    model = hugging_face(kind).train()
    implementation = model.config._attn_implementation
    found = certify(model)
    assert found.passes and found.inputs == "tokens of 37, 3 rows of 11"
    expected = {}
    if kind != "llama":
        expected["single rows", "train"] = "random numbers are drawn, and other shapes draw others"
    if kind == "openai-gpt":
        expected["cache", "eval"] = "the module has no cache"
    assert left_out(found) == expected
    assert {check.mode: check.total for check in found.checks if check.test == "weights"} == {"eval": 2, "train": 2}
    # the rotary model normalises in float32, whatever it is given
    inside = {check.remark for check in found.checks if check.test == "single rows" and check.remark}
    assert all("32 bits inside" in remark for remark in inside) == (kind == "llama")
    assert model.training and model.config._attn_implementation == implementation
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_hugging_faces_other_models_leak():
    leak = certify(hugging_face("bert")).leak
    assert (leak.output, leak.input) == (0, 1) and leak.layer.startswith("bert.encoder.layer.0.attention")


def test_a_layer_of_hugging_faces_that_forgets_its_mask(monkeypatch):
    model = hugging_face("gpt2")
    attention = model.transformer.h[1].attn
    forward = attention.forward
    attention.is_causal = False
    monkeypatch.setattr(attention, "forward", lambda x, **options: forward(x, **options | {"attention_mask": None}))
    leak = certify(model).leak
    assert leak.layer.startswith("transformer.h.1") and (leak.output, leak.input) == (0, 1)


class Masked(nn.Module):
    """torch's own encoder, with a mask."""

    def __init__(self, is_causal=True, dropout=0.1):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(10, 2, 17, dropout, batch_first=True)
        self.encoder, self.is_causal = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), is_causal

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.encoder(x, mask=mask if self.is_causal else None)


def test_torchs_encoder():
    found = certify(Masked(), length=7)
    assert found.passes and found.inputs == "embeddings of width 10, 3 rows of 7"
    leak = certify(Masked(is_causal=False), length=7).leak
    assert leak.layer.startswith("encoder.layers.0") and (leak.output, leak.input) == (0, 1)


@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_networks(cls):
    torch.manual_seed(0)
    assert certify(cls(5, 7, 2, batch_first=True, dropout=0.3)).passes
    assert certify(cls(5, 7, batch_first=True, bidirectional=True)).leak.output == 0
    # time first: what should be rows are tokens
    leak = certify(cls(5, 7)).leak
    assert (leak.across, leak.output_row, leak.input_row) == ("batch", 1, 0)


class Convolved(nn.Module):
    """A stack of dilated causal convolutions."""

    def __init__(self, slip=0):
        super().__init__()
        torch.manual_seed(0)
        self.slip = slip
        self.layers = nn.ModuleList(nn.Conv1d(5, 5, 2, dilation=2**i) for i in range(3))

    def forward(self, x):
        x = x.transpose(1, 2)
        for i, layer in enumerate(self.layers):
            late = self.slip if i == 1 else 0
            x = x + layer(nn.functional.pad(x, (2**i - late, late))).tanh()
        return x.transpose(1, 2)


def test_convolutions():
    assert certify(Convolved(), embed_dim=5).passes
    leak = certify(Convolved(slip=1), embed_dim=5).leak
    # the padding is not the layer's own, so it is the whole that leaks
    assert (leak.layer, leak.output, leak.input) == ("Convolved", 0, 1)


def test_compiled_models_are_looked_at_as_they_are_written():
    found = certify(torch.compile(gpt(ATTENTION.build("classical")), backend="eager"))
    assert found.passes and found.form == "float64 copy, not compiled" and found.name == "GPT"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precision(dtype):
    assert certify(gpt(ATTENTION.build("qisa")).to(dtype)).passes


# --- two hundred at random --------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A layer of another kind in the stack: recurrent, a convolution, or a running mean."""

    def __init__(self, kind, width):
        super().__init__()
        self.kind, self.inner = kind, nn.Identity()
        if kind == "gru":
            self.inner = nn.GRU(width, width, batch_first=True)
        elif kind == "convolution":
            self.inner = nn.Conv1d(width, width, 3)
        elif kind == "fourier":
            self.kernel = nn.Parameter(torch.randn(width))

    def forward(self, x):
        length = x.shape[1]
        if self.kind == "gru":
            return self.inner(x)[0]
        if self.kind == "convolution":
            return self.inner(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        if self.kind == "fourier":
            kernel = (-self.kernel.abs() * torch.arange(length, device=x.device)[:, None].to(x.dtype)).exp()
            product = torch.fft.rfft(x, n=2 * length, dim=1) * torch.fft.rfft(kernel, n=2 * length, dim=0)
            return torch.fft.irfft(product, n=2 * length, dim=1)[:, :length]
        return x.cumsum(1) / torch.arange(1, length + 1, device=x.device)[:, None]


class Stack(nn.Module):
    """Attention and other layers by turns, from embeddings to embeddings."""

    def __init__(self, layers, width, dropout):
        super().__init__()
        self.layers, self.norm, self.dropout = nn.ModuleList(layers), nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x):
        for layer in self.layers:
            x = x + self.dropout(layer(self.norm(x)))
        return x


def random_model(seed):
    """A causal model and the arguments to certify it with."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    heads = int(rng.integers(1, 4))
    width, block = heads * int(rng.integers(2, 5)), int(rng.integers(2, 9))
    options = {"dropout": float(rng.choice([0.0, 0.2])), "out_bias": bool(rng.integers(2))}
    options["head_dim"] = int(rng.integers(1, 6)) if rng.integers(2) else None
    name = str(rng.choice(CAUSAL))
    if "split" in ATTENTION[name].__dataclass_fields__:
        options["split"] = bool(rng.integers(2))
    if "bias" in ATTENTION[name].__dataclass_fields__:
        options["bias"] = bool(rng.integers(2))
    if "k" in ATTENTION[name].__dataclass_fields__:
        options["k"] = int(rng.integers(1, block + 1))
    mechanism, dropout = ATTENTION.build(name, seed=seed, **options), float(rng.choice([0.0, 0.3]))
    given = {"batch_size": int(rng.integers(1, 4)), "seed": seed}
    if rng.integers(2):
        norm, activation = str(rng.choice(["pre", "post"])), str(rng.choice(["relu", "gelu_new"]))
        sizes = {"vocab_size": int(rng.integers(2, 12)), "block_size": block, "num_heads": heads, "embed_dim": width}
        config = GPTConfig(
            **sizes,
            num_layers=int(rng.integers(1, 4)),
            norm=norm,
            activation=activation,
            dropout=dropout,
            tied_head=bool(rng.integers(2)),
        )
        model = GPT(config, mechanism)
    else:
        kinds = rng.choice(["attention", "gru", "convolution", "fourier", "mean"], int(rng.integers(1, 4)))
        layers = [
            mechanism(width, heads, block, layer=i) if kind == "attention" else Recurrent(str(kind), width)
            for i, kind in enumerate(kinds)
        ]
        model, given["length"] = Stack(layers, width, dropout), block
    scale = math.exp(float(rng.normal()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model, given


@pytest.mark.parametrize(
    "first", [pytest.param(first, marks=[pytest.mark.slow] if first else []) for first in range(0, 200, 25)]
)
def test_no_false_alarm_in_two_hundred_causal_models(first):
    verdicts = {}
    for seed in range(first, first + 25):
        model, given = random_model(seed)
        verdicts[seed] = certify(model, **given).summary()
    assert not {seed: text for seed, text in verdicts.items() if ": causal (" not in text}


@pytest.mark.parametrize("first", [0, pytest.param(20, marks=pytest.mark.slow)])
def test_a_leak_in_random_models_is_found(first):
    """A part in 1e8 of the next token, added to what one layer gives."""

    def leak(module, args, output):
        whole = output[0] if isinstance(output, tuple) else output
        return whole + 1e-8 * whole.roll(-1, 1)

    missed = []
    for seed in range(first, first + 20):
        model, given = random_model(seed)
        layers = model.blocks if isinstance(model, GPT) else model.layers
        chosen = seed % len(layers)
        layers[chosen].register_forward_hook(leak)
        found = certify(model, **given)
        path = f"{'blocks' if isinstance(model, GPT) else 'layers'}.{chosen}"
        if found.leak is None or found.leak.layer != path:
            missed.append((seed, found.summary()))
    assert not missed
