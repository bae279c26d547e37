"""Schedules by hand, decay groups by effect, metrics and predictions against plain numpy, and what stops a run."""

import copy
import csv
import math

import lightning as L
import numpy as np
import pytest
import torch

from lightning_modules.callbacks import RunCheckpoint
from lightning_modules.checkpoints import PlainCheckpointIO, read_checkpoint
from lightning_modules.data import TextDataModule
from lightning_modules.gpt import PRESETS
from lightning_modules.language_model import LanguageModel, Optimisation, model_config
from lightning_modules.loggers import RunCSVLogger
from lightning_modules.tokenizers import BPETokenizer, CharTokenizer
from pennylane_qattn import ATTENTION, QISA, Classical, Execution, QISAAbsorbed

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]

TEXT = "a quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 7
TINY = {"num_layers": 1, "embed_dim": 4, "block_size": 5}


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return TextDataModule(str(tmp_path / "text.txt"), block_size=5, batch_size=3, eval_windows=7, samples_per_epoch=33)


@pytest.fixture
def build(data):
    def build(attention="classical", seed=0, **options):
        torch.manual_seed(seed)
        return LanguageModel(data.tokenizer, attention=attention, **{**TINY, **options})

    return build


@pytest.fixture
def trainer(tmp_path):
    def trainer(**options):
        defaults = dict(max_steps=3, log_every_n_steps=1, logger=RunCSVLogger(tmp_path / "run"), accelerator="cpu")
        quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing="callbacks" in options)
        return L.Trainer(**{**defaults, **quiet, "plugins": [PlainCheckpointIO()], **options})

    return trainer


def rows(tmp_path):
    with (tmp_path / "run" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# --- optimisation -----------------------------------------------------------------------------------------------

OPTIONS = dict(
    learning_rate=2.0,
    weight_decay=0.1,
    betas=(0.9, 0.99),
    warmup_steps=4,
    schedule="cosine",
    final_learning_rate=0.25,
    schedule_steps=None,
    decay_all=False,
)


def test_learning_rate_rises_then_falls_as_half_a_cosine():
    at = Optimisation(**OPTIONS).learning_rate_at
    assert [at(step, 12) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert at(4, 12) == 2.0  # the top of the cosine: step 4 of 4..12
    assert at(8, 12) == pytest.approx((2.0 + 0.5) / 2)  # half-way: the mean of both ends
    assert at(6, 12) == pytest.approx(0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2)
    assert at(12, 12) == at(99, 12) == pytest.approx(0.5)


def test_constant_learning_rate_stays():
    at = Optimisation(**{**OPTIONS, "schedule": "constant"}).learning_rate_at
    assert [at(step, math.inf) for step in (0, 3, 4, 10**6)] == [0.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("warmup_steps", -1),
        ("schedule", "linear"),
        ("final_learning_rate", 1.5),
        ("schedule_steps", 0),
    ],
)
def test_options_out_of_range(build, option, value):
    with pytest.raises(ValueError, match=option) as error:
        build(**{option: value})
    assert "\n" not in str(error.value)


def decayed(model):
    """Names of the parameters that a step without any gradient shrinks."""
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_only_matrices_of_linear_maps_decay(build):
    block = "gpt.blocks.0."
    linear = {f"{block}feedforward.0.weight", f"{block}feedforward.2.weight", f"{block}attention.out_proj.weight"}
    query_key = {f"{block}attention.{name}_map.linear.weight" for name in ("query", "key")}
    head = {"gpt.head.weight"}
    assert decayed(build(QISA())) == linear | query_key | head
    assert decayed(build(QISAAbsorbed())) == linear | query_key | head | {f"{block}attention.value_map.weight"}
    tied = decayed(build("gaussian", preset="gpt1-tiny", num_heads=1))
    assert "gpt.token_embedding.weight" not in tied and not any("beta" in name for name in tied) and len(tied) == 6


def test_everything_decays_if_asked(build):
    model = build(QISA(), decay_all=True, weight_decay=0.5)
    zeros = {name for name, parameter in model.named_parameters() if not parameter.any()}
    assert decayed(model) == dict(model.named_parameters()).keys() - zeros
    assert "gpt.blocks.0.attention.value_map.weights" in decayed(build(QISA(), decay_all=True))


@pytest.mark.parametrize("values", ["circuit", "learned-circuit", "mixed-circuit"])
def test_frozen_angles_are_left_alone_in_training(build, data, trainer, values):
    """Even where everything decays."""
    model = build(QISA(values=values, trainable=False), decay_all=True, weight_decay=0.5, learning_rate=0.1)
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer(max_steps=3, limit_val_batches=1, logger=False).fit(model, datamodule=data)
    after = dict(model.named_parameters())
    unchanged = {name for name, parameter in before.items() if torch.equal(after[name], parameter)}
    assert unchanged == {name for name in before if name.endswith(".weights")} and len(unchanged) == 1


@pytest.mark.parametrize("name", ATTENTION)
def test_every_parameter_is_in_exactly_one_group(build, name):
    model = build(name)
    grouped = [id(p) for group in model.parameter_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))


