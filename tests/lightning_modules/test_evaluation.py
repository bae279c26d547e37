import math

import pytest
import torch
from torch.nn import functional as F

from lightning_modules import CharTokenizer, LanguageModel
from lightning_modules.data import Windows
from lightning_modules.evaluation import continue_freely, evaluate, finite, prefix_losses, window_losses
from pennylane_qattn import QISA

TEXT = "the quick brown fox jumps over the lazy dog " * 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train(TEXT)
    return LanguageModel(tokenizer, attention=QISA(), num_layers=2, embed_dim=8, block_size=7, dropout=0.5).eval()


@pytest.fixture
def windows(model):
    tokens = torch.tensor(model.tokenizer.encode(TEXT), dtype=torch.int32)
    return Windows(tokens, 7, torch.arange(0, len(tokens) - 7, 3))


def test_values_are_those_of_the_logits(model, windows):
    found = evaluate(model, windows, continuations=5)
    inputs, targets = windows[torch.arange(len(windows))]
    losses = F.cross_entropy(model.gpt(inputs).transpose(1, 2), targets, reduction="none").double()
    assert found["cross_entropy"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found["per_position"] == pytest.approx(losses.mean(0).tolist(), rel=1e-6)
    torch.testing.assert_close(window_losses(model, windows), losses, rtol=1e-5, atol=1e-6)
    assert 0 < found["cer"] and set(found["generation"]) == {"cer", "wer", "bleu"}


def test_a_causal_model_needs_no_future(model, windows):
    found = evaluate(model, windows, continuations=1)
    assert found["prefix_per_position"] == pytest.approx(found["per_position"], abs=1e-5)
    assert found["prefix_cross_entropy"] == pytest.approx(found["cross_entropy"], abs=1e-5)


def test_the_future_is_taken_from_a_model_that_sees_it(windows, model):
    copying = QISA(is_causal=False)
    leaking = LanguageModel(model.tokenizer, attention=copying, num_layers=1, embed_dim=8, block_size=7).eval()
    found = evaluate(leaking, windows, continuations=1)
    assert found["prefix_per_position"][-1] == pytest.approx(found["per_position"][-1], abs=1e-5)
    assert abs(found["prefix_per_position"][0] - found["per_position"][0]) > 1e-4


def test_prefixes_one_by_one(model, windows):
    inputs, targets = windows[torch.tensor([0, 2, 3])]
    found = prefix_losses(model, inputs, targets)
    with torch.no_grad():
        for row in range(3):
            for t in range(7):
                logits = model.gpt(inputs[row : row + 1, : t + 1])[0, -1]
                expected = -torch.log_softmax(logits.double(), -1)[targets[row, t]]
                assert found[row, t].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(("shift", "cer"), [(0, 0.0), (1, 0.1)])
def test_continuations_are_compared_with_the_text(model, windows, monkeypatch, shift, cer):
    def by_heart(gpt, prompts, count, temperature, on_token):
        starts = [TEXT.index(model.tokenizer.decode(prompt)) + len(prompt) + shift for prompt in prompts]
        return [p + model.tokenizer.encode(TEXT[s : s + count]) for p, s in zip(prompts, starts, strict=True)]

    monkeypatch.setattr("lightning_modules.evaluation.generate", by_heart)
    found = continue_freely(model, windows, 4, temperature=0.0)
    assert found["cer"] == 0 if not shift else found["cer"] > cer


def test_a_text_too_short_to_be_continued(model):
    tokens = torch.tensor(model.tokenizer.encode(TEXT[:9]), dtype=torch.int32)
    assert continue_freely(model, Windows(tokens, 7, torch.tensor([0, 1])), 3, 1.0) is None


def test_evaluation_leaves_the_random_state_alone(model, windows):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    evaluate(model, windows, continuations=2)
    assert torch.equal(torch.rand(2), expected)


def test_json_has_no_nan():
    assert finite({"a": [math.nan, 1.0, (math.inf,)], "b": "nan"}) == {"a": [None, 1.0, [None]], "b": "nan"}
