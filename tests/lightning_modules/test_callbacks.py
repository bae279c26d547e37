"""A run that is killed or interrupted, and continued, against the unbroken one: the same weights and records."""

import csv
import os
import random
import re
import signal
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from lightning_modules import callbacks
from lightning_modules.callbacks import (
    Interrupted,
    RandomState,
    RunCheckpoint,
    random_state,
    set_random_state,
)
from lightning_modules.checkpoints import PlainCheckpointIO, read_checkpoint
from lightning_modules.data import TextDataModule
from lightning_modules.language_model import LanguageModel
from lightning_modules.loggers import RunCSVLogger
from lightning_modules.progress import PlainProgress, RichProgress

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
STEPS = dict(max_steps=15, val_check_interval=4, check_val_every_n_epoch=None, log_every_n_steps=2)


class Killed(Exception):
    pass


class At(L.Callback):
    """Does something at the n-th call of a hook."""

    def __init__(self, hook, count, action):
        self.hook, self.count, self.action, self.calls = hook, count, action, 0

    def _called(self, hook, trainer):
        self.calls += hook == self.hook and not trainer.sanity_checking
        if hook == self.hook and self.calls == self.count and not trainer.sanity_checking:
            self.action()


def _hook(name):
    return lambda self, trainer, *args, **kwargs: self._called(name, trainer)


HOOKS = (
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
)
for name in HOOKS:
    setattr(At, name, _hook(name))


def kill():
    raise Killed


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def run(tmp_path):
    """Trains a tiny model with dropout in a folder of its own, or continues it; epochs of six batches."""
    (tmp_path / "text.txt").write_text(TEXT)

    def run(name, at=None, resume=None, every=3, data=None, model=None, **options):
        folder = tmp_path / name
        L.seed_everything(0, verbose=False)
        options = {**STEPS, **options}
        split = dict(block_size=5, batch_size=4, eval_windows=7, shuffle="epoch", stride=18)
        module = TextDataModule(str(tmp_path / "text.txt"), **{**split, **(data or {})})
        sizes = dict(num_layers=1, embed_dim=4, block_size=5, dropout=0.3, warmup_steps=4)
        model = LanguageModel(module.tokenizer, attention="classical", **{**sizes, **(model or {})})
        file = folder / "checkpoints" / f"{resume}.ckpt"
        trainer = L.Trainer(
            **options,
            accelerator="cpu",
            plugins=[PlainCheckpointIO()],
            logger=RunCSVLogger(folder, read_checkpoint(file)["global_step"] if resume else None),
            callbacks=[RandomState(), RunCheckpoint(folder / "checkpoints", every), *([at] if at else [])],
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=module, ckpt_path=file if resume else None)
        return model

    return run


def record(tmp_path, name):
    """All that a run leaves: logged values, but for the speed, and what is in its checkpoints."""
    tables = {}
    for file in sorted((tmp_path / name).glob("*.csv")):
        with file.open() as lines:
            tables[file.name] = list(csv.DictReader(lines))
    for row in tables["metrics.csv"]:
        row.pop("train_characters_per_second")
    best = tmp_path / name / "checkpoints" / "best.ckpt"
    weights = read_checkpoint(best)["state_dict"] if best.exists() else {}
    return tables, {key: tensor.tolist() for key, tensor in weights.items()}


def assert_same(tmp_path, first, second, model, other):
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    assert record(tmp_path, first) == record(tmp_path, second)


VARIANTS = {
    "steps": {},
    "random windows": {"data": dict(shuffle="windows", stride=1, samples_per_epoch=24)},
    "epochs": dict(max_steps=-1, max_epochs=3, val_check_interval=1.0, check_val_every_n_epoch=1, log_every_n_steps=1),
    "accumulated": dict(
        max_steps=-1, max_epochs=4, accumulate_grad_batches=4, val_check_interval=3, log_every_n_steps=1
    ),
    "no validation": dict(limit_val_batches=0),
    "every step": {"every": 1},
    "workers": {"data": dict(num_workers=1)},
}
# In the middle of an epoch, at its ends, around validation, and where Lightning itself would lose something.
MOMENTS = [
    ("steps", "on_train_batch_start", 11),
    ("steps", "on_before_optimizer_step", 4),
    ("steps", "on_train_batch_end", 6),
    ("steps", "on_train_batch_end", 8),
    ("steps", "on_validation_batch_end", 1),
    ("steps", "on_validation_end", 2),
    ("steps", "on_train_epoch_end", 1),
    ("random windows", "on_train_batch_end", 10),
    ("epochs", "on_validation_batch_end", 2),
    ("epochs", "on_validation_end", 1),
    ("epochs", "on_train_epoch_end", 2),
    ("accumulated", "on_train_batch_end", 4),
    ("accumulated", "on_train_batch_end", 9),
    ("every step", "on_train_batch_end", 6),
    ("every step", "on_validation_batch_end", 3),
    ("no validation", "on_train_batch_end", 13),
]


