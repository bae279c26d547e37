"""The numbers behind `qattn grover`, each against a way to get it that does not use the code under test."""

import math

import numpy as np
import pytest
import torch

from lightning_modules import CharTokenizer, LanguageModel, TextDataModule
from lightning_modules.evaluation import window_losses
from lightning_modules.grover_study import (
    amplification_table,
    attention_inputs,
    causal_costs,
    error_table,
    finder_costs,
    goodness_of_model,
    query_counts,
    random_instance,
    resource_table,
    scaling,
    search_costs_of_model,
    sparse_model,
    sparsity_table,
    threshold_table,
)
from pennylane_qattn import Grover, Overlap

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def windows(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return TextDataModule(str(tmp_path / "text.txt"), block_size=8, eval_windows=24).splits["test"]


def model(attention, **options) -> LanguageModel:
    torch.manual_seed(3)
    tokenizer = CharTokenizer.train(TEXT)
    sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "block_size": 8}
    made = LanguageModel(tokenizer, attention=attention, **{**sizes, **options}).double().eval()
    with torch.no_grad():  # as after training: scores that differ
        for block in made.gpt.blocks:
            block.attention.query_map.linear.weight.mul_(4)
    return made


def test_instances_are_as_good_as_they_say():
    instance = random_instance(200, 3, 17, tau=2.5, eta=0.4, rows=5, seed=1)
    scores = instance.queries @ instance.keys.T / math.sqrt(17)
    planted = np.zeros_like(scores, dtype=bool)
    planted[np.arange(5)[:, None], instance.planted] = True
    assert (planted.sum(1) == 3).all()
    assert (scores[planted] >= 2.5 - 1e-12).all()
    assert np.abs(scores[~planted]).max() <= 0.4 + 1e-12
    assert np.abs(scores[~planted]).max() > 0.3


@pytest.mark.parametrize(
    "numbers, message",
    [
        (dict(k=0), "k must be between 1 and the number of keys, 50; got 0"),
        (dict(rows=18), "rows must be at most the dimension 17"),
        (dict(k=20, rows=5), "rows x k at most 50"),
        (dict(tau=0.2), "tau must be finite and above eta"),
        (dict(tau=math.nan), "tau must be finite and above eta"),
    ],
)
def test_instances_refuse(numbers, message):
    with pytest.raises(ValueError, match=message):
        random_instance(**{**dict(n=50, k=2, dim=17, tau=2.0, eta=0.3, rows=2, seed=0), **numbers})


def test_query_counts_are_near_their_exact_means_and_skip_what_cannot_be():
    rows = query_counts([64, 1024], [4, 100], repeats=400, seed=0)
    assert [(row["n"], row["k"]) for row in rows] == [(64, 4), (1024, 4), (1024, 100)]
    for row in rows:
        assert abs(row["quantum"] - row["quantum_expected"]) < 5 * row["quantum_error"]
        assert row["wins"] == (row["quantum"] < row["n"])
        assert row["to_last_key"] <= row["quantum"]
        assert row["number_known"] < row["to_last_key"]
    assert [row["wins"] for row in rows] == [False, True, False]


def test_scaling_has_the_square_root():
    fit = scaling(query_counts([2**p for p in (8, 11, 14)], [1, 4], repeats=300, seed=1))
    assert 0.44 < fit["to_last_key"]["exponent_n"] < 0.54


def test_everybody_finds_what_was_planted():
    rows = finder_costs([128, 512], 4, 16, 3.0, 0.5, 6, seed=2, with_index=True)
    assert [row["finder"] for row in rows[:4]] == [
        *("quantum search", "quantum search, number known", "full scan", "ball tree"),
    ]
    assert all(row["found"] == 1.0 for row in rows if row["exact"])
    assert all(row["found"] > 0.9 for row in rows)
    assert [row["per_row"] for row in rows if row["finder"] == "full scan"] == [128, 512]


def test_search_loses_on_a_small_causal_matrix():
    calls = {row["finder"]: row["calls"] for row in causal_costs(96, 0.15, 0, with_index=False)}
    assert calls["full scan"] == 96 * 97 // 2
    assert calls["quantum search"] > 2 * calls["full scan"]


def test_errors_stay_below_their_bounds_and_zeros_are_worse():
    rows = error_table(64, 4, 16, 3.0, [0.1, 0.5, 1.5], seed=0)
    assert [(row["eta"], row["order"]) for row in rows] == [(0.1, 1), (0.1, 2), (0.5, 1), (0.5, 2), (1.5, 1)]
    assert all(0 < row["error"] <= row["bound"] for row in rows)
    assert all(row["error"] < row["error_of_zeros"] for row in rows)


