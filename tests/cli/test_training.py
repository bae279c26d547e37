"""`qattn fit|validate|test|predict`: a whole run, continued runs, bad input, and every config."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules import cli, training_cli
from lightning_modules.checkpoints import read_checkpoint
from lightning_modules.gpt import GPT
from lightning_modules.language_model import LanguageModel
from lightning_modules.training_cli import TrainingCLI
from pennylane_qattn import QISA, BasicEntangler, Classical, Gaussian, QISAAbsorbed

ROOT = Path(__file__).parents[2]
LAST, BEST = "runs/a/checkpoints/last.ckpt", "runs/a/checkpoints/best.ckpt"


def metrics(folder):
    with open(f"{folder}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("train_characters_per_second")
    return rows


def assert_same_weights(first, second):
    first, second = (read_checkpoint(path)["state_dict"] for path in (first, second))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- one run through all commands -------------------------------------------------------------------------------


def test_a_run_and_what_can_be_done_with_it(fit, capsys, tmp_path):
    assert fit("--run", "a") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "step 12/15" in captured.err and "lowest val_loss" in captured.err
    assert "Tip" not in captured.err and "Warning" not in captured.err
    files = {str(path.relative_to("runs/a")) for path in Path("runs/a").rglob("*") if path.is_file()}
    table = "val_cross_entropy_per_position.csv"
    assert files >= {"config.yaml", "metrics.csv", table, "checkpoints/last.ckpt", "checkpoints/best.ckpt"}
    assert any(name.startswith("tensorboard/events") for name in files)
    losses = [float(row["val_loss"]) for row in metrics("runs/a") if row["val_loss"]]

    # The text, its split and the vocabulary are known from the checkpoint.
    assert cli.main(["validate", "--ckpt_path", LAST]) == 0
    table = capsys.readouterr().out
    assert "val_loss" in table and "BLEU" in table and "cross-entropy by position" in table
    assert cli.main(["validate", "--ckpt_path", "runs/a"]) == 0
    assert f"{min(losses):.4f}" in capsys.readouterr().out
    assert cli.main(["test", "--ckpt_path", "best", "--run", "a", "--data.eval_windows", "2"]) == 0
    assert "test_loss" in capsys.readouterr().out
    assert cli.main(["predict", "--ckpt_path", "runs/a", "--output", "out/predictions.jsonl"]) == 0
    capsys.readouterr()
    windows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
    assert cli.main(["predict", "--ckpt_path", "runs/a"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == windows
    assert len(windows) == 3 and windows[0].keys() == {"input", "target", "argmax", "log_likelihood"}
    assert cli.main(["generate", "--checkpoint", "runs/a", "--prompt", "the ", "--max_new_tokens", "9"]) == 0
    assert capsys.readouterr().out.startswith("the ")


def test_the_same_run_again_from_its_config(fit, tiny, tmp_path):
    assert fit("--run", "a", "--trainer.gradient_clip_val", "null") == 0
    config = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert config["run"] == "a" and config["trainer"]["gradient_clip_val"] is None
    assert cli.main(["fit", "--config", "runs/a/config.yaml", "--run", "b"]) == 0
    assert_same_weights(LAST, "runs/b/checkpoints/last.ckpt")
    assert metrics("runs/a") == metrics("runs/b")


def test_seeds_matter(fit):
    assert (
        fit("--run", "a") == fit("--run", "b", "--seed_everything", "1") == fit("--run", "c", "--data.seed", "1") == 0
    )
    losses = {tuple(row["train_loss"] for row in metrics(f"runs/{name}")) for name in "abc"}
    assert len(losses) == 3


# --- continuing -------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def fails(*args, **kwargs):
    raise Stop("once")


def fails_at(number):
    """A `training_step` that fails at that optimizer step."""
    step = LanguageModel.training_step
    return lambda model, *args: fails() if model.global_step == number else step(model, *args)


def test_a_run_that_an_error_ended_goes_on(fit, refused, tiny, monkeypatch):
    assert fit("--run", "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", fails_at(10))
        assert "Stop: once" in refused("fit", *tiny, "--run", "a", status=1)
    assert read_checkpoint(LAST)["global_step"] == 8
    assert fit("--run", "a", "--ckpt_path", "last") == 0
    assert_same_weights(LAST, "runs/whole/checkpoints/last.ckpt")
    assert_same_weights(BEST, "runs/whole/checkpoints/best.ckpt")
    assert metrics("runs/a") == metrics("runs/whole")


def test_a_run_in_double_precision_goes_on_in_it(fit):
    double = ["--trainer.precision", "64-true", "--model.schedule_steps", "15"]
    assert fit(*double, "--run", "whole") == fit(*double, "--run", "a", "--trainer.max_steps", "6") == 0
    assert fit(*double, "--run", "a", "--ckpt_path", "last") == 0
    assert_same_weights(LAST, "runs/whole/checkpoints/last.ckpt")


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_modules", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, step):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if Path("runs/a/metrics.csv").exists() and len(metrics("runs/a")) > step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate()[1]}")


def test_a_process_that_was_killed_goes_on(fit, tiny):
    steps = ["--trainer.max_steps", "250", "--trainer.val_check_interval", "100", "--checkpoint_every", "7"]
    process = start("fit", *tiny, *steps, "--run", "a")
    wait_for_step(process, 40)
    process.kill()
    process.communicate()
    step = read_checkpoint(LAST)["global_step"]
    assert 0 < step < 250
    assert fit(*steps, "--run", "a", "--ckpt_path", "last") == 0
    assert fit(*steps, "--run", "whole") == 0
    assert_same_weights(LAST, "runs/whole/checkpoints/last.ckpt")
    assert metrics("runs/a") == metrics("runs/whole")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint(tiny, sent, status):
    steps = ["--trainer.max_steps", "100000", "--run", "a", "--checkpoint_every", "100000"]
    process = start("fit", *tiny, *steps)
    wait_for_step(process, 20)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    line = error.splitlines()[-1]
    assert line.startswith(f"qattn: error: stopped by {sent.name} at step ") and line.endswith(LAST)
    assert "Traceback" not in error
    step = read_checkpoint(LAST)["global_step"]
    assert step >= 10 and f"at step {step};" in line


@pytest.fixture(scope="module")
def saved():
    """For the content of a checkpoint, which the first test that needs it makes."""
    return []


@pytest.fixture
def last_checkpoint(fit, saved):
    """The content of the last checkpoint of a run of four steps, whose folder may lack the rest."""
    if not saved:
        assert fit("--run", "a", "--trainer.max_steps", "4", "--model.schedule", "constant") == 0
        saved.append(Path(LAST).read_bytes())
    Path(LAST).parent.mkdir(parents=True, exist_ok=True)
    Path(LAST).write_bytes(saved[0])
    return read_checkpoint(LAST)


def first_state(content):
    return content["optimizer_states"][0]["state"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: first_state(c).update(exp_avg=torch.ones(1)),  # on which torch's fused steps break down
        lambda c: first_state(c).pop("exp_avg_sq"),
        lambda c: first_state(c)["exp_avg"].fill_(torch.nan),
        lambda c: first_state(c)["exp_avg_sq"].fill_(-1),
        lambda c: first_state(c).update(exp_avg=first_state(c)["exp_avg"].long()),
        lambda c: first_state(c).update(exp_avg=first_state(c)["exp_avg"].double()),
        lambda c: first_state(c).update(step=torch.tensor(5.0)),  # of four
        lambda c: first_state(c).update(step=torch.tensor(torch.nan)),
        lambda c: c["optimizer_states"][0]["state"].pop(3),
        lambda c: c["optimizer_states"][0]["state"].clear(),
        lambda c: first_state(c).update(step=torch.ones(3)),
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(betas=[]),
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(betas=(0.9, 0.99)),
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(eps=math.nan),
        lambda c: c["optimizer_states"][0]["param_groups"].pop(),
        lambda c: c["optimizer_states"][0].update(state=[]),
        lambda c: c["optimizer_states"][0]["state"].update({99: {}}),
        lambda c: c["optimizer_states"].append(1),
        lambda c: c["loops"]["fit_loop"].update({"epoch_loop.manual_optimization.optim_step_progress": True}),
        lambda c: c["state_dict"].pop("gpt.head.bias"),
        lambda c: c["state_dict"]["gpt.head.bias"].fill_(torch.inf),
        lambda c: c["state_dict"].update({"gpt.head.bias": c["state_dict"]["gpt.head.bias"].double()}),
        lambda c: c["state_dict"].update({"gpt.head.bias": c["state_dict"]["gpt.head.bias"].long()}),
        lambda c: c["state_dict"].update({"gpt.head.bias": 1.0}),
        lambda c: c["callbacks"].update(RandomState={}),
        lambda c: c["callbacks"].pop("RandomState"),
        lambda c: c["callbacks"]["RandomState"].update(processes=[]),
        lambda c: c["callbacks"]["RandomState"]["processes"][0].update(torch=torch.zeros(3)),
        lambda c: c["callbacks"]["RandomState"]["processes"][0].pop("python"),
        lambda c: c["callbacks"]["RandomState"]["processes"][0].update(numpy=([1] * 624, 10**9, 0, 0.0)),  # beyond it
        lambda c: c["callbacks"]["RunCheckpoint"].update(best_score="low"),
        lambda c: c["callbacks"]["RunCheckpoint"].update(best_score=math.nan),
        lambda c: c["loops"]["fit_loop"].pop("epoch_progress"),
        lambda c: c["loops"]["fit_loop"]["epoch_progress"]["current"].update(ready=-1),
        lambda c: c["loops"].update(fit_loop=[]),
        lambda c: c.update(global_step=3),
        lambda c: c.pop("schedule_steps"),
        lambda c: c.update(schedule_steps=math.nan),
        lambda c: c["run"].update(batches_that_stepped=[]),
    ],
)
def test_a_state_of_training_that_does_not_fit(last_checkpoint, refused, tiny, change):
    change(last_checkpoint)
    torch.save(last_checkpoint, LAST)
    line = refused("fit", *tiny, "--run", "a", "--ckpt_path", "last", "--model.schedule", "constant")
    assert "the checkpoint is damaged: " in line or f"cannot go on from '{LAST}': its state does not fit" in line


def test_a_parameter_that_no_gradient_reaches_has_no_state(fit, monkeypatch):
    build = GPT.__init__

    def with_a_spare_parameter(self, *arguments, **options):
        build(self, *arguments, **options)
        self.spare = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(GPT, "__init__", with_a_spare_parameter)
    assert fit("--run", "a", "--trainer.max_steps", "4", "--model.schedule", "constant") == 0
    (state,) = read_checkpoint(LAST)["optimizer_states"]
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"]) - 1
    assert fit("--run", "a", "--trainer.max_steps", "5", "--model.schedule", "constant", "--ckpt_path", "last") == 0


def test_a_cosine_that_never_ends(fit, refused, tiny):
    assert fit("--run", "a", "--trainer.max_steps", "1") == 0
    content = read_checkpoint(LAST)
    torch.save({**content, "schedule_steps": math.inf}, LAST)
    assert "schedule_steps is inf and no number of steps" in refused("fit", *tiny, "--run", "a", "--ckpt_path", "last")


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_left_alone(fit, refused, tiny):
    assert fit("--run", "a", "--trainer.max_steps", "4") == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    line = refused("fit", *tiny, "--run", "a")
    assert all(remedy in line for remedy in ("--ckpt_path last", "--run", "--overwrite"))
    assert "give one of them" in refused("fit", *tiny, "--run", "a", "--ckpt_path", "last", "--overwrite")
    assert "learning_rate is 0.003" in refused(
        "fit", *tiny, "--run", "a", "--ckpt_path", "last", "--model.learning_rate", "1"
    )
    assert {path: path.read_bytes() for path in before if path.suffix != ".0"} == {
        path: data for path, data in before.items() if path.suffix != ".0"
    }
    Path("runs/a/notes.txt").write_text("mine")
    assert fit("--run", "a", "--overwrite", "--trainer.max_steps", "3") == 0
    assert read_checkpoint(LAST)["global_step"] == 3 and Path("runs/a/notes.txt").exists()
    assert [row["step"] for row in metrics("runs/a")] == ["0", "1", "2"]


def contents(folder="runs"):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_what_fails_before_its_first_checkpoint_leaves_the_folder_as_it_was(fit, refused, tiny, monkeypatch):
    assert fit("--run", "a", "--trainer.max_steps", "5") == 0
    content = read_checkpoint(LAST)
    torch.save({"a": 1}, "foreign.ckpt")
    torch.save({name: content[name] for name in ("state_dict", "hyper_parameters")}, "weights.ckpt")
    torch.save(content, "full.ckpt")
    before = contents()
    replace, afresh, onwards = ["--run", "a", "--overwrite"], ["--run", "b"], ["--run", "a", "--ckpt_path", "last"]
    for start in (replace, afresh):
        line = refused("fit", *tiny, *start, "--ckpt_path", "foreign.ckpt")
        assert "of another program" in line
        line = refused("fit", *tiny, *start, "--ckpt_path", "weights.ckpt")
        assert "'weights.ckpt' holds a model and not the state of its training" in line
        line = refused("fit", *tiny, *start, "--ckpt_path", "full.ckpt", "--model.learning_rate", "1")
        assert "learning_rate is 0.003 in the checkpoint and 1.0 here" in line
        assert "max_steps must be at least 1" in refused("fit", *tiny, *start, "--trainer.max_steps", "0")
        line = refused("fit", *tiny, *start, "--trainer.max_time", "00:00:00:00")
        assert "ended before its first step; give it more time with trainer.max_time" in line
        assert contents() == before
    later = ["--trainer.max_steps", "9"]
    for target, name in ((LanguageModel, "configure_optimizers"), (LanguageModel, "on_train_start"), (torch, "save")):
        for start in (replace, afresh) if target is torch else (replace, afresh, onwards):
            with monkeypatch.context() as patch:
                patch.setattr(target, name, fails)
                assert "Stop: once" in refused("fit", *tiny, *start, *later, status=1)
            assert contents() == before and not Path("runs/b").exists()
    assert fit(*onwards, "--trainer.max_steps", "5") == 0  # nothing to do
    assert contents() == before
    monkeypatch.setattr(LanguageModel, "training_step", fails_at(6))
    assert "Stop: once" in refused("fit", *tiny, *onwards, *later, status=1)
    assert len(contents("runs/a/tensorboard")) == len(before.keys() & contents("runs/a/tensorboard").keys()) + 1


def test_overwriting_with_a_run_that_goes_on_from_another_one(fit, refused, tiny, monkeypatch):
    constant = ["--model.schedule", "constant", "--checkpoint_every", "100"]
    assert fit("--run", "b", *constant, "--trainer.max_steps", "6") == fit("--run", "a", *constant) == 0
    monkeypatch.setattr(LanguageModel, "training_step", fails_at(7))
    start = ["--run", "a", "--overwrite", "--ckpt_path", "runs/b/checkpoints/last.ckpt"]
    assert "Stop" in refused("fit", *tiny, *constant, *start, status=1)
    assert read_checkpoint(LAST)["global_step"] == 6 and not Path(BEST).exists()
    assert [row["step"] for row in metrics("runs/a")] == ["6"]


def test_a_run_without_validation_replaces_all_of_the_one_before(fit, capsys):
    assert fit("--run", "a") == 0
    before = contents()
    capsys.readouterr()
    assert fit("--run", "a", "--overwrite", "--trainer.limit_val_batches", "0") == 0
    assert capsys.readouterr().err.endswith(f"step 15, without a validation that found a best checkpoint: {LAST}\n")
    after = contents()
    assert {path for path in after if "events" not in path} == {
        *("runs/a/config.yaml", "runs/a/metrics.csv", "runs/a/tensorboard/hparams.yaml", LAST)
    }
    assert not {path for path in after if "events" in path} & before.keys()


def test_advice_for_a_folder_without_a_checkpoint(refused, tiny, tmp_path):
    (tmp_path / "runs" / "a" / "tensorboard").mkdir(parents=True)
    line = refused("fit", *tiny, "--run", "a")
    assert "--overwrite" in line and "--ckpt_path" not in line


def test_a_longer_run_keeps_its_schedule(fit, capsys):
    assert fit("--run", "a", "--trainer.max_steps", "6") == 0
    capsys.readouterr()
    assert fit("--run", "a", "--trainer.max_steps", "11", "--ckpt_path", "last") == 0
    assert "qattn: the cosine schedule still ends at step 6, as when the run began\n" in capsys.readouterr().err
    assert fit("--run", "whole", "--trainer.max_steps", "11", "--model.schedule_steps", "6") == 0
    assert "schedule" not in capsys.readouterr().err
    assert_same_weights(LAST, "runs/whole/checkpoints/last.ckpt")
    rates = [float(row["learning_rate"]) for row in metrics("runs/a") if row["learning_rate"]]
    assert len(rates) == 11 and rates[6:] == pytest.approx([3e-4] * 5)


def test_one_process_speaks(fit, capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    training_cli.say("five times")
    assert capsys.readouterr().err == ""


def test_a_missing_last_is_an_error(refused, tiny):
    assert "there is no last checkpoint of the run 'runs/a'" in refused(
        "fit", *tiny, "--run", "a", "--ckpt_path", "last"
    )
    assert not Path("runs").exists()


def test_continuing_from_another_run_begins_a_folder_of_its_own(fit):
    assert fit("--run", "a", "--trainer.max_steps", "6", "--model.schedule", "constant") == 0
    before = Path(LAST).read_bytes()
    assert fit("--run", "b", "--ckpt_path", LAST, "--trainer.max_steps", "9", "--model.schedule", "constant") == 0
    assert Path(LAST).read_bytes() == before
    assert [row["step"] for row in metrics("runs/b") if row["train_loss"]] == ["6", "7", "8"]


def test_names_of_runs(tiny, tmp_path):
    def name(*options):
        return TrainingCLI("fit", [*tiny, *options]).run_folder

    assert name() == Path("runs/classical-qisa-16")
    (tmp_path / "mine.yaml").write_text("model: {dropout: 0.1}")
    assert name("--config", "mine.yaml") == Path("runs/mine")
    assert name("--config", "mine.yaml", "--run", "x", "--trainer.default_root_dir", "else/where") == Path(
        "else/where/x"
    )


def test_a_dry_run_leaves_nothing(fit):
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert not Path("runs").exists()


def test_an_output_folder_that_cannot_be_written(refused, tiny, text_file):
    line = refused("fit", *tiny, "--trainer.default_root_dir", text_file)
    assert "text.txt: not a directory; choose another one with --trainer.default_root_dir" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder(refused, tiny, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission denied; choose another" in refused(
        "fit", *tiny, "--trainer.default_root_dir", tmp_path / "locked"
    )


def test_a_read_only_file_system(refused, tiny, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    line = refused("fit", *tiny, "--run", "a")
    assert line.startswith("cannot write to 'runs/a': ") and line.endswith("with --trainer.default_root_dir")
    assert "read-only file system" in line


def test_a_disk_that_fills_during_a_checkpoint(fit, refused, tiny, monkeypatch):
    assert fit("--run", "a", "--trainer.max_steps", "4") == 0
    before = Path(LAST).read_bytes()
    save = torch.save

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    line = refused("fit", *tiny, "--run", "a", "--ckpt_path", "last", status=1)
    assert line == f"{LAST}: no space left on device; make room there" and Path(LAST).read_bytes() == before
    assert sorted(os.listdir("runs/a/checkpoints")) == ["best.ckpt", "last.ckpt"]
    monkeypatch.setattr(torch, "save", save)


def test_a_nan_loss(refused, tiny, monkeypatch):
    hidden = LanguageModel.on_train_batch_start

    def spoil(self, batch, batch_idx):
        if self.global_step == 7:
            self.gpt.head.bias.data.fill_(torch.nan)
        hidden(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "on_train_batch_start", spoil)
    line = refused("fit", *tiny, "--run", "a", status=1)
    assert line.startswith("the loss is nan at step 7 (epoch 1, batch ")
    last = read_checkpoint(LAST)
    assert last["global_step"] == 7 - 7 % 3 + 1 and all(t.isfinite().all() for t in last["state_dict"].values())


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], QISA()),
        (["--model.attention.split", "true"], QISA(split=True)),
        (["--model.attention", "classical"], Classical()),
        (["--model.attention=classical", "--model.attention.bias", "true"], Classical(bias=True)),
        (["--model.attention", "Classical"], Classical()),
        (["--model.attention", "pennylane_qattn.QISAAbsorbed"], QISAAbsorbed()),
        (["--model.attention", "gaussian", "--model.attention.beta", "2"], Gaussian(beta=2.0)),
        (["--config", "name.yaml"], Gaussian()),
        (["--config", "class.yaml"], Classical(dropout=0.1)),
        (["--config", "class.yaml", "--model.attention", "gaussian"], Gaussian(dropout=0.1)),
        (
            ["--model.attention.ansatz", "basic-entangler", "--model.attention.ansatz.layers", "2"],
            QISA(ansatz=BasicEntangler(layers=2)),
        ),
    ],
)
def test_ways_to_choose_an_attention(text_file, tmp_path, options, expected):
    (tmp_path / "name.yaml").write_text("model: {attention: gaussian}")
    (tmp_path / "class.yaml").write_text(
        "model: {attention: {class_path: pennylane_qattn.Classical, init_args: {dropout: 0.1}}}"
    )
    training = TrainingCLI("fit", ["--data.corpus", str(text_file), *options])
    assert training.model.attention == expected


def test_the_block_of_the_preset_reaches_the_data(text_file):
    for options, size in ((["--model.block_size", "7"], 7), (["--model.block_size", "9", "--data.block_size", "9"], 9)):
        training = TrainingCLI("fit", ["--data.corpus", str(text_file), *options])
        assert training.datamodule.block_size == training.model.gpt.config.block_size == size
        assert training.model.gpt.config.vocab_size == training.datamodule.vocab_size == 28


def test_options_of_a_run(tiny):
    training = TrainingCLI("fit", [*tiny, "--early_stopping", "3"])
    assert [c.patience for c in training.trainer.early_stopping_callbacks] == [3]
    assert training.trainer.max_steps == 15 and training.trainer.checkpoint_callback.every_n_train_steps == 3
    assert TrainingCLI("fit", [*tiny, "--trainer.max_steps", "-1"]).trainer.max_steps == training_cli.STEPS
    epochs = TrainingCLI("fit", [*tiny, "--trainer.max_steps", "-1", "--trainer.max_epochs", "2"]).trainer
    assert epochs.max_steps == -1 and epochs.max_epochs == 2


def test_early_stopping_ends_a_run(fit):
    options = ["--early_stopping", "2", "--model.learning_rate", "1e-30", "--trainer.val_check_interval", "1"]
    assert fit("--run", "a", *options) == 0
    assert read_checkpoint(LAST)["global_step"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.attention", "nope"], "unknown attention 'nope'; choose from classical, gaussian"),
        (["--model.attention", "nope", "--model.attention.split", "true"], "unknown attention 'nope'"),
        (["--model.attention.hurry", "1"], "Classical has no option 'hurry'; see qattn fit --model.attention.help"),
        (["--model.attention.dropout", "x"], "model.attention.dropout: expected float; got x"),
        (["--model.attention", "qisa", "--model.attention.ansatz.layers", "2"], "say first which one, as in --model"),
        (["--config", "class.yaml"], "unknown ansatz 'foo'; choose from basic-entangler"),
        (["--model.preset", "nope"], "unknown preset 'nope'; choose from gpt1, gpt1-tiny, qisa-128, qisa-16"),
        (["--model.num_heads", "3"], "embed_dim must be divisible by num_heads; got 4 and 3"),
        (["--model.block_size", "0"], "block_size must be an integer of at least 1; got 0"),
        (["--model.block_size", "five"], "model.block_size: expected int or null; got five"),
        (["--model.block_size", "54"], "text.txt is too short: it has 54 for validation, 54 for test"),
        (["--data.block_size", "6"], "data.block_size is 6 and the model's is 5"),
        (["--data.corpus", "nope"], "unknown corpus 'nope'"),
        (["--data.corpus", "empty.txt"], "is empty"),
        (["--data.corpus", "latin.txt"], "is not UTF-8: byte 2"),
        (["--data.tokenizer", "nope"], "unknown tokenizer 'nope'"),
        (["--trainer.accelerator", "abacus"], "accelerator='abacus'"),
        (["--trainer.precision", "12"], "trainer.precision: expected"),
        (["--trainer.accelerator", "cuda"], "accelerators here: cpu"),
        (["--trainer.devices", "foo"], "trainer.devices is 'foo'; accelerators here: cpu"),
        (["--seed_everything", "-3"], "seed_everything must be at least 0; got -3"),
        (["--run", ""], "run is empty; give a name, or leave it out"),
        *[([f"--{name}", "-2"], f"{name} must be ") for name in training_cli.LEAST],
        *[([f"--{name}", "0"], f"{name} must be ") for name, least in training_cli.LEAST.items() if least],
        (["--config", "nope.yaml"], "nope.yaml'; check the path"),
        (["--config", "folder"], "folder' is a folder; name a file in it"),
        (["--config", "broken.yaml"], "config"),
        (["--config", "wrong.yaml"], "unknown option 'model.atention'; did you mean 'model.attention'?"),
        (["--modle.attention", "qisa"], "unknown option 'modle.attention'; did you mean 'model.attention'?"),
        (["--ckpt_path", "nope.ckpt"], "no checkpoint 'nope.ckpt'"),
        (["--ckpt_path", "empty.txt"], "damaged"),
    ],
)
def test_bad_input(refused, tiny, tmp_path, options, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes("naïf".encode("latin-1"))
    (tmp_path / "broken.yaml").write_text("model:\n  - [a: 3\n")
    (tmp_path / "wrong.yaml").write_text("model:\n  atention: 3\n")
    (tmp_path / "class.yaml").write_text(
        "model: {attention: {class_path: pennylane_qattn.QISA, init_args: {ansatz: foo}}}"
    )
    assert message in refused("fit", *tiny, *options)
    assert not Path("runs").exists()


def test_bad_input_of_the_evaluations(fit, refused):
    assert "give --ckpt_path" in refused("validate")
    assert fit("--run", "a", "--trainer.max_steps", "4", "--data.train_fraction", "0.9") == 0
    assert "there is no test split" in refused("test", "--ckpt_path", LAST)
    assert "another model than the checkpoint: gpt.num_layers is 1" in refused(
        "validate", "--ckpt_path", LAST, "--config", "runs/a/config.yaml", "--model.num_layers", "2"
    )
    assert "outside the vocabulary" in refused("validate", "--ckpt_path", LAST, "--data.corpus", "pydoc")
    assert "data.block_size is 6" in refused("validate", "--ckpt_path", LAST, "--data.block_size", "6")
    for command, name in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        line = refused(command, "--ckpt_path", LAST, f"--trainer.limit_{name}_batches", "0")
        assert line == f"trainer.limit_{name}_batches must be positive; got 0"
    for option, value in (("num_layers", "3"), ("block_size", "7"), ("attention", "qisa")):
        line = refused("test", "--ckpt_path", LAST, f"--model.{option}", value)
        assert f"{'attention.name' if option == 'attention' else 'gpt.' + option} is " in line
    Path("short.txt").write_text("the")
    line = refused("validate", "--ckpt_path", LAST, "--data.corpus", "short.txt")
    assert "2 for training, 1 for validation, and a window needs" in line
    assert "/proc/x" in refused("predict", "--ckpt_path", LAST, "--output", "/proc/x/y")


def test_a_config_that_describes_the_checkpoints_model(fit, tiny, capsys):
    assert fit("--run", "a", "--trainer.max_steps", "4") == 0
    assert cli.main(["validate", "--config", "runs/a/config.yaml", "--ckpt_path", "last"]) == 0
    assert "val_loss" in capsys.readouterr().out


def test_data_options_of_a_checkpoint_name_no_classes(fit, capsys):
    assert fit("--run", "a", "--trainer.max_steps", "4") == 0
    content = read_checkpoint(LAST)
    evil = {"class_path": "antigravity.Evil", "init_args": {}}
    content["data"] = {**content["data"], "tokenizer": evil, "corpus": content["data"]["corpus"], "stride": evil}
    torch.save(content, LAST)
    assert cli.main(["validate", "--ckpt_path", LAST]) == 0
    assert "antigravity" not in sys.modules


# --- configs ----------------------------------------------------------------------------------------------------

_GPT1 = [
    "--model.num_layers",
    "1",
    "--model.block_size",
    "32",
    "--model.embed_dim",
    "24",
    "--data.bpe_vocab_size",
    "300",
]
SMALLER = {
    "gpt1-tiny.yaml": ["--model.num_layers", "1", "--model.block_size", "32"],
    **{f"qisa-{width}.yaml": ["--model.num_layers", "1"] for width in (16, 128)},
    "gpt1.yaml": _GPT1,
    # tests/cli/test_distributed.py has its strategy on the CPU
    "gpt1-fsdp.yaml": [*_GPT1, "--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.precision", "32"],
}
#: All but those of `qattn compare`.
RUN_CONFIGS = sorted(
    p.name for p in (ROOT / "configs").glob("*.yaml") if "mechanisms" not in yaml.safe_load(p.read_text())
)


@pytest.mark.parametrize("name", RUN_CONFIGS)
def test_every_config_runs(name):
    path = ROOT / "configs" / name
    assert path.read_text().startswith("# ") and f"qattn fit --config configs/{name}" in path.read_text()
    limits = ["--data.corpus", "pydoc", "--data.batch_size", "2", "--data.eval_windows", "3"]
    limits += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.accelerator", "cpu"]
    assert cli.main(["fit", "--config", str(path), *limits, *SMALLER.get(name, [])]) == 0
    assert read_checkpoint(f"runs/{path.stem}/checkpoints/best.ckpt")["global_step"] in (1, 2)


def test_the_baseline_is_the_recipe_of_the_reference_table(text_file):
    training = TrainingCLI(
        "fit", ["--config", str(ROOT / "configs" / "baseline-shakespeare.yaml"), "--data.corpus", str(text_file)]
    )
    model, data, trainer = training.model, training.datamodule, training.trainer
    assert model.attention == Classical(bias=False)
    config = model.gpt.config
    assert (config.num_layers, config.num_heads, config.embed_dim, config.block_size) == (6, 1, 16, 16)
    assert (config.dropout, config.embed_dropout, config.init, config.norm) == (0.2, 0.0, "torch", "pre")
    assert (data.batch_size, data.shuffle, data.eval_windows, "test" in data.splits) == (256, "windows", 4096, False)
    assert (trainer.max_steps, trainer.gradient_clip_val) == (1500, None)
    options = model.optimisation
    assert [options.learning_rate_at(step, 1500) for step in (0, 700, 1499)] == [3e-3] * 3
    (group,) = model.configure_optimizers().param_groups
    assert (group["weight_decay"], group["betas"]) == (0.01, (0.9, 0.999))
