"""Generation against a naive one: one row at a time, everything recomputed, sampled with numpy."""

import random
from itertools import accumulate

import numpy as np
import pytest
import torch

from lightning_modules.generation import generate, next_token_probabilities, sample, stream, window_length
from lightning_modules.gpt import GPT, GPTConfig
from pennylane_qattn import ATTENTION, Classical

VOCAB = 11


def build(block_size=7, *, attention=None, seed=0, **overrides) -> GPT:
    torch.manual_seed(seed)
    options = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 1, "embed_dim": 5} | overrides
    model = GPT(GPTConfig(block_size=block_size, **options), Classical() if attention is None else attention)
    with torch.no_grad():
        model.head.weight.mul_(5)  # so that the text is not almost uniform
    return model.double().eval()


def prompts_of(*lengths, seed=3):
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


def naive_window(text, block_size):
    """The window by its story: grow to a full block; the next token cuts to the last half; grow again."""
    window = min(len(text), block_size)
    for _ in range(len(text) - block_size):
        window = window + 1 if window < block_size else max(1, block_size // 2)
    return text[-window:]


def naive_generate(model, prompt, steps, *, row, temperature=1.0, top_k=None, top_p=None, seed=0):
    uniforms, text = random.Random(f"{seed}/{row}"), list(prompt)
    for _ in range(steps):
        window = torch.tensor([naive_window(text, model.config.block_size)])
        with torch.no_grad():
            logits = model(window)[0, -1].numpy()
        uniform = uniforms.random()
        if temperature == 0:
            text.append(int(np.argmax(logits)))
            continue
        order = np.argsort(-logits)
        order = order[:top_k] if top_k else order
        weights = np.exp((logits[order] - logits.max()) / temperature)
        weights /= weights.sum()
        if top_p:
            kept = 1
            while weights[:kept].sum() < top_p:
                kept += 1
            order, weights = order[:kept], weights[:kept]
        distribution = np.zeros(len(logits))
        distribution[order] = weights / weights.sum()
        text.append(next(token for token, total in enumerate(accumulate(distribution)) if total > uniform))
    return text


# ---- the rule beyond the block


def test_window_by_hand():
    assert [window_length(n, 5) for n in range(1, 15)] == [1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5, 2]
    assert [window_length(n, 2) for n in range(1, 7)] == [1, 2, 1, 2, 1, 2]
    assert [window_length(n, 1) for n in range(1, 5)] == [1, 1, 1, 1]
    assert window_length(513, 512) == 256


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7])
def test_equals_naive_far_beyond_the_block(block_size, use_cache):
    """Rows of unequal lengths, prompts longer than the block among them, re-primed each in its own rhythm."""
    model, prompts = build(block_size), prompts_of(1, 7, 2, 23, 5)
    found = generate(model, prompts, 37, seed=5, use_cache=use_cache)
    assert found == [naive_generate(model, p, 37, row=row, seed=5) for row, p in enumerate(prompts)]
    assert len({tuple(text[-37:]) for text in found}) == len(prompts)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.3},
        {"temperature": 2.0, "top_k": 3},
        {"top_k": 1},
        {"top_k": 99},
        {"top_p": 0.7},
        {"top_p": 1e-9},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
    ],
    ids=str,
)
def test_equals_naive_for_every_option(options):
    model, prompts = build(norm="post"), prompts_of(3, 11, 1)
    found = generate(model, prompts, 29, seed=1, **options)
    assert found == [naive_generate(model, p, 29, row=row, seed=1, **options) for row, p in enumerate(prompts)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_does_not_depend_on_the_others(use_cache):
    model, prompts = build(), prompts_of(2, 13, 5, 1)
    together = generate(model, prompts, 31, use_cache=use_cache)
    for row, prompt in enumerate(prompts):
        assert generate(model, [prompt], 31, first_row=row, use_cache=use_cache) == [together[row]]
    assert generate(model, prompts[2:], 31, first_row=2) == together[2:]


@pytest.mark.parametrize("attention", [pytest.param(cls(), id=name) for name, cls in ATTENTION.items()])
def test_every_attention_generates_the_same_with_and_without_a_cache(attention):
    model, prompts = build(5, attention=attention), prompts_of(3, 1, 8)
    found = generate(model, prompts, 13)
    for use_cache in (False, True) if model.blocks[0].attention.has_cache else (False,):
        assert found == generate(model, prompts, 13, use_cache=use_cache)
    assert found == [naive_generate(model, p, 13, row=row) for row, p in enumerate(prompts)]


@pytest.mark.parametrize(("attention", "cached"), [("qisa", True), ("qisa-published", False)])
def test_a_cache_is_used_where_there_is_one(attention, cached, monkeypatch):
    model, calls = build(5, attention=ATTENTION.build(attention)), []
    new_caches = model.new_caches
    monkeypatch.setattr(model, "new_caches", lambda rows: calls.append(rows) or new_caches(rows))
    generate(model, prompts_of(3, 2), 2)
    assert bool(calls) == cached


def test_a_cache_where_there_is_none_is_refused_at_the_call():
    model = build(5, attention=ATTENTION.build("qsann-published"))
    for call in (generate, stream):
        with pytest.raises(ValueError, match="^this model's attention has no key/value cache; leave use_cache out"):
            call(model, prompts_of(3), 2, use_cache=True)


def test_equal_lengths_need_no_masks(monkeypatch):
    model, seen = build(5), []
    hidden_states = model.hidden_states

    def watch(tokens, padding, positions, caches):
        seen.append((tokens.shape[1], padding, positions))
        return hidden_states(tokens, padding, positions, caches)

    monkeypatch.setattr(model, "hidden_states", watch)
    generate(model, prompts_of(3, 3), 12)
    assert all(padding is None and positions is None for _, padding, positions in seen)
    # lengths 3 4 5, cut to 2, 3 4 5, cut to 2, 3 4 5, cut to 2
    assert [width for width, _, _ in seen] == [3, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2]


# ---- sampling


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()

    def check(expected, **options):
        found = next_token_probabilities(logits, **options)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)

    check([0.1, 0.4, 0.2, 0.3])
    check([0, 4 / 7, 0, 3 / 7], top_k=2)
    check([0, 1, 0, 0], top_p=0.39)
    check([0, 4 / 7, 0, 3 / 7], top_p=0.41)
    check([0, 4 / 9, 2 / 9, 3 / 9], top_p=0.71)
    check([0.1, 0.4, 0.2, 0.3], top_p=0.91)
    check([0.1, 0.4, 0.2, 0.3], top_p=1.0)
    check([0, 1, 0, 0], top_k=2, top_p=0.57)  # of 4/7 and 3/7
    check([0, 4 / 7, 0, 3 / 7], top_k=2, top_p=0.58)
    check([1 / 30, 16 / 30, 4 / 30, 9 / 30], temperature=0.5)
    check([0, 16 / 25, 0, 9 / 25], temperature=0.5, top_p=0.8)
    logits = torch.tensor([2.0, 4.0, 2.0], dtype=torch.float64).log()
    check([0, 1, 0], top_p=0.5)  # 1/2 is reached by the first alone