def test_resources_have_every_lookup():
    rows = resource_table([1000, 10**6], 16, 4, 2)
    assert [row["lookup"] for row in rows] == ["qrom"] * 2 + ["select-swap"] * 2 + ["qram"] * 2


# --- models -----------------------------------------------------------------------------------------------------


def test_inputs_of_attention_are_what_the_blocks_normalise(windows):
    trained = model("classical")
    tokens = windows[torch.arange(3)][0]
    found = attention_inputs(trained, tokens)
    assert [attention for attention, _ in found] == [block.attention for block in trained.gpt.blocks]
    gpt = trained.gpt
    x = gpt.token_embedding(tokens) + gpt.position_embedding.weight[:8]
    torch.testing.assert_close(found[0][1], gpt.blocks[0].attention_norm(x))
    assert not gpt.blocks[0].attention._forward_pre_hooks


@pytest.mark.parametrize("attention", ["classical", "gaussian"])
def test_keeping_everything_changes_nothing_and_one_key_does(attention, windows):
    trained = model(attention)
    rows = sparsity_table(trained, windows, [1, 8], orders=[1])
    exact = float(window_losses(trained, windows).mean())
    assert [row["exact"] for row in rows] == [exact] * 2
    assert rows[1]["cross_entropy"] == pytest.approx(exact, abs=1e-12)
    assert rows[1]["error_mean"] < 1e-12
    by_hand = window_losses(sparse_model(trained, k=1), windows)
    assert rows[0]["cross_entropy"] == pytest.approx(float(by_hand.mean()), abs=1e-12)
    assert abs(rows[0]["change"]) > 1e-5
    assert 0 < rows[0]["error_mean"] <= rows[0]["bound_mean"]


def test_a_threshold_below_every_score_changes_nothing(windows):
    trained = model("classical")
    rows = threshold_table(trained, windows, [-100.0, 0.3], orders=[1])
    assert rows[0]["cross_entropy"] == pytest.approx(rows[0]["exact"], abs=1e-12)
    assert rows[0]["k_mean"] == pytest.approx(4.5)
    assert rows[1]["k_mean"] < 4.5 and abs(rows[1]["change"]) > 1e-6
    by_hand = window_losses(sparse_model(trained, support="threshold", tau=0.3), windows)
    assert rows[1]["cross_entropy"] == pytest.approx(float(by_hand.mean()), abs=1e-12)


def test_goodness_and_costs_are_of_the_models_scores(windows):
    trained = model("classical")
    tokens = windows[torch.arange(4)][0]
    table = goodness_of_model(trained, tokens, tau=0.2, share=0.15)
    assert [(row["layer"], row["head"]) for row in table] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    attention, x = attention_inputs(trained, tokens)[1]
    s = (attention.query_map(x) @ attention.key_map(x).transpose(-2, -1)).detach() / 2
    marked = ((s >= 0.2) & torch.ones(8, 8, dtype=torch.bool).tril()).sum(-1)
    assert table[3]["k_max"] == int(marked[:, 1].max())
    assert table[3]["k_mean"] == pytest.approx(float(marked[:, 1].double().mean()))
    costs = search_costs_of_model(trained, tokens, 0.2, 0.15, seed=0, with_index=False)
    scans = [row["calls"] for row in costs if row["finder"] == "full scan"]
    assert scans == [4 * 2 * 36] * 2


def test_threshold_by_share(windows):
    trained = model("classical")
    tokens = windows[torch.arange(6)][0]
    for row in goodness_of_model(trained, tokens, None, share=0.25):
        assert row["k_mean"] < 4.5
    means = [row["k_mean"] for row in goodness_of_model(trained, tokens, None, share=0.25)]
    # a quarter of the 36 scores of 8 causal rows, both heads of a layer together
    assert sum(means[:2]) / 2 == pytest.approx(36 * 0.25 / 8, rel=0.02)


def test_amplification_of_a_model(windows):
    trained = model(Grover(tau=0.5))
    tokens = windows[torch.arange(4)][0]
    table = amplification_table(trained, tokens)
    assert [(row["layer"], row["head"]) for row in table] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in table:
        assert row["success"] >= row["mean_mark"] - 1e-12
        assert row["conditional_calls"] >= row["calls"] >= 1
        assert row["calls"] == pytest.approx(2 * row["iterations"] + 1)
        assert row["scan"] == 4.5
        assert row["reversed_order"] == 0


def test_scores_that_are_no_dot_products_are_refused(windows):
    tokens = windows[torch.arange(2)][0]
    torch.manual_seed(0)
    overlap = LanguageModel(CharTokenizer.train(TEXT), attention=Overlap(), num_layers=1, embed_dim=8, block_size=8)
    with pytest.raises(ValueError, match="scores of overlap attention are no dot products"):
        goodness_of_model(overlap.double().eval(), tokens, 0.2, 0.15)