def test_learning_rate_reaches_the_optimizer_and_the_log(build, data, trainer, tmp_path):
    model = build(warmup_steps=2, learning_rate=0.01, final_learning_rate=0.0)
    fit = trainer(max_steps=5, limit_val_batches=0)
    fit.fit(model, datamodule=data)
    logged = [float(row["learning_rate"]) for row in rows(tmp_path)]
    third = [0.01 * (1 + math.cos(math.pi * done / 3)) / 2 for done in range(3)]
    assert logged == pytest.approx([0.005, 0.01, *third], rel=1e-6)
    assert fit.optimizers[0].param_groups[1]["lr"] == pytest.approx(third[2])
    assert [row["step"] for row in rows(tmp_path)] == list("01234")
    for column in ("train_loss", "grad_norm", "train_characters_per_second"):
        assert all(float(row[column]) > 0 for row in rows(tmp_path))


def test_an_epoch_limit_ends_the_cosine_too(build, data, trainer):
    model = build(warmup_steps=0)
    trainer(max_steps=-1, max_epochs=2, accumulate_grad_batches=4, limit_val_batches=0).fit(model, datamodule=data)
    assert model.total_steps == 2 * 3  # 11 batches an epoch, 4 to a step


def test_a_run_that_is_continued_keeps_the_end_of_its_cosine(build, data, trainer, tmp_path):
    options = dict(warmup_steps=2, learning_rate=0.01, final_learning_rate=0.0)
    first = trainer(limit_val_batches=0)
    first.fit(build(**options), datamodule=data)
    first.save_checkpoint(tmp_path / "first.ckpt")
    longer = build(**options)
    trainer(max_steps=5, limit_val_batches=0).fit(longer, datamodule=data, ckpt_path=tmp_path / "first.ckpt")
    assert longer.total_steps == 3 and float(rows(tmp_path)[-1]["learning_rate"]) == 0.0
    trainer(max_steps=7, limit_val_batches=0).fit(longer, datamodule=data)  # the same model, and yet a new run
    assert longer.total_steps == 7
    trainer(limit_val_batches=0).validate(longer, datamodule=data, ckpt_path=tmp_path / "first.ckpt", verbose=False)
    trainer(max_steps=7, limit_val_batches=0).fit(longer, datamodule=data)
    assert longer.total_steps == 7


def test_a_cosine_needs_an_end(build, data, trainer):
    with pytest.raises(ValueError, match="max_steps, max_epochs or schedule_steps"):
        trainer(max_steps=-1, max_epochs=-1).fit(build(), datamodule=data)


def test_first_loss_is_the_cross_entropy_of_the_first_batch(build, data, trainer, tmp_path):
    model = build(dropout=0.0)
    inputs, targets = next(iter(data.train_dataloader()))
    with torch.no_grad():
        logits = model(inputs).double().numpy()
    expected = reference_losses(logits, targets.numpy()).mean()
    trainer(max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    assert float(rows(tmp_path)[0]["train_loss"]) == pytest.approx(expected, rel=1e-5)


# --- what stops a run -------------------------------------------------------------------------------------------


class Spoil(L.Callback):
    """Changes the model before batch 2."""

    def __init__(self, change):
        self.change = change

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.change(pl_module)
            self.spoiled = copy.deepcopy(pl_module.state_dict())


def nan_weight(model):
    model.gpt.head.bias.data[1] = math.nan


def infinite_gradient(model):
    model.gpt.head.weight.register_hook(lambda gradient: gradient / 0.0)


@pytest.mark.parametrize(
    ("change", "message"), [(nan_weight, "the loss is nan"), (infinite_gradient, "the norm of the gradient is nan|inf")]
)
def test_divergence_stops_before_the_optimizer_steps(build, data, trainer, tmp_path, change, message):
    model, spoil = build(), Spoil(change)
    checkpoint = RunCheckpoint(tmp_path / "run" / "checkpoints", every_n_train_steps=1)
    with pytest.raises(FloatingPointError, match=rf"({message}) at step 2 \(epoch 0, batch 2\)") as error:
        trainer(max_steps=9, callbacks=[checkpoint, spoil], num_sanity_val_steps=0).fit(model, datamodule=data)
    assert "\n" not in str(error.value) and "learning_rate" in str(error.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), spoil.spoiled[name].nan_to_num(7.0))
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1"]


