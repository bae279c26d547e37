import math
import re
import time

import lightning as L
import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_modules import progress
from lightning_modules.progress import Pace, PlainProgress, duration

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture
def patience():
    """Here the lines are what is looked for."""


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89.0, "89 s"), (90.0, "2 min"), (3600.0, "60 min"), (5760.0, "1.6 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_what_is_left_goes_on_as_before(clock):
    pace = Pace(done=20)  # a run that goes on from step 20
    clock(30.0)
    assert pace.say(35, 50) == "30 s, about 30 s left"
    clock(30.0)
    assert pace.say(35, 80) == "60 s, about 3 min left"


@pytest.mark.parametrize(("done", "total"), [(50, 50), (20, 50), (30, math.inf)])
def test_nothing_is_left_or_known(clock, done, total):
    pace = Pace(done=20)
    clock(30.0)
    assert pace.say(done, total) == "30 s"


def test_it_is_due_every_ten_seconds(clock):
    pace = Pace()
    clock(9.0)
    assert not pace.is_due()
    clock(2.0)
    assert pace.is_due()
    pace.say(1, 2)
    assert not pace.is_due()


class Model(L.LightningModule):
    """A step takes six seconds."""

    def __init__(self, pass_by):
        super().__init__()
        self.layer, self.pass_by = nn.Linear(1, 1), pass_by

    def training_step(self, batch, batch_idx):
        self.pass_by(6.0)
        return self.layer(batch).sum()

    test_step = predict_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ValidatedModel(Model):
    validation_step = Model.training_step


@pytest.fixture
def trainer(tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(**quiet, callbacks=PlainProgress(), max_epochs=2, accelerator="cpu", default_root_dir=tmp_path)


DATA = torch.utils.data.DataLoader(torch.ones(5, 1))


def test_a_run_says_how_far_it_is(trainer, clock, capsys):
    trainer.fit(Model(clock), DATA)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 2/10 (12 s, about 48 s left)"
    assert lines[-1] == "step 10/10 (60 s)"
    assert len(lines) == 5  # every second step


@pytest.mark.parametrize(("call", "what"), [("validate", "validation"), ("test", "test"), ("predict", "prediction")])
def test_so_does_a_look_at_a_model(trainer, clock, capsys, call, what):
    getattr(trainer, call)(ValidatedModel(clock), DATA)
    lines = [line for line in capsys.readouterr().err.splitlines() if "batch" in line]
    assert lines == [f"{what}: batch 2/5 (12 s, about 18 s left)", f"{what}: batch 4/5 (24 s, about 6 s left)"]


def test_a_bar_that_is_disabled_is_silent(trainer, clock, capsys):
    trainer.progress_bar_callback.disable()
    trainer.fit(Model(clock), DATA)
    assert "step" not in capsys.readouterr().err


# --- outside of a Trainer ---------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch):
    """Lines and bars come at once, whatever the test that they are looked for in takes."""
    for name in ("EVERY", "LOOK", "PATIENCE"):
        monkeypatch.setattr(progress, name, 0.01)


def wait_for(text, capsys):
    """What stderr has said once the text is in it; stdout stays empty."""
    said = ""
    for _ in range(500):
        captured = capsys.readouterr()
        assert captured.out == ""
        said += captured.err
        if text in said:
            return said
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is not in {said!r}")


def test_steps_are_counted_where_no_terminal_is(hasty, capsys):
    said = []
    for step in progress.shown(["a", "b", "c"], "reading"):
        said.append((step, wait_for(f"reading: {len(said)}/3 (", capsys)))
    assert [step for step, _ in said] == ["a", "b", "c"]
    assert "left)" not in said[0][1] and re.search(r"^reading: 1/3 \(0 s, about 0 s left\)$", said[1][1], re.MULTILINE)
    assert not any("\x1b" in text for _, text in said)


def test_what_has_no_steps_says_how_long_it_takes(hasty, capsys):
    with progress.following("exporting"):
        assert re.search(r"^exporting: 0 s$", wait_for("exporting: ", capsys), re.MULTILINE)


def test_a_terminal_has_a_bar_that_goes(hasty, capsys, monkeypatch):
    monkeypatch.setattr(progress, "Console", lambda **options: Console(force_terminal=True, width=80, **options))
    for step in progress.shown(range(2), "reading [x]"):
        said = wait_for(f"{step}/2 (", capsys)
        assert "reading [x]" in said
    assert capsys.readouterr().err.endswith("\x1b[2K")  # the line is cleared


def test_steps_of_steps_and_other_processes_say_nothing(hasty, capsys, monkeypatch):
    with progress.following("outside"), progress.following("inside"):
        assert "inside" not in wait_for("outside", capsys)
    with progress.following("afterwards"):
        wait_for("afterwards", capsys)
    capsys.readouterr()
    monkeypatch.setattr(progress.rank_zero_only, "rank", 1)
    with progress.following("the second process"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_what_is_soon_done_says_nothing(capsys):
    assert list(progress.shown([1, 2], "adding")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_it(hasty, capsys):
    with pytest.raises(ZeroDivisionError), progress.following("dividing"):
        _ = 1 / 0
    with progress.counting("afterwards", 2) as count:
        count("whatever is handed over")
        wait_for("afterwards: 1/2", capsys)
