import math

import lightning as L
import pytest
import torch
from torch import nn

from lightning_modules import progress
from lightning_modules.progress import Pace, PlainProgress, duration

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


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
