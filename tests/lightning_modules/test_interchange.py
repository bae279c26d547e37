"""Parity with Hugging Face's `OpenAIGPTLMHeadModel`, an implementation that nobody here wrote."""

import errno
import json
import socket
import sys

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.generation import generate
from lightning_modules.gpt import GPT, GPTConfig, preset
from lightning_modules.interchange import from_hugging_face, load_pretrained, save_pretrained, to_hugging_face
from lightning_modules.tokenizers import BPETokenizer, CharTokenizer
from pennylane_qattn import ATTENTION, Classical

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

VOCAB, BLOCK, LAYERS, HEADS, WIDTH, BATCH, SEQ = 37, 13, 3, 5, 35, 3, 11


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def randomised(model, seed=0):
    """Weights from N(0, 0.3), of LayerNorms N(1, 0.3), biases N(0, 0.1), so that every term counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if name.endswith("bias") else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                parameter.add_(1)
    return model


def our_model(dtype=torch.float32, *, attention=None, **overrides) -> GPT:
    options = {
        "vocab_size": VOCAB,
        "block_size": BLOCK,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "embed_dim": WIDTH,
        "dropout": 0.11,
        "embed_dropout": 0.12,
        "layer_norm_eps": 1e-3,
    }
    attention = Classical(bias=True, dropout=0.13) if attention is None else attention
    return randomised(GPT(preset("gpt1-tiny", **options | overrides), attention)).to(dtype).eval()


def their_model(dtype=torch.float32, **overrides):
    options = {
        "vocab_size": VOCAB,
        "n_positions": BLOCK,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "resid_pdrop": 0.11,
        "embd_pdrop": 0.12,
        "attn_pdrop": 0.13,
        "layer_norm_epsilon": 1e-3,
    }
    config = transformers.OpenAIGPTConfig(**options | overrides)
    return randomised(transformers.OpenAIGPTLMHeadModel(config)).to(dtype).eval()


def tokens(batch=BATCH, seq=SEQ, seed=1):
    return torch.randint(VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


# ---- the same function


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_our_model_as_theirs(dtype, close, activation):
    ours, ids = our_model(dtype, activation=activation), tokens()
    theirs = to_hugging_face(ours)
    assert theirs.dtype == dtype and not theirs.training
    with torch.no_grad():
        logits = ours(ids)
        assert logits.std() > 0.5
        close(logits, theirs(ids).logits)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_their_model_as_ours(dtype, close, activation):
    theirs, ids = their_model(dtype, afn=activation), tokens()
    ours = from_hugging_face(theirs)
    assert ours.head.weight.dtype == dtype and not ours.training
    assert ours.head.weight is ours.token_embedding.weight
    with torch.no_grad():
        close(ours(ids), theirs(ids).logits)
    assert from_hugging_face(theirs.train()).training


def test_the_original_shape_at_a_small_size_without_changes_of_weights():
    """As transformers initialises it, options at their defaults, the whole block."""
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(vocab_size=101, n_positions=31, n_embd=36, n_layer=2, n_head=4)
    theirs = transformers.OpenAIGPTLMHeadModel(config).eval()
    ours = from_hugging_face(theirs)
    assert ours.config == preset("gpt1", vocab_size=101, block_size=31, embed_dim=36, num_layers=2, num_heads=4)
    assert {block.attention.dropout for block in ours.blocks} == {0.1}
    ids = torch.randint(101, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_there_and_back_again_keeps_everything():
    ours = our_model()
    again = from_hugging_face(to_hugging_face(ours))
    assert again.config == ours.config
    assert [block.attention.dropout for block in again.blocks] == [0.13] * LAYERS
    weights, expected = again.state_dict(), ours.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with torch.no_grad():  # copies, not views
        again.token_embedding.weight.zero_()
    assert ours.token_embedding.weight.any()


def test_gradients_of_the_loss():
    ours, ids = our_model(torch.float64), tokens()
    theirs = to_hugging_face(ours)
    for logits in (theirs(ids).logits, ours(ids)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():  # our gradients travel to theirs in the place of the weights
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    gradients = dict(to_hugging_face(ours).named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].detach(), parameter.grad, rtol=0, atol=1e-10)
        assert parameter.grad.abs().max() > 1e-4


def test_left_padding(dtype, close):
    ours, ids = our_model(dtype), tokens()
    theirs = to_hugging_face(ours)
    mask = torch.arange(SEQ) < torch.tensor([0, 3, SEQ - 1])[:, None]
    positions = ((~mask).cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(~mask).long(), position_ids=positions).logits
        for options in ({}, {"position_ids": positions}):
            close(ours(ids, key_padding_mask=mask, **options)[~mask], expected[~mask])


def test_greedy_generation_inside_the_block():
    ours, prompts = our_model(), tokens(seq=5)
    theirs = to_hugging_face(ours)
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    found = generate(ours, prompts.tolist(), 8, temperature=0)
    assert found == expected.tolist()
    assert len({token for text in found for token in text[5:]}) > 3


# ---- folders


def test_a_folder_of_ours_is_read_by_from_pretrained(tmp_path, dtype, close):
    ours, ids = our_model(dtype), tokens()
    save_pretrained(ours, tmp_path / "new" / "model")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert (tmp_path / "new" / "model" / "model.safetensors").is_file()
    theirs, report = transformers.OpenAIGPTLMHeadModel.from_pretrained(
        tmp_path / "new" / "model", output_loading_info=True
    )
    assert not any(report.values())
    assert theirs.dtype == dtype
    with torch.no_grad():
        close(ours(ids), theirs(ids).logits)
        again = load_pretrained(tmp_path / "new" / "model")
        assert torch.equal(again(ids), ours(ids))
    assert again.config == ours.config


def test_a_folder_of_theirs_is_read_here(tmp_path, dtype, close):
    theirs, ids = their_model(dtype, afn="relu"), tokens()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        close(load_pretrained(tmp_path)(ids), theirs(ids).logits)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_tokenizer_goes_with_it(tmp_path, kind):
    text = "to be,  or not to be:\n\nthat is the question. éß"
    tokenizer = CharTokenizer.train(text) if kind == "char" else BPETokenizer.train(text, 263)
    save_pretrained(our_model(vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = BPETokenizer.load(tmp_path / "model")
    ids = tokenizer.encode(text)
    assert theirs(text).input_ids == ours.encode(text) == ids
    assert theirs.decode(ids) == ours.decode(ids) == text
    load_pretrained(tmp_path / "model")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(self, folder, **_):
        (folder / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    model = our_model()
    monkeypatch.setattr(transformers.OpenAIGPTLMHeadModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_pretrained(model, tmp_path / "model")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes"):
        with pytest.raises(ValueError, match="exists already; name a new folder or an empty one$"):
            save_pretrained(our_model(), taken)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    with pytest.raises(ValueError, match="^cannot write '.*': not a directory; name a folder you may write to$"):
        save_pretrained(our_model(), tmp_path / "notes" / "model")
    (tmp_path / "empty").mkdir()
    save_pretrained(our_model(), tmp_path / "empty")


# ---- what cannot be expressed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "pre"}, "OpenAIGPTLMHeadModel needs norm='post'; the model has 'pre'"),
        ({"tied_head": False}, "OpenAIGPTLMHeadModel needs tied_head=True; the model has False"),
        ({"head_bias": True}, "OpenAIGPTLMHeadModel needs head_bias=False; the model has True"),
        ({"feedforward_dim": 99}, "OpenAIGPTLMHeadModel needs feedforward_dim=140; the model has 99"),
        (
            {"attention": Classical()},
            r"OpenAIGPTLMHeadModel needs attention Classical\(bias=True\); got Classical",
        ),
        (
            {"attention": Classical(bias=True, out_bias=False)},
            r"OpenAIGPTLMHeadModel needs attention Classical\(",
        ),
        (
            {"attention": Classical(bias=True, head_dim=3)},
            r"OpenAIGPTLMHeadModel needs attention Classical\(",
        ),
        (
            {"attention": Classical(bias=True, is_causal=False)},
            r"OpenAIGPTLMHeadModel needs attention Classical\(",
        ),
    ],
    ids=str,
)
def test_what_theirs_cannot_express_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        to_hugging_face(our_model(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(ATTENTION.keys() - {"classical"}))
def test_other_attention_is_refused(name):
    model = our_model(attention=ATTENTION[name](), embed_dim=7, num_heads=1)
    with pytest.raises(ValueError, match=r"^OpenAIGPTLMHeadModel needs attention Classical\(bias=True\); got "):
        to_hugging_face(model)


def test_layers_of_unequal_dropout_are_refused():
    def attention(*sizes, layer):
        return Classical(bias=True, dropout=layer / 10)(*sizes, layer=layer)

    with pytest.raises(ValueError, match=r"one attention dropout for all layers; got \[0.0, 0.1, 0.2\]$"):
        to_hugging_face(our_model(attention=attention))


def test_what_ours_cannot_express_is_refused():
    with pytest.raises(ValueError, match="^unknown activation 'silu'; choose from gelu, relu$"):
        from_hugging_face(their_model(afn="silu"))
    with pytest.raises(ValueError, match="^the output layer must be tied to the token embedding"):
        from_hugging_face(their_model(tie_word_embeddings=False))
    with pytest.raises(ValueError, match="^expected an OpenAIGPTLMHeadModel; got Linear$"):
        from_hugging_face(torch.nn.Linear(2, 3))


def test_foreign_and_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match="^'.*model' holds no model; name a folder with a config.json$"):
        load_pretrained(folder)
    save_pretrained(our_model(), folder)
    config, weights = (folder / "config.json").read_text(), folder / "model.safetensors"

    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="^'.*model' holds a model of type 'gpt2'; expected 'openai-gpt'$"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"n_layer": LAYERS + 1}))
    with pytest.raises(ValueError, match="^the model in '.*model' is incomplete; it lacks transformer.h.3."):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"n_embd": 2 * WIDTH}))
    with pytest.raises(ValueError, match="^cannot read the model in '.*model': [^\n]*$"):
        load_pretrained(folder)
    (folder / "config.json").write_text(config)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="^cannot read the model in '.*model': [^\n]*$"):
        load_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="^cannot read the model in '.*model': [^\n]*$"):
        load_pretrained(folder)


def test_a_foreign_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^the tokenizer has 3 tokens and the model 37; give the tokenizer that"):
        save_pretrained(our_model(), tmp_path / "model", CharTokenizer("abc"))
    assert not list(tmp_path.iterdir())


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    model = our_model()
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (to_hugging_face, from_hugging_face, lambda m: save_pretrained(m, tmp_path / "m")):
        with pytest.raises(
            ImportError, match=r"^Hugging Face models need transformers; .*pennylane-qattn\[hf\]', or in a checkout"
        ):
            call(model)
    with pytest.raises(ImportError, match=r"pennylane-qattn\[hf\]"):
        load_pretrained(tmp_path)


def test_the_config_is_the_models_not_the_presets():
    assert isinstance(our_model().config, GPTConfig)
    assert (
        to_hugging_face(our_model()).config.to_dict().items()
        >= {
            "n_positions": BLOCK,
            "n_embd": WIDTH,
            "resid_pdrop": 0.11,
            "embd_pdrop": 0.12,
            "attn_pdrop": 0.13,
            "layer_norm_epsilon": 1e-3,
            "afn": "gelu",
        }.items()
    )