@pytest.mark.parametrize("action", [kill, interrupt])
@pytest.mark.parametrize(("variant", "hook", "count"), MOMENTS)
def test_continued_run_is_the_unbroken_one(run, tmp_path, variant, hook, count, action):
    options = VARIANTS[variant]
    unbroken = run("unbroken", **options)
    with pytest.raises((Killed, Interrupted)):
        run("broken", At(hook, count, action), **options)
    at = read_checkpoint(tmp_path / "broken" / "checkpoints" / "last.ckpt")["global_step"]
    assert at < 15 and (at > 0 or action is kill)
    continued = run("broken", resume="last", **options)
    assert_same(tmp_path, "unbroken", "broken", unbroken, continued)


# A worker is forked from a process with threads, and ends with the run that is killed.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_batches_that_workers_had_fetched_are_not_lost(run, tmp_path):
    unbroken = run("unbroken", **VARIANTS["workers"])
    with pytest.raises(Killed):
        run("broken", At("on_train_batch_end", 9, kill), **VARIANTS["workers"])
    continued = run("broken", resume="last", **VARIANTS["workers"])
    assert_same(tmp_path, "unbroken", "broken", unbroken, continued)


def test_killed_again_and_again(run, tmp_path):
    unbroken = run("unbroken")
    rng, resume, kills = random.Random(1), None, 0
    while True:
        try:
            continued = run("broken", At(rng.choice(HOOKS[:3]), rng.randrange(2, 5), kill), resume=resume, every=1)
            break
        except Killed:
            kills += 1
            resume = "last" if (tmp_path / "broken" / "checkpoints" / "last.ckpt").exists() else None
    assert kills > 4
    assert_same(tmp_path, "unbroken", "broken", unbroken, continued)


def test_killed_before_the_best_checkpoint_has_its_name(run, tmp_path, monkeypatch):
    unbroken = run("unbroken", model={"learning_rate": 0.3})
    best = next(s for k, s in best_of(tmp_path, "unbroken")["callbacks"].items() if "RunCheckpoint" in k)["best_score"]
    name_best = RunCheckpoint._name_best

    def kill_at_the_best(self):
        kill() if self.best_score == best else name_best(self)

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "_name_best", kill_at_the_best)
        with pytest.raises(Killed):
            run("broken", model={"learning_rate": 0.3})
    assert_same(tmp_path, "unbroken", "broken", unbroken, run("broken", resume="last", model={"learning_rate": 0.3}))


