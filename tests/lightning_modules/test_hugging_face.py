"""Attention of this package inside GPT-2 of transformers, against GPT-2 itself."""

import subprocess
import sys

import pytest
import torch

from pennylane_qattn import ATTENTION, Classical, certify

transformers = pytest.importorskip("transformers")
from lightning_modules.hugging_face import QuantumGPT2Config, QuantumGPT2LMHeadModel, replace_attention  # noqa: E402

VOCABULARY, LENGTH, PADDED = 11, 24, 3
CACHED = [name for name in ATTENTION if not ATTENTION.build(name).is_published and name != "ngram"]


def gpt2(**options):
    torch.manual_seed(0)
    sizes = {"n_positions": LENGTH, "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY}
    none = {"bos_token_id": None, "eos_token_id": None, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**sizes, **none, "initializer_range": 0.5, **options})
    )
    return model.eval()


@pytest.fixture
def tokens(rng):
    return torch.randint(VOCABULARY, (3, 7), generator=rng)


@pytest.fixture
def mask(tokens):
    """Padding on the left of the second text, as generation has it."""
    mask = torch.ones_like(tokens)
    mask[1, :PADDED] = 0
    return mask


def with_their_weights(theirs):
    ours = replace_attention(theirs, "classical", bias=True)
    with torch.no_grad():
        for block, own in zip(theirs.transformer.h, ours.transformer.h, strict=True):
            attention = own.attn.attention
            maps = attention.query_map, attention.key_map, attention.value_map
            for one, weight, bias in zip(
                maps, block.attn.c_attn.weight.chunk(3, dim=1), block.attn.c_attn.bias.chunk(3), strict=True
            ):
                one.linear.weight.copy_(weight.T)
                one.linear.bias.copy_(bias)
            attention.out_proj.weight.copy_(block.attn.c_proj.weight.T)
            attention.out_proj.bias.copy_(block.attn.c_proj.bias)
    return ours


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_their_cache_under_the_name_of_either_version(name, rng):
    attention = with_their_weights(gpt2()).transformer.h[0].attn
    x, held = torch.randn(3, 5, 8, generator=rng), transformers.DynamicCache()
    parts = [attention(part, **{name: held})[0] for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), attention(x)[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_with_their_weights_it_is_gpt2(implementation, tokens, mask):
    theirs = gpt2(attn_implementation=implementation)
    ours = with_their_weights(theirs)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    padded = [model(tokens, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs)]
    torch.testing.assert_close(*padded, rtol=1e-4, atol=1e-5)
    for options in ({"do_sample": False}, {"num_beams": 3}):
        texts = [
            model.generate(tokens, attention_mask=mask, max_new_tokens=9, pad_token_id=0, **options)
            for model in (ours, theirs)
        ]
        assert torch.equal(*texts)


@pytest.mark.parametrize("name", CACHED)
def test_trains_and_generates(name, tokens, mask):
    model = replace_attention(gpt2(), name)
    before = {name: weight.clone() for name, weight in model.state_dict().items() if ".attn." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        losses.append(model(tokens, labels=tokens).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = [p for name, p in model.named_parameters() if ".attn." in name]
    assert trained and all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    texts = [
        model.generate(
            tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)
    assert certify(model, vocab_size=VOCABULARY, length=6).verdict == "causal"


@pytest.mark.parametrize("name", CACHED)
def test_saved_and_read_again(name, tokens, tmp_path):
    model = replace_attention(gpt2(), name, seed=5) if name != "classical" else replace_attention(gpt2(), name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
    for reader in (QuantumGPT2LMHeadModel, transformers.AutoModelForCausalLM):
        again = reader.from_pretrained(tmp_path)
        assert type(again) is QuantumGPT2LMHeadModel and not again.training
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_words_are_read_and_not_drawn_again(tokens, tmp_path):
    """What circuits measure is data of the model."""
    model = replace_attention(gpt2(), "qisa")
    maps = [block.attn.attention.value_map for block in model.transformer.h]
    for one in maps:
        one.word_codes.copy_(one.word_codes.flip(-1))
        one.prepare()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(QuantumGPT2LMHeadModel.from_pretrained(tmp_path)(tokens).logits, expected)


def test_a_mechanism_and_their_dropout():
    model = gpt2(attn_pdrop=0.25, resid_pdrop=0.5).train()
    replaced = replace_attention(model, "qisa")
    part = replaced.transformer.h[0].attn
    assert replaced.training and part.attention.dropout == 0.25 and part.resid_dropout.p == 0.5
    assert replace_attention(model, Classical(head_dim=3)).transformer.h[1].attn.attention.head_dim == 3
    assert torch.equal(replaced.transformer.wte.weight, model.transformer.wte.weight)
    assert replaced.lm_head.weight is replaced.transformer.wte.weight
    assert model.transformer.h[0].attn.c_attn is not None  # the model itself stays as it is


def test_joint_tokens_do_without_the_cache(tokens):
    model = replace_attention(gpt2(), "ngram")
    with pytest.raises(ValueError, match="NGram reads 4 neighbouring tokens.*call with use_cache=False"):
        model.generate(tokens, max_new_tokens=3)
    seen = torch.ones_like(tokens)
    text = model.generate(tokens, attention_mask=seen, max_new_tokens=9, do_sample=False, use_cache=False)
    logits = model(text[:, :-1], use_cache=False).logits
    assert torch.equal(logits[:, tokens.shape[1] - 1 :].argmax(-1), text[:, tokens.shape[1] :])


def test_what_it_does_not_do_is_refused(tokens, mask):
    with pytest.raises(ValueError, match="expected a GPT2LMHeadModel; got GPT2Model"):
        replace_attention(gpt2().transformer, "qisa")
    with pytest.raises(ValueError, match="unknown attention 'qiza'"):
        replace_attention(gpt2(), "qiza")
    with pytest.raises(ValueError, match="a mechanism has its options already; got seed"):
        replace_attention(gpt2(), Classical(), seed=1)
    with pytest.raises(ValueError, match="add_cross_attention must be False"):
        replace_attention(gpt2(add_cross_attention=True), "qisa")
    with pytest.raises(ValueError, match="the configuration names no attention"):
        QuantumGPT2LMHeadModel(QuantumGPT2Config(n_embd=8, n_head=2))
    model = replace_attention(gpt2(), "qisa")
    hole = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    hole[:, :, 5, 2] = False
    with pytest.raises(ValueError, match="attention_mask must hide padding and later tokens, and nothing else"):
        model(tokens, attention_mask=hole)
    with pytest.raises(ValueError, match="a static cache has keys of tokens that are still to come"):
        model.generate(tokens, max_new_tokens=3, cache_implementation="static")
    cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
    with pytest.raises(ValueError, match="a static cache has keys of tokens that are still to come"):
        model.transformer.h[0].attn(torch.zeros(3, 7, 8), past_key_values=cache)
    published = replace_attention(gpt2(), "qisa-published")
    with pytest.raises(ValueError, match="runs without a key/value cache"):
        published.generate(tokens, max_new_tokens=3)


def test_a_stranger_s_configuration_runs_no_code(tmp_path):
    replace_attention(gpt2(), "qisa").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"name": "qisa"', '"name": "evil.Module"', 1))
    with pytest.raises(ValueError, match="unknown"):
        QuantumGPT2LMHeadModel.from_pretrained(tmp_path)


def test_without_transformers_it_says_what_to_install():
    program = "import sys; sys.modules['transformers'] = None; import lightning_modules.hugging_face"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode and "pip install 'pennylane-qattn[hf]'" in ended.stderr