def test_ties_stay_together():
    logits = torch.tensor([[0.2, 0.4, 0.2, 0.2]], dtype=torch.float64).log()
    for options in ({"top_k": 2}, {"top_p": 0.5}):
        assert (next_token_probabilities(logits, **options) > 0).all()
    assert (next_token_probabilities(logits, top_k=1) > 0).tolist() == [[False, True, False, False]]


def test_extreme_temperatures_are_finite():
    logits = torch.tensor([3e4, -2e4, 2.9e4])
    assert next_token_probabilities(logits, 1e-300).tolist() == [1, 0, 0]
    torch.testing.assert_close(next_token_probabilities(logits, 1e300), torch.full((3,), 1 / 3).double())
    assert next_token_probabilities(logits.half()).dtype == torch.float64


def test_sample_inverts_the_distribution_function():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    cases = {0.0: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, 1 - 2**-53: 4}
    found = sample(probabilities.expand(len(cases), -1), torch.tensor(list(cases), dtype=torch.float64))
    assert found.tolist() == list(cases.values())


def test_frequencies_follow_the_probabilities():
    """The chi-squared statistic of 20,000 first tokens stays below the 99.9 % quantile of ten degrees."""
    model, prompt = build(), prompts_of(3)[0]
    first = [text[-1] for text in generate(model, [prompt] * 20_000, 1, seed=7)]
    with torch.no_grad():
        expected = 20_000 * model(torch.tensor([prompt]))[0, -1].softmax(-1).numpy()
    assert ((np.bincount(first, minlength=VOCAB) - expected) ** 2 / expected).sum() < 29.6


