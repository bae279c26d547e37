"""Annealing of amplification: the temperature of each step, and that a continued run has the same."""

import math

import lightning as L
import pytest
import torch

from lightning_modules import AnnealTemperature, CharTokenizer, LanguageModel, TextDataModule
from pennylane_qattn import Grover

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


def fit(tmp_path, callback, attention=None, steps=6, ckpt_path=None, **options):
    (tmp_path / "text.txt").write_text(TEXT)
    data = TextDataModule(str(tmp_path / "text.txt"), block_size=8, batch_size=4)
    torch.manual_seed(0)
    attention = attention or Grover(temperature="fixed")
    sizes = dict(num_layers=2, num_heads=1, embed_dim=8, block_size=8)
    model = LanguageModel(data.tokenizer, attention=attention, schedule="constant", **sizes)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append([float(block.attention.score.temperature) for block in pl_module.gpt.blocks])

    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[callback, Watch()],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return trainer, model, seen


def test_every_layer_has_the_temperature_of_the_step(tmp_path):
    _, model, seen = fit(tmp_path, AnnealTemperature(2.0, 0.5, steps=4))
    wanted = [2.0, 2.0 * 0.25**0.25, 1.0, 2.0 * 0.25**0.75, 0.5, 0.5]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(wanted)[:, None].expand(-1, 2))
    assert "gpt.blocks.0.attention.score.log_temperature" in model.state_dict()


def test_linear_over_the_whole_run():
    callback = AnnealTemperature(3.0, 1.0, schedule="linear")
    assert [callback.temperature_at(step, 4) for step in range(6)] == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]


def test_by_default_it_ends_with_the_run(tmp_path):
    _, _, seen = fit(tmp_path, AnnealTemperature(1.0, 0.1), steps=5)
    torch.testing.assert_close(torch.tensor(seen[-1]), torch.full((2,), 0.1**0.8))


def test_a_continued_run_goes_on_with_its_temperature(tmp_path):
    _, _, whole = fit(tmp_path, AnnealTemperature(2.0, 0.5, steps=6))
    trainer, _, _ = fit(tmp_path, AnnealTemperature(2.0, 0.5, steps=6), steps=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, _, rest = fit(tmp_path, AnnealTemperature(2.0, 0.5, steps=6), ckpt_path=tmp_path / "half.ckpt")
    assert rest == whole[3:]


@pytest.mark.parametrize(
    "attention, message",
    [
        ("classical", "nothing to anneal"),
        (Grover(), "use temperature fixed"),
        (Grover(marks="softmax"), "marks sigmoid"),
    ],
)
def test_refuses_a_model_that_it_cannot_anneal(tmp_path, attention, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, AnnealTemperature(), attention)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 0.0}, "start must be a positive and finite temperature; got 0.0"),
        ({"end": math.nan}, "end must be a positive and finite temperature; got nan"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; choose from exponential, linear"),
    ],
)
def test_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        AnnealTemperature(**options)


def test_a_tokenizer_is_all_that_generation_needs():
    model = LanguageModel(CharTokenizer("abc"), attention="grover", num_layers=1, block_size=8)
    assert len(model.eval().generate(["ab"], 5, seed=0)[0]) == 7