def best_of(tmp_path, name):
    return read_checkpoint(tmp_path / name / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize("steps", [9, 12], ids=["mid-epoch", "end of an epoch"])
def test_a_finished_run_can_be_made_longer(run, tmp_path, steps):
    constant = {"schedule": "constant"}
    long = run("long", max_steps=20, model=constant)
    run("short", max_steps=steps, model=constant)
    assert_same(tmp_path, "long", "short", long, run("short", resume="last", max_steps=20, model=constant))


def test_a_finished_run_has_nothing_left_to_do(run, tmp_path):
    finished, before = run("a"), None
    before = record(tmp_path, "a")
    again = run("a", resume="last")
    assert all(torch.equal(p, q) for p, q in zip(finished.parameters(), again.parameters(), strict=True))
    assert record(tmp_path, "a") == before


def test_the_kill_matters(run):
    """The comparison above can fail: without the random states the continued run is another one."""
    unbroken = run("unbroken", max_steps=9)
    with pytest.raises(Killed):
        run("broken", At("on_train_batch_end", 8, kill), max_steps=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "set_random_state", lambda state: None)
        continued = run("broken", resume="last", max_steps=9)
    assert not torch.equal(unbroken.gpt.head.weight, continued.gpt.head.weight)


def test_validation_does_not_change_training(run, tmp_path):
    often, seldom = run("often", val_check_interval=1), run("seldom", val_check_interval=15)
    assert all(torch.equal(p, q) for p, q in zip(often.parameters(), seldom.parameters(), strict=True))


class NoisyValidation(LanguageModel):
    def validation_step(self, batch, batch_idx):
        torch.rand(3), random.random(), np.random.random()
        super().validation_step(batch, batch_idx)


def test_not_even_a_validation_that_draws(run, tmp_path, monkeypatch):
    quiet = run("quiet")
    monkeypatch.setitem(globals(), "LanguageModel", NoisyValidation)
    noisy = run("noisy")
    assert isinstance(noisy, NoisyValidation)
    assert all(torch.equal(p, q) for p, q in zip(quiet.parameters(), noisy.parameters(), strict=True))


# --- which files, when ------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Notes the step of both files at each batch."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_train_batch_end(self, trainer, *args):
        files = {name: self.folder / f"{name}.ckpt" for name in ("last", "best")}
        steps = {name: read_checkpoint(file)["global_step"] for name, file in files.items() if file.exists()}
        self.seen.append((trainer.global_step, steps.get("last"), steps.get("best")))


def test_last_every_so_many_steps_and_after_validation(run, tmp_path):
    watch = Watch(tmp_path / "a" / "checkpoints")
    run("a", watch, max_steps=8)
    # Seen at the end of the batch after the one that was saved: steps 0, 3, 4 (validation), 7.
    assert watch.seen[0] == (1, 0, None) and watch.seen[3] == (4, 3, None)
    assert watch.seen[4] == (5, 4, 4) and watch.seen[7] == (8, 7, 4)
    assert read_checkpoint(tmp_path / "a" / "checkpoints" / "last.ckpt")["global_step"] == 8


def test_best_is_the_one_with_the_lowest_validation_loss(run, tmp_path):
    run("a", val_check_interval=1, model={"learning_rate": 0.5, "warmup_steps": 0, "schedule": "constant"})
    tables, _ = record(tmp_path, "a")
    losses = [float(row["val_loss"]) for row in tables["metrics.csv"] if row["val_loss"]]
    best = read_checkpoint(tmp_path / "a" / "checkpoints" / "best.ckpt")
    assert best["global_step"] == 1 + int(np.argmin(losses)) < len(losses)
    state = next(s for key, s in best["callbacks"].items() if "RunCheckpoint" in key)
    assert state["best_score"] == pytest.approx(min(losses))


def test_a_file_system_without_hard_links(run, tmp_path, monkeypatch):
    expected = run("a", max_steps=4)

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    run("b", max_steps=4)
    best = read_checkpoint(tmp_path / "b" / "checkpoints" / "best.ckpt")
    assert torch.equal(best["state_dict"]["gpt.head.weight"], expected.gpt.head.weight)


def test_rows_of_a_torn_file(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("loss,step\n0.5,0\n0.25,1\n0.125,12\n0.1,1")
    logger = RunCSVLogger(folder, resume_step=2)
    assert (folder / "metrics.csv").read_text().endswith("0.1,1")  # untouched until there is something to write
    logger.log_metrics({"loss": 0.75}, 2)
    logger.log_metrics({"val_loss": 1.5}, 2)
    logger.save()
    assert (folder / "metrics.csv").read_text().split() == [
        "loss,step,val_loss",
        "0.5,0,",
        "0.25,1,",
        "0.75,2,",
        ",2,1.5",
    ]


def test_a_new_run_begins_a_new_file(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss,step\n0.5,0\n")
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["loss,step", "1.0,0"]


@pytest.mark.parametrize("fails_at", ["header", "rows"])
def test_rows_are_written_once_there_is_room_again(tmp_path, monkeypatch, fails_at):
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    logger.log_metrics({"loss": 0.5, "val_loss": 1.5}, 1)
    with monkeypatch.context() as patch:
        writerows, calls = csv.DictWriter.writerows, []

        def fails(self, rows):  # first of the file with the new header, then of what is appended
            writerows(self, rows)
            calls.append(rows)
            if len(calls) == (1 if fails_at == "header" else 2):
                raise OSError(28, "no room")

        patch.setattr(csv.DictWriter, "writerows", fails)
        with pytest.raises(OSError) as error:
            logger.save()
    assert error.value.filename == str(tmp_path / "metrics.csv")
    lines = (tmp_path / "metrics.csv").read_text().split()
    assert lines == (["loss,step", "1.0,0"] if fails_at == "header" else ["loss,step,val_loss", "1.0,0,"])
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["loss,step,val_loss", "1.0,0,", "0.5,1,1.5"]


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"learning_rate": 0.5}}, "optimisation.learning_rate is 0.003 in the checkpoint and 0.5 here"),
        ({"model": {"num_layers": 2}}, "gpt.num_layers is 1 in the checkpoint and 2 here"),
        ({"data": {"batch_size": 3}}, "batch_size"),
        ({"data": {"seed": 3}}, "seed"),
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches is 1 in the checkpoint and 2 here"),
        ({"limit_train_batches": 3}, "trainer.limit_train_batches"),
        ({"precision": "64-true"}, "trainer.precision is '32-true' in the checkpoint and '64-true' here"),
    ],
)
def test_continuing_with_something_else_is_refused(run, tmp_path, options, message):
    with pytest.raises(Killed):
        run("a", At("on_train_batch_end", 5, kill))
    files = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=message) as error:
        run("a", resume="last", **options)
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()} == files