def test_seeds_and_rows_draw_different_texts():
    model, (prompt,) = build(), prompts_of(4)
    first, second = generate(model, [prompt, prompt], 19, seed=0)
    assert first != second
    assert generate(model, [prompt], 19, seed=0) == [first]
    assert generate(model, [prompt], 19, seed=1) != [first]
    state = torch.random.get_rng_state()
    generate(model, [prompt], 3)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- streaming, modes, callbacks


def test_stream_and_callback_give_the_tokens_of_generate():
    model, prompts, told = build(), prompts_of(2, 5), []
    texts = generate(model, prompts, 9, on_token=told.append)
    assert [list(row) for row in zip(*told, strict=True)] == [texts[0][2:], texts[1][5:]]
    assert list(stream(model, prompts, 9)) == told
    assert prompts == prompts_of(2, 5)
    assert generate(model, prompts, 0) == prompts


def test_stream_leaves_modes_and_gradients_as_they_were():
    model = build(dropout=0.5).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    expected = generate(build(dropout=0.5), [[1, 2]], 7)[0][2:]
    tokens = stream(model, [[1, 2]], 7)
    for token in expected:
        assert next(tokens) == [token]
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes
    model(torch.tensor([[1, 2]])).sum().backward()


def test_the_mode_is_restored_after_an_error():
    model = build().train()
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    with pytest.raises(ValueError, match="^the model's logits are not finite"):
        generate(model, [[1]], 3)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 3), {}, "there are no prompts; give at least one"),
        (([[1], []], 3), {}, "prompt 2 is empty; give at least one token"),
        (([[1, 11]], 3), {}, "prompt 1 holds the token 11; the vocabulary is 0 to 10"),
        (([[-1]], 3), {}, "prompt 1 holds the token -1; the vocabulary is 0 to 10"),
        (([1, 2], 3), {}, "prompt 1 must be a list of token ids; got 1"),
        ((["text"], 3), {}, "prompt 1 must be a list of token ids; got 'text'"),
        (([[1.5]], 3), {}, r"prompt 1 must be a list of token ids; got \[1.5\]"),
        (([[1]], -1), {}, "max_new_tokens must not be negative; got -1"),
        (
            ([[1]], 3),
            {"temperature": -0.5},
            r"temperature must be 0 \(greedy\) or positive and finite; got -0.5",
        ),
        (
            ([[1]], 3),
            {"temperature": float("nan")},
            r"temperature must be 0 \(greedy\) or positive and finite; got nan",
        ),
        (([[1]], 3), {"top_k": 0}, "top_k must be at least 1; got 0"),
        (([[1]], 3), {"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        (([[1]], 3), {"top_p": 1.1}, r"top_p must lie in \(0, 1\]; got 1.1"),
    ],
)
def test_bad_input_is_refused_at_the_call(arguments, options, message):
    for call in (generate, stream):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(build(), *arguments, **options)


def test_one_forward_pass_per_token_and_one_position_through_the_output_layer():
    model, seen = build(3), []
    model.head.register_forward_hook(lambda head, inputs, logits: seen.append(inputs[0].shape))
    generate(model, prompts_of(2, 3), 8)
    assert seen == [(2, 5)] * 8
