"""Runs that are killed at any moment, and two runs in one folder."""

import csv
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_modules import cli
from lightning_modules.checkpoints import read_checkpoint
from lightning_modules.files import locked
from lightning_modules.training_cli import TrainingCLI

LAST = Path("runs/a/checkpoints/last.ckpt")


def life(arguments):
    """`qattn` in a process that is forked from this one, where all is imported."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with open("stderr.txt", "w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # _exit flushes nothing
            status = cli.main(arguments)
    finally:
        os._exit(status)


def ended(pid):
    """Its exit status; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(name):
    """All that a run leaves, but for times: weights, optimizer, progress, rows."""
    last, best = (read_checkpoint(f"runs/{name}/checkpoints/{kind}.ckpt") for kind in ("last", "best"))
    rows = []
    for table in ("metrics.csv", "val_cross_entropy_per_position.csv"):
        with open(f"runs/{name}/{table}") as file:
            rows += [
                {k: v for k, v in row.items() if k != "train_characters_per_second"} for row in csv.DictReader(file)
            ]
    return last, best, rows


def assert_same(first, second):
    for one, other in zip(first[:2], second[:2], strict=True):
        for part in ("state_dict", "optimizer_states", "global_step", "data"):
            same(one[part], other[part])
    assert first[2] == second[2]


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


def survive(tiny, kills, steps):
    """A run that is killed so many times, each time at a random moment of what it does, and continued; against the
    unbroken one."""
    options = [*tiny, "--checkpoint_every", "2", "--trainer.val_check_interval", "7", "--model.schedule", "constant"]
    assert cli.main(["fit", *options, "--run", "warm", "--trainer.max_steps", "2"]) == 0  # what is slow is loaded now
    seconds = []
    for run, length in (("start", 2), ("whole", steps)):
        begun = time.monotonic()
        assert ended(life(["fit", *options, "--run", run, "--trainer.max_steps", str(length)])) == 0
        seconds.append(time.monotonic() - begun)
    start, whole = seconds
    longest = start + 1.6 * (whole - start) / kills  # so that the kills are over before the run is
    rng, killed, reached = random.Random(7), 0, [0]
    while True:
        # what was killed ahead of its first checkpoint is begun again
        onwards = ["--ckpt_path", "last"] if LAST.is_file() else ["--overwrite"]
        pid = life(["fit", *options, "--run", "a", "--trainer.max_steps", str(steps), *onwards])
        if killed < kills:
            time.sleep(rng.uniform(0.02, longest))
            os.kill(pid, signal.SIGKILL)
        if (status := ended(pid)) != -signal.SIGKILL:
            assert status == 0, Path("stderr.txt").read_text()
            break
        killed += 1
        if LAST.is_file():
            reached.append(read_checkpoint(LAST)["global_step"])  # which is whole, whenever the kill came
    assert killed == kills and reached == sorted(reached) and reached[-1] < steps
    assert_same(outcome("a"), outcome("whole"))
    assert not [path for path in Path("runs/a").rglob(".*")]
    return reached


def test_three_kills(tiny):
    survive(tiny, kills=3, steps=45)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills(tiny):
    reached = survive(tiny, kills=50, steps=1500)
    assert len(set(reached)) > 20  # the kills came in many places


# --- two at once ------------------------------------------------------------------------------------------------


ANOTHER = "another process is writing to '{}'; wait for its end, or name another folder"


def contents():
    return {str(path): path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}


def test_the_second_of_two_runs_is_refused(fit, tiny, refused):
    steps = ["--trainer.max_steps", "40", "--checkpoint_every", "2", "--model.schedule", "constant"]
    assert fit(*steps, "--run", "whole") == 0
    pid = life(["fit", *tiny, *steps, "--run", "a"])
    while not LAST.is_file():
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    try:
        before = contents()
        for second in (["--ckpt_path", "last"], ["--overwrite"]):
            line = refused("fit", *tiny, *steps, "--run", "a", *second)
            assert line == ANOTHER.format(Path("runs/a").absolute())
        assert contents() == before
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
    assert_same(outcome("a"), outcome("whole"))
    assert fit(*steps, "--run", "a", "--overwrite") == 0


def test_of_two_runs_that_begin_at_once_one_goes_on(tiny):
    steps = ["--trainer.max_steps", "20"]
    first, second = (life(["fit", *tiny, *steps, "--run", "a"]) for _ in range(2))
    assert sorted((ended(first), ended(second))) == [0, 2]
    assert ended(life(["fit", *tiny, *steps, "--run", "whole"])) == 0
    assert_same(outcome("a"), outcome("whole"))


def test_a_run_does_not_go_on_from_what_another_has_changed(fit, tiny):
    assert fit("--run", "a", "--trainer.max_steps", "4") == 0
    late = TrainingCLI("fit", [*tiny, "--run", "a", "--ckpt_path", "last"])
    assert fit("--run", "a", "--overwrite", "--trainer.max_steps", "4") == 0
    before = contents()
    with pytest.raises(ValueError, match="another process has written to 'runs/a' since this one began"):
        late.fit()
    assert contents() == before


def test_what_a_kill_has_left_is_cleared(fit):
    assert fit("--run", "a", "--trainer.max_steps", "4") == 0
    for name in ("checkpoints/.last.ckpt.0123456789abcdef.part", ".metrics.csv.0123456789abcdef.part"):
        Path("runs/a", name).write_text("half")
    Path("runs/a/.mine.part").touch()
    assert fit("--run", "a", "--trainer.max_steps", "6", "--ckpt_path", "last") == 0
    assert [path.name for path in Path("runs/a").rglob(".*")] == [".mine.part"]


def test_a_lock_is_of_one_process_and_leaves_nothing(tmp_path):
    folder = tmp_path / "new" / "folder"
    with locked(folder):
        assert folder.is_dir()
        child = os.fork()  # as the workers of a loader are, which may live on for a while
        if not child:
            time.sleep(60)
            os._exit(0)
        with pytest.raises(ValueError, match="another process is writing to"), locked(folder):
            pass
    assert not (tmp_path / "new").exists()
    try:
        with locked(folder):
            (folder / "kept").touch()
        with locked(folder):
            pass
        assert (folder / "kept").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_locked_is_said(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("lightning_modules.files.fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .no locks available.; let no other run write there"):
        with locked(tmp_path):
            pass