def test_divergence_keeps_the_last_good_checkpoint(build, data, trainer, tmp_path):
    checkpoint = RunCheckpoint(tmp_path / "run" / "checkpoints", every_n_train_steps=1)

    class Diverge(LanguageModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                nan_weight(self)
                super().training_step(batch, batch_idx)
            return loss

    model = Diverge(data.tokenizer, attention="classical", **TINY)
    with pytest.raises(FloatingPointError):
        trainer(max_steps=9, callbacks=[checkpoint], num_sanity_val_steps=0).fit(model, datamodule=data)
    last = read_checkpoint(checkpoint.last_model_path)
    assert last["global_step"] == 2 and all(t.isfinite().all() for t in last["state_dict"].values())


# --- evaluation -------------------------------------------------------------------------------------------------


def reference_losses(logits, targets):
    logits = logits - logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]


@pytest.fixture
def windows(data):
    def windows(split):
        inputs, targets = data.splits[split][torch.arange(7)]
        return inputs, targets

    return windows


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_covers_every_window_once(build, data, trainer, windows, stage):
    model = build(QISA())
    evaluate = trainer(logger=False)
    (metrics,) = (evaluate.validate if stage == "val" else evaluate.test)(model, datamodule=data, verbose=False)
    inputs, targets = windows("validation" if stage == "val" else "test")
    losses = reference_losses(model.eval()(inputs).detach().double().numpy(), targets.numpy())
    assert metrics[f"{stage}_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert metrics[f"{stage}_bits_per_character"] == pytest.approx(losses.mean() / math.log(2), rel=1e-5)
    assert metrics.keys() == {
        f"{stage}_{x}" for x in ("loss", "bits_per_character", "perplexity", "cer", "wer", "bleu")
    }
    per_position = model.cross_entropy_per_position[stage]
    np.testing.assert_allclose(per_position.numpy(), losses.mean(0), rtol=1e-5)


def test_per_position_table_of_a_run(build, data, trainer, tmp_path):
    model = build()
    trainer(max_steps=4, val_check_interval=2, check_val_every_n_epoch=None).fit(model, datamodule=data)
    with (tmp_path / "run" / "val_cross_entropy_per_position.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["1", "3"]
    last = [float(table[1][f"position_{i:04}"]) for i in range(5)]
    assert last == pytest.approx(model.cross_entropy_per_position["val"].tolist())
    assert np.mean(last) == pytest.approx(float([r for r in rows(tmp_path) if r["val_loss"]][1]["val_loss"]))


@pytest.fixture
def known():
    """A language of known entropy, and its validation windows."""
    return TextDataModule("markov:order=1,symbols=5,length=20011,seed=3", block_size=5, batch_size=71, eval_windows=499)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_excess_over_the_optimum_of_the_same_windows(known, trainer, stage, capsys):
    model = LanguageModel(known.tokenizer, attention="classical", **TINY)
    evaluate = trainer(logger=False)
    (metrics,) = (evaluate.validate if stage == "val" else evaluate.test)(model, datamodule=known, verbose=False)
    windows = known.splits["validation" if stage == "val" else "test"]
    inputs, targets = windows[torch.arange(499)]
    losses = reference_losses(model.eval()(inputs).detach().double().numpy(), targets.numpy())
    # Of order 1, so the symbol before is all there is to know: a row of the table.
    optimal = -np.log(known.source.emission.numpy())[inputs, targets]
    assert metrics[f"{stage}_optimum"] == pytest.approx(optimal.mean(), rel=1e-6)
    assert metrics[f"{stage}_excess"] == pytest.approx((losses - optimal).mean(), rel=1e-5)
    assert metrics[f"{stage}_loss"] - metrics[f"{stage}_optimum"] == pytest.approx(metrics[f"{stage}_excess"], rel=1e-5)
    groups = [np.mean(part) for part in np.split((losses - optimal).mean(1)[:480], 48)]  # 499 // 10 are 49
    assert metrics[f"{stage}_excess_error"] == pytest.approx(np.std(groups, ddof=1) / 7, rel=0.2)
    np.testing.assert_allclose(model.optimum_per_position[stage].numpy(), optimal.mean(0), rtol=1e-12)
    assert "LEAKS" not in capsys.readouterr().err


def test_a_model_learns_down_to_the_optimum_and_not_below(known, trainer, capsys, tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(known.tokenizer, attention="classical", learning_rate=0.01, warmup_steps=10, **TINY)
    options = dict(max_steps=400, val_check_interval=200, check_val_every_n_epoch=None, log_every_n_steps=100)
    trainer(**options).fit(model, datamodule=known)
    first, last = ({k: float(v) for k, v in row.items() if v} for row in rows(tmp_path) if row["val_excess"])
    assert -4 * last["val_excess_error"] < last["val_excess"] < 0.1 and last["val_excess"] < first["val_excess"]
    assert "LEAKS" not in capsys.readouterr().err


class Cheat(torch.nn.Module):
    """Shifts the window: what stands next in it is what is to be predicted."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens):
        following = torch.nn.functional.one_hot(tokens[:, 1:], self.vocab_size) * 9.0
        return torch.nn.functional.pad(following, (0, 0, 0, 1))


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_model_that_sees_its_targets_is_named(known, trainer, stage, capsys):
    model = LanguageModel(known.tokenizer, attention="classical", **TINY)
    model.gpt = Cheat(known.vocab_size)
    evaluate = trainer(logger=False)
    (metrics,) = (evaluate.validate if stage == "val" else evaluate.test)(model, datamodule=known, verbose=False)
    assert metrics[f"{stage}_excess"] < -0.2 < -5 * metrics[f"{stage}_excess_error"]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "LEAKS" in line)
    assert line.startswith(f"qattn: {stage}_loss is {-metrics[f'{stage}_excess']:.4f} nats")


def test_a_text_of_unknown_entropy_has_no_optimum(build, data, known, trainer):
    model = build()
    model.optimum_per_position["val"] = torch.zeros(5)
    (metrics,) = trainer(logger=False).validate(model, datamodule=data, verbose=False)
    assert not any("excess" in name or "optimum" in name for name in metrics) and not model.optimum_per_position


def test_predictions(build, data, trainer, windows):
    model = build()
    batches = trainer(logger=False).predict(model, datamodule=data)
    predictions = [window for batch in batches for window in batch]
    inputs, targets = windows("test")
    logits = model.eval()(inputs).detach().double().numpy()
    decode = data.tokenizer.decode
    assert [p["input"] for p in predictions] == [decode(row) for row in inputs.tolist()]
    assert [p["target"] for p in predictions] == [decode(row) for row in targets.tolist()]
    assert [p["argmax"] for p in predictions] == [decode(row) for row in logits.argmax(-1).tolist()]
    expected = -reference_losses(logits, targets.numpy()).sum(1)
    assert [p["log_likelihood"] for p in predictions] == pytest.approx(expected.tolist(), rel=1e-5)


# --- generation, sizes, descriptions ----------------------------------------------------------------------------


def test_streaming_gives_the_text_of_generate(build):
    model = build().eval()
    (text,) = model.generate(["the d"], 23, temperature=0.8, seed=3)
    assert text.startswith("the d") and len(text) == 5 + 23
    pieces = list(model.stream("the d", 23, temperature=0.8, seed=3))
    assert "the d" + "".join(pieces) == text and len(pieces) == 23


def test_streaming_waits_for_whole_characters():
    tokenizer = BPETokenizer.train("naïve café 猫\n" * 9, 256)  # 256 tokens: bytes only
    torch.manual_seed(0)
    model = LanguageModel(tokenizer, attention="classical", **TINY)
    ids = iter(tokenizer.encode("é猫!"))
    model.gpt.head.register_forward_hook(lambda module, x, logits: torch.eye(256)[next(ids)].expand_as(logits))
    assert list(model.stream("a", 6, temperature=0)) == ["é", "猫", "!"]


@pytest.mark.parametrize("seed", range(4))
def test_streaming_bytes_that_are_no_characters(seed, monkeypatch):
    tokenizer = BPETokenizer.train("naïve café 猫\n" * 9, 270)
    torch.manual_seed(seed)
    model = LanguageModel(tokenizer, attention="classical", **TINY).eval()
    (text,) = model.generate(["a"], 150, seed=seed)
    decode, lengths = BPETokenizer.decode, []
    monkeypatch.setattr(BPETokenizer, "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    pieces = list(model.stream("a", 150, seed=seed))
    assert "a" + "".join(pieces) == text and "\ufffd" in text and len(pieces) > 9
    assert sum(lengths) < 30 * 150  # not the whole text again for each token


def test_a_character_outside_the_vocabulary(build):
    with pytest.raises(ValueError, match="'é' at position 3"):
        build().generate(["thé".replace("é", " é")], 3)


def test_sizes_replace_those_of_the_preset():
    config = model_config("gpt1", vocab_size=11, num_layers=2, num_heads=None, embed_dim=24, dropout=0.3)
    assert (config.vocab_size, config.num_layers, config.num_heads, config.embed_dim) == (11, 2, 12, 24)
    assert config.feedforward_dim in (None, 96) and config.dropout == config.embed_dropout == 0.3
    assert model_config("qisa-16", dropout=0.1).embed_dropout == 0.0
    assert model_config(PRESETS["gpt1"]) == PRESETS["gpt1"]


def test_default_is_the_published_setting_with_qisa():
    model = LanguageModel(CharTokenizer("abc"))
    assert model.attention == QISA() and model.gpt.config == model_config("qisa-16", vocab_size=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "nope"}, "unknown attention 'nope'; choose from classical"),
        ({"preset": "nope"}, "unknown preset 'nope'; choose from gpt1"),
        ({"num_heads": 3}, "embed_dim must be divisible by num_heads; got 4 and 3"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
    ],
)
def test_wrong_models(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("name", ATTENTION)
def test_plain_description_round_trip(build, name):
    model = build(name, learning_rate=0.125, betas=(0.5, 0.75))
    again = LanguageModel.from_plain(model.to_plain())
    assert again.to_plain() == model.to_plain() and again.attention == model.attention
    assert again.optimisation == model.optimisation and again.tokenizer == model.tokenizer


def test_a_model_from_a_checkpoint_trains_with_dropout(build, data, trainer, tmp_path):
    first = trainer(max_steps=1, limit_val_batches=0)
    first.fit(build(dropout=0.5), datamodule=data)
    first.save_checkpoint(tmp_path / "a.ckpt")
    model = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not model.training
    trainer(max_steps=1, limit_val_batches=0, logger=False).fit(model, datamodule=data)
    assert all(module.training for module in model.gpt.modules())


def test_loading_leaves_the_random_state_alone(build, data, trainer, tmp_path):
    first = trainer(max_steps=1, limit_val_batches=0)
    first.fit(build(Classical(bias=True)), datamodule=data)
    first.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(torch.rand(3), expected)


# --- speed and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"compile": True}, {"compile": "reduce-overhead"}, {"gradient_checkpointing": True}]
)
def test_how_it_is_trained_changes_no_weight(build, data, trainer, monkeypatch, options):
    """That it is compiled is only looked for: torch's compiler is slow, and what it makes is tested elsewhere."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, mode: compiled.append((type(module).__name__, mode)))
    trained = []
    for more in ({}, options):
        L.seed_everything(0)
        model = build("qisa", dropout=0.1, **more)
        trainer().fit(model, data)
        trained.append(model.state_dict())
    mode = {True: "default"}.get(options.get("compile"), options.get("compile"))
    assert compiled == ([("GPT", mode)] if mode else [])
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compiled(build):
    with pytest.raises(ValueError, match="one of default, reduce-overhead, max-autotune; got 'quick'"):
        build("qisa", compile="quick")
    execution = Execution(executor="qnode", device="default.qubit")
    with pytest.raises(ValueError, match="takes folded circuits only; leave compile out, or the device default.qubit"):
        build("qisa", compile=True, execution=execution)
    assert build("classical", compile=True, execution=execution).plans == []
