"""Text token by token, on tiny sizes."""

import pytest
import torch

from lightning_modules.benchmarks import generation
from lightning_modules.benchmarks.result import Result
from lightning_modules.gpt import GPT, GPTConfig
from pennylane_qattn import ATTENTION, Attention

TINY = ("generate", "--rounds", "2", "--embed_dim", "4", "--num_heads", "2", "--num_layers", "1", "--block", "7")


def test_tokens_at_the_end_of_the_block(run):
    status, out, err = run(*TINY, "--tokens", "3", "--batch", "2", "--mechanisms", "classical", "qisa")
    assert (status, err) == (0, "")
    result = Result.read(run.folder / "generate-embed_dim-4-num_heads-2-num_layers-1-block-7-batch-2.json")
    assert result.title == "A token of text, width 4, 2 texts at once"
    for row in result.rows:
        assert all(len(row[key]) == 2 for key in ("milliseconds", "over_classical", "recomputing"))
    assert "tokens 5 to 7 of a block of 7, batch 2" in out
    targets = {column.key: [str(target) for target in column.targets] for column in result.columns}
    assert targets["over_classical"] == ["at most 1.2"] and targets["recomputing"] == []  # that is for 256 tokens


def test_only_the_steps_behind_the_prompt_are_timed(monkeypatch):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=11, block_size=7, num_layers=1, num_heads=1, embed_dim=4)
    model = GPT(config, ATTENTION.build("classical"))
    lengths = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    for cached, expected in ((True, [1, 1, 1]), (False, [5, 6, 7])):
        steps = generation._after_the_prompt(model, [[1, 2, 3, 4]], 3, cached)
        assert lengths == [4]
        lengths.clear()
        assert len(list(steps)) == 3 and lengths == expected
        lengths.clear()


def test_the_target_of_recomputing(run, monkeypatch):
    monkeypatch.setattr(generation, "BLOCK", 7)
    _, out, _ = run(*TINY, "--tokens", "2", "--mechanisms", "classical", "--rounds", "1")
    assert "at least 20: not reached" in out


class ForgetsTheCache(Attention):
    """With a cache a token sees itself alone."""

    def forward(self, x, *, cache=None, **context):
        out = super().forward(x, cache=cache, **context)
        return super().forward(x, **context) if cache is not None and x.shape[1] == 1 else out


def test_other_logits_with_a_cache_end_the_run(run, plant):
    status, _, err = run(*TINY, "--tokens", "3", "--mechanisms", plant(ForgetsTheCache))
    assert status == 1
    assert err.startswith("benchmark.py: error: planted has other logits with a cache than without one: they move by ")


def test_another_text_with_a_cache_ends_the_run(run, monkeypatch):
    texts = iter([[[1, 2, 3]], [[1, 2, 4]]])
    monkeypatch.setattr(generation, "generate", lambda *_, use_cache, **options: next(texts))
    status, _, err = run(*TINY, "--tokens", "3", "--mechanisms", "classical")
    assert (status, err) == (1, "benchmark.py: error: classical writes another text with a cache than without one\n")


def test_another_kind_of_model_ends_the_run(run, plant):
    class Zeros(Attention):
        def forward(self, x, **context):
            return 0 * super().forward(x, **context)

    status, _, err = run(*TINY, "--tokens", "3", "--mechanisms", plant(Zeros))
    assert status == 1 and "planted does not attend" in err


@pytest.mark.parametrize("tokens", ["7", "8"])
def test_a_prompt_comes_first(run, tokens):
    assert run(*TINY, "--tokens", tokens)[0] == 2
