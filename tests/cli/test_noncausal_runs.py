"""`qattn fit` of models that see the future: it stops, or everything that comes of the run carries the word LEAKS."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules import cli, noise_report, report
from lightning_modules.checkpoints import read_checkpoint
from lightning_modules.gpt import GPT
from lightning_modules.guard import CausalityGuard
from lightning_modules.language_model import LanguageModel
from lightning_modules.training_cli import TrainingCLI

LEAKING = ["--model.attention.is_causal", "false"]
ALLOWED = [*LEAKING, "--allow-noncausal"]
LAST, BEST = "runs/a/checkpoints/last.ckpt", "runs/a/checkpoints/best.ckpt"


def rows(name="metrics.csv", run="a"):
    with open(f"runs/{run}/{name}", newline="") as file:
        return list(csv.DictReader(file))


def verdict(path):
    return read_checkpoint(path)["causality"]["verdict"]


def assert_every_row_is_labelled():
    for name in ("metrics.csv", "val_cross_entropy_per_position.csv"):
        assert rows(name) and {row["causality"] for row in rows(name)} == {"LEAKS"}


def opens_at(step):
    """A `training_step` from which on the attention sees the future."""
    own = LanguageModel.training_step

    def training_step(model, *args):
        if model.global_step == step:
            model.gpt.blocks[0].attention.is_causal = False
        return own(model, *args)

    return training_step


# --- it stops ---------------------------------------------------------------------------------------------------


def test_a_leaking_model_is_not_trained(refused, tiny):
    line = refused("fit", *tiny, *LEAKING, "--run", "a", status=1)
    assert "LEAKS" in line and "--allow-noncausal" in line and "QATTN_DEBUG" not in line
    assert not Path("runs").exists()


def test_the_report_comes_before_the_error(tiny, capsys):
    assert cli.main(["fit", *tiny, *LEAKING]) == 1
    captured = capsys.readouterr()
    *report, error = captured.err.splitlines()
    assert captured.out == "" and error.startswith("qattn: error: ")
    assert len(report) > 1 and any("LEAKS" in line for line in report) and "qattn: error" not in "".join(report)
    training = pytest.raises(RuntimeError, TrainingCLI, "fit", [*tiny, *LEAKING])
    leak = training.value.certificate["leak"]
    for part in (leak["layer"], str(leak["output"]), str(leak["input"]), f"{leak['size']:.1e}"):
        assert part in error


def test_a_dry_run_stops_too(refused, tiny):
    assert "LEAKS" in refused("fit", *tiny, *LEAKING, "--trainer.fast_dev_run", "true", status=1)


def test_a_run_that_is_replaced_stays_where_its_successor_leaks(fit, refused, tiny):
    assert fit("--run", "a", "--trainer.max_steps", "3") == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    refused("fit", *tiny, *LEAKING, "--run", "a", "--overwrite", status=1)
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_a_leak_that_is_found_at_the_end(refused, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", opens_at(10))
        line = refused("fit", *tiny, "--run", "a", status=1)
    assert "LEAKS" in line and "after training" in line
    last = read_checkpoint(LAST)
    assert last["global_step"] == 15 and last["causality"]["verdict"] == "LEAKS"
    assert verdict(BEST) == "LEAKS"
    assert_every_row_is_labelled()
    assert LanguageModel.load_from_checkpoint(LAST).label == "LEAKS"
    line = refused("fit", *tiny, "--run", "a", "--ckpt_path", "last", "--trainer.max_steps", "20", status=1)
    assert "LEAKS" in line and read_checkpoint(LAST)["global_step"] == 15


def test_a_leak_that_is_found_at_the_end_and_allowed(fit, monkeypatch, capsys):
    monkeypatch.setattr(LanguageModel, "training_step", opens_at(10))
    assert fit("--run", "a", "--allow-noncausal") == 0
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("qattn: LEAKS: step 15")
    assert verdict(LAST) == verdict(BEST) == "LEAKS"
    assert_every_row_is_labelled()


# --- it is better than the best ---------------------------------------------------------------------------------

MARKOV = ["--data.corpus", "markov:order=2,symbols=4,seed=3,length=20001", "--data.eval_windows", "70"]


@pytest.fixture
def sees_in_single_precision(monkeypatch):
    """The model knows each next token but the last, and only in the precision that no certificate is made in."""
    own = GPT.forward

    def forward(gpt, tokens, *args, **options):
        logits = own(gpt, tokens, *args, **options)
        if logits.dtype == torch.float32:
            future = torch.nn.functional.one_hot(tokens[:, 1:], logits.shape[2])
            logits = logits + torch.nn.functional.pad(9.0 * future, (0, 0, 0, 1))
        return logits

    def plant():
        monkeypatch.setattr(GPT, "forward", forward)

    return plant


def test_a_loss_below_the_optimum_stops_the_run(refused, tiny, sees_in_single_precision):
    sees_in_single_precision()
    line = refused("fit", *tiny, *MARKOV, "--run", "a", status=1)
    assert line.startswith("LEAKS: classical GPT LEAKS: val_loss is ") and "found in validation only" in line
    assert "below the least that a causal model can have" in line
    last = read_checkpoint(LAST)
    assert last["global_step"] == 4 and verdict(LAST) == verdict(BEST) == "LEAKS"
    assert "val_loss is " in last["causality"]["reason"]
    assert_every_row_is_labelled()
    assert LanguageModel.load_from_checkpoint(LAST).label == "LEAKS"
    line = refused("fit", *tiny, *MARKOV, "--run", "a", "--ckpt_path", "last", status=1)
    assert "LEAKS: val_loss is" in line and read_checkpoint(LAST)["global_step"] == 4


def test_a_loss_below_the_optimum_that_is_allowed(fit, capsys, sees_in_single_precision):
    sees_in_single_precision()
    assert fit(*MARKOV, "--run", "a", "--allow-noncausal") == 0
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("qattn: LEAKS: step 15") and verdict(LAST) == verdict(BEST) == "LEAKS"
    assert_every_row_is_labelled()


def test_a_loss_below_the_optimum_of_a_checkpoint(fit, capsys, sees_in_single_precision):
    assert fit(*MARKOV, "--run", "a", "--trainer.max_steps", "5") == 0
    assert verdict(LAST) == "causal"
    before = Path(LAST).read_bytes()
    sees_in_single_precision()
    for command, stage in (("validate", "val"), ("test", "test")):
        capsys.readouterr()
        assert cli.main([command, "--ckpt_path", "runs/a"]) == 1
        captured = capsys.readouterr()
        title, *_ = captured.out.split("┏")
        assert title.count("LEAKS") == 2 and f"{stage}_excess_error" in captured.out
        *_, error = captured.err.splitlines()
        assert error.startswith("qattn: error: ") and f"classical GPT LEAKS: {stage}_loss is " in error
    assert Path(LAST).read_bytes() == before


# --- it is allowed ----------------------------------------------------------------------------------------------


@pytest.fixture
def leaking(fit, capsys):
    """A run of a leaking model, and what was said."""
    assert fit("--run", "a", "--watch", "maps", *ALLOWED) == 0
    return capsys.readouterr().err


def test_every_line_of_the_run_says_so(leaking):
    report = leaking.index("qattn: LEAKS: classical GPT")
    lines = [line for line in leaking[report:].splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("qattn: ") or "step " in line]
    assert len(said) >= 5 and all("LEAKS" in line for line in said)


def test_the_files_of_the_run_say_so(leaking):
    assert_every_row_is_labelled()
    assert verdict(LAST) == verdict(BEST) == "LEAKS"
    board = EventAccumulator("runs/a/tensorboard")
    board.Reload()
    tags = [tag for kind in ("scalars", "images") for tag in board.Tags()[kind]]
    assert len(tags) > 5 and "LEAKS-attention_maps" in tags
    assert all(tag.startswith("LEAKS-") for tag in tags if tag != "epoch" and not tag.startswith("hp_metric"))
    assert yaml.safe_load(Path("runs/a/config.yaml").read_text())["allow_noncausal"] is True


def test_the_rows_stay_the_same_but_for_the_label(leaking, fit, monkeypatch):
    for name in ("on_fit_start", "on_train_end", "check"):
        monkeypatch.setattr(CausalityGuard, name, lambda *args: None)
    assert fit("--run", "b", "--watch", "maps", *LEAKING) == 0
    without = rows(run="b")
    assert [{**row, "causality": "LEAKS"} | changing for row in without] == [row | changing for row in rows()]


changing = {"train_characters_per_second": ""}


def test_the_pictures_of_the_run_say_so(fit, monkeypatch):
    headings, draw = [], report._png
    monkeypatch.setattr(report, "_png", lambda figure: headings.append(figure.get_suptitle()) or draw(figure))
    assert fit("--run", "a", "--watch", "maps", *ALLOWED) == 0
    assert headings == ["LEAKS: attention_maps"] * 3
    assert fit("--run", "b", "--watch", "maps") == 0
    assert headings[3:] == [""] * 3


def test_what_reads_the_checkpoint_says_so(leaking, capsys):
    for command in ("validate", "test"):
        assert cli.main([command, "--ckpt_path", "runs/a"]) == 0
        captured = capsys.readouterr()
        title, *_ = captured.out.split("┏")
        assert title.count("LEAKS") == 2 and "qattn: LEAKS: " in captured.err
    assert cli.main(["predict", "--ckpt_path", "runs/a"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] and "LEAKS" not in captured.out
    assert captured.err.startswith("qattn: LEAKS: the model of runs/a")
    assert cli.main(["generate", "--checkpoint", "runs/a", "--prompt", "the", "--max_new_tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("the") and captured.err.startswith("qattn: LEAKS: the model of runs/a sees")


def test_the_config_of_the_run_makes_it_again(leaking, refused, capsys):
    assert cli.main(["fit", "--config", "runs/a/config.yaml", "--run", "b"]) == 0
    assert rows()[0]["train_loss"] == rows(run="b")[0]["train_loss"]
    arguments = ["--config", "runs/a/config.yaml", "--run", "c", "--allow_noncausal", "false"]
    refused("fit", *arguments, status=1)
    assert not Path("runs/c").exists()


@pytest.mark.parametrize("option", ["--allow-noncausal", "--allow_noncausal", "--allow-noncausal=true"])
def test_a_continued_run_is_to_be_allowed_again(leaking, fit, refused, tiny, option, capsys):
    longer = [*LEAKING, "--watch", "maps", "--run", "a", "--ckpt_path", "last", "--trainer.max_steps", "20"]
    before = Path(LAST).read_bytes()
    assert "--allow-noncausal" in refused("fit", *tiny, *longer, status=1)
    assert Path(LAST).read_bytes() == before
    assert fit(*longer, option) == 0
    assert_every_row_is_labelled()
    assert [row["step"] for row in rows() if row["train_loss"]] == [str(step) for step in range(20)]


def test_a_label_stays_whatever_a_later_certificate_says(leaking, fit, refused, tiny, capsys, monkeypatch):
    """As of a leak that depends on the weights."""
    content = read_checkpoint(LAST)
    content["hyper_parameters"]["attention"]["is_causal"] = True
    torch.save(content, "closed.ckpt")
    onwards = ["--watch", "maps", "--run", "b", "--ckpt_path", "closed.ckpt", "--trainer.max_steps", "18"]
    assert "LEAKS" in refused("fit", *tiny, *onwards, status=1)
    assert not Path("runs/b").exists()
    assert fit(*onwards, "--allow-noncausal") == 0
    assert verdict("runs/b/checkpoints/last.ckpt") == "LEAKS"
    assert {row["causality"] for row in rows(run="b")} == {"LEAKS"}


def test_an_error_says_so(leaking, tiny, capsys, monkeypatch):
    def diverges(model, batch, batch_idx):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(LanguageModel, "training_step", diverges)
    assert cli.main(["fit", *tiny, *ALLOWED, "--run", "b"]) == 1
    assert capsys.readouterr().err.endswith("qattn: error: LEAKS: the loss is nan\n")


def test_a_published_mechanism(fit, refused, tiny, capsys):
    published = ["--model.attention", "qisa-published", "--run", "a", "--trainer.max_steps", "2"]
    assert "qisa-published GPT LEAKS: in blocks.0.attention" in refused("fit", *tiny, *published, status=1)
    assert fit(*published, "--allow-noncausal") == 0
    assert LanguageModel.load_from_checkpoint(LAST).label == verdict(LAST) == "LEAKS"
    capsys.readouterr()
    assert cli.main(["generate", "--checkpoint", LAST, "--prompt", "the", "--max_new_tokens", "9"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out) == 13 and "qattn: LEAKS" in captured.err


# --- of circuits ------------------------------------------------------------------------------------------------


def test_what_looks_at_circuits_says_so(fit, capsys, monkeypatch):
    headings, draw = [], noise_report._png
    monkeypatch.setattr(noise_report, "_png", lambda figure: headings.append(figure.get_suptitle()) or draw(figure))
    small = ["--model.attention", "qisa", *ALLOWED, "--trainer.max_steps", "2"]
    assert fit("--run", "a", *small) == 0
    commands = {
        "draw": ["--checkpoint", "runs/a", "--output", "circuit.svg"],
        "resources": ["--checkpoint", "runs/a"],
        "export-qasm": ["--checkpoint", "runs/a", "--text", "the"],
        "export-hf": ["--checkpoint", "runs/a", "--output", "hf"],
        "cross-check": "--checkpoint runs/a --steps 1 --windows 1 --gradients default.qubit:backprop "
        "--evaluate_on default.mixed".split(),
        "noise-sweep": "--checkpoint runs/a --windows 1 --repetitions 2 --shots 3 7 --depolarizing 0.1 "
        "--amplitude_damping --readout --output sweep".split(),
    }
    for command, arguments in commands.items():
        capsys.readouterr()
        assert cli.main([command, *arguments]) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        assert "qattn: LEAKS: the model of runs/a" in captured.err, command
        assert "LEAKS: " in captured.out, command
        if command in ("cross-check", "noise-sweep"):
            assert captured.out.count("LEAKS: ") == 3, command
    assert "<!-- LEAKS -->" in Path("circuit.svg").read_text() and headings == ["LEAKS"]
    assert all(path.read_text().count("LEAKS") for path in Path("qasm").iterdir())
    assert Path("hf/README.md").read_text().count("LEAKS") == 2  # in the title, and as the verdict
    with open("sweep/noise_sweep.csv", newline="") as file:
        assert {row["causality"] for row in csv.DictReader(file)} == {"LEAKS"}
    assert json.loads(Path("sweep/noise_sweep.json").read_text())["causality"] == "LEAKS"
    done = Path("sweep/noise_sweep.csv").read_bytes()
    assert cli.main(["noise-sweep", *commands["noise-sweep"]]) == 0  # nothing is left to do
    assert Path("sweep/noise_sweep.csv").read_bytes() == done


# --- a causal model is left alone -------------------------------------------------------------------------------


def test_a_causal_run_is_as_before(fit, capsys, monkeypatch):
    assert fit("--run", "a", "--allow-noncausal") == 0
    assert cli.main(["validate", "--ckpt_path", "runs/a"]) == 0
    captured = capsys.readouterr()
    assert "LEAKS" not in captured.out + captured.err and "caus" not in captured.out + captured.err
    assert verdict(LAST) == "causal" and LanguageModel.load_from_checkpoint(LAST).label == ""
    for name in ("metrics.csv", "val_cross_entropy_per_position.csv"):
        assert "causality" not in rows(name)[0]


@pytest.mark.parametrize("attention", ["classical", "qisa"])
def test_the_guard_touches_neither_weights_nor_random_states(fit, monkeypatch, attention):
    options = ["--model.attention", attention, "--model.dropout", "0.3", "--trainer.max_steps", "9"]
    assert fit("--run", "a", *options) == 0
    for name in ("on_fit_start", "on_train_end", "check"):
        monkeypatch.setattr(CausalityGuard, name, lambda *args: None)
    assert fit("--run", "b", *options) == 0
    guarded, plain = (read_checkpoint(f"runs/{run}/checkpoints/last.ckpt") for run in "ab")
    assert "causality" not in plain
    for key, value in plain["state_dict"].items():
        assert torch.equal(value, guarded["state_dict"][key]), key
    (state,), (other,) = (content["callbacks"]["RandomState"]["processes"] for content in (guarded, plain))
    # Python's own is drawn from by beartype, which checks annotations in tests.
    assert torch.equal(state["torch"], other["torch"]) and state["numpy"] == other["numpy"]
    assert [row | changing for row in rows(run="a")] == [row | changing for row in rows(run="b")]


def test_a_run_continued_under_the_guard_is_the_whole_run(fit):
    assert fit("--run", "whole") == 0
    assert fit("--run", "a", "--trainer.max_steps", "7", "--model.schedule_steps", "15") == 0
    assert fit("--run", "a", "--ckpt_path", "last", "--model.schedule_steps", "15") == 0
    whole, parts = (read_checkpoint(path)["state_dict"] for path in ("runs/whole/checkpoints/last.ckpt", LAST))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