def test_processes_draw_their_own_numbers_and_go_on_with_them(capsys):
    def begun(process, processes, saved=None):
        torch.manual_seed(5)
        own, trainer = RandomState(), SimpleNamespace(global_rank=process, world_size=processes)
        if saved is not None:
            own.load_state_dict({"processes": saved})
        own.on_train_start(trainer, None)
        own.on_train_batch_start(trainer, None)
        return own

    states = [begun(process, 3).state_dict()["processes"][0] for process in range(3)]
    draws = [torch.rand(7) for process in range(3) if begun(process, 3)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 3
    torch.manual_seed(5)
    assert torch.equal(draws[0], torch.rand(7))
    moved = [states[1], states[2]]
    for process in range(2):
        begun(process, 2, moved)
        assert torch.equal(torch.rand(7), draws[process + 1])
    assert capsys.readouterr().err == ""
    begun(2, 3, moved)  # which the checkpoint knows nothing of
    assert torch.equal(torch.rand(7), draws[2])
    assert capsys.readouterr().err == "qattn: goes on with 3 instead of 2 processes: dropout draws otherwise\n"


def test_saving_too_often_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every_n_train_steps must be at least 1; got 0"):
        RunCheckpoint(tmp_path, 0)


# --- random states, signals, progress ---------------------------------------------------------------------------


def draws():
    return (
        random.random(),
        np.random.random(),
        np.random.standard_normal(),
        torch.rand(2).tolist(),
        torch.randn(3).tolist(),
    )


def test_random_states_come_back_from_a_file(tmp_path):
    draws()
    random.gauss(0, 1)
    torch.save(random_state(), tmp_path / "state")
    expected = draws()
    assert draws() != expected
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draws() == expected


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_batch_finish_and_saves(run, tmp_path, capfd, signum, status):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as stop:
        run("a", At("on_before_optimizer_step", 5, lambda: os.kill(os.getpid(), signum)), every=100)
    assert stop.value.code == status
    assert str(stop.value).startswith(f"stopped by {signal.Signals(signum).name} at step 5; last checkpoint: ")
    assert read_checkpoint(tmp_path / "a" / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert signal.getsignal(signum) == before
    assert capfd.readouterr().err.count("stopping after this batch") == 1


def test_a_second_signal_ends_the_process_at_once(tmp_path, monkeypatch, capfd):
    done = []
    monkeypatch.setattr(callbacks.signal, "signal", lambda signum, action: done.append((signum, action)))
    monkeypatch.setattr(callbacks.signal, "raise_signal", lambda signum: done.append(signum))
    checkpoint = RunCheckpoint(tmp_path)
    checkpoint._on_signal(signal.SIGINT, None)
    assert done == [] and "once more to end at once" in capfd.readouterr().err
    checkpoint._on_signal(signal.SIGINT, None)
    assert done == [(signal.SIGINT, signal.SIG_DFL), signal.SIGINT]


def test_a_signal_in_the_last_validation_keeps_an_earlier_checkpoint(run, tmp_path):
    unbroken = run("unbroken", max_steps=8)
    with pytest.raises(Interrupted):
        run("broken", At("on_validation_batch_end", 2, interrupt), max_steps=8)
    assert read_checkpoint(tmp_path / "broken" / "checkpoints" / "last.ckpt")["global_step"] == 7
    assert_same(tmp_path, "unbroken", "broken", unbroken, run("broken", resume="last", max_steps=8))


def test_plain_progress_is_one_line_per_validation(run, capsys):
    run("a", PlainProgressWithoutBar(), max_steps=8)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 4/8", "step 8/8"]
    assert all("train_loss" in line and "val_loss" in line for line in lines)
    assert re.search(r" \(\d+ s, about \d+ s left\)$", lines[0]) and re.search(r" \(\d+ s\)$", lines[1])


class PlainProgressWithoutBar(L.Callback):
    """The callback under test, in a trainer that was told to have no bar."""

    def __init__(self):
        self.bar = PlainProgress()

    def setup(self, trainer, pl_module, stage):
        self.bar.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer, pl_module):
        self.bar.on_train_start(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.bar.on_validation_end(trainer, pl_module)


class TotalOfTheBar(L.Callback):
    def __init__(self):
        self.bar, self.totals = RichProgress(), []

    def on_train_epoch_start(self, trainer, pl_module):
        self.bar._trainer = trainer
        self.totals.append(self.bar.total_train_batches)


def test_rich_progress_knows_where_a_run_ends(run):
    totals = TotalOfTheBar()
    run("a", totals, max_steps=15)
    length = totals.totals[0]
    assert totals.totals == [length] * (15 // length) + [15 % length] * (15 % length > 0) and length < 15
