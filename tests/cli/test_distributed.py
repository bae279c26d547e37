"""Runs of two processes on the CPU: the numbers of one process, files and words once, and no end in a hang.

Dropout is off where numbers are compared, as processes draw their own. Precision is double, so that two processes and
one differ in the order of sums alone.
"""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules import cli
from lightning_modules.checkpoints import read_checkpoint

ROOT = Path(__file__).parents[2]
EXACT = ["--trainer.precision", "64-true", "--model.dropout", "0"]
#: 23 windows, so that the processes share the last batch of an epoch as 4 and 3.
ODD = ["--data.stride", "19"]
TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
AS_TWO = ["--data.batch_size", "8"]
LAST = "runs/{}/checkpoints/last.ckpt"


def start(*arguments, program=("-m", "lightning_modules"), **environment):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *program, *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


def rows(name):
    with open(f"runs/{name}/metrics.csv") as file:
        found = list(csv.DictReader(file))
    for row in found:
        row.pop("train_characters_per_second")
    return found


def assert_same_run(name, other):
    one, two = rows(name), rows(other)
    assert len(one) == len(two) and one[0].keys() == two[0].keys()
    for first, second in zip(one, two, strict=True):
        for column, value in first.items():
            assert bool(value) == bool(second[column]), column
            if value:
                # Lightning hands some values to loggers in single precision
                assert float(second[column]) == pytest.approx(float(value), rel=1e-6, abs=1e-9, nan_ok=True), column
    weights, others = (read_checkpoint(LAST.format(run))["state_dict"] for run in (name, other))
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-9, atol=1e-9)


def files(name):
    folder = Path("runs", name)
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "events" not in p.name)


def test_two_processes_train_as_one(fit, tiny):
    """Uneven batches, a schedule by epochs, annealing, early stopping, watchers: all as in one process, told once."""
    options = [
        *(*EXACT, *ODD, "--trainer.max_steps", "-1", "--trainer.max_epochs", "5"),
        *("--model.attention", "grover", "--model.attention.temperature", "fixed"),
        *("--trainer.callbacks", "lightning_modules.annealing.AnnealTemperature", "--early_stopping", "2"),
        *("--watch", "entropy,maps"),
    ]
    assert fit(*options, *AS_TWO, "--run", "one") == 0
    status, out, error = run("fit", *tiny, *options, *TWO, "--run", "two")
    assert status == 0 and out == ""
    assert_same_run("one", "two")
    assert len([row for row in rows("two") if row["train_loss"]]) == 15  # of three batches in each epoch
    assert files("one") == files("two") and "attention_maps/step-000012.png" in files("two")
    assert len(list(Path("runs/two/tensorboard").glob("events*"))) == 1
    lines = error.splitlines()
    assert len(lines) == len(set(lines)) == 6, error
    assert "qattn: 2 processes, each with batches of 4 windows: 8 windows together" in lines
    assert lines[-1].startswith("qattn: step 15, lowest val_loss") and "Warning" not in error


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(fit, tiny, capsys, first):
    """From the middle of an epoch, from two processes to one and from one to two."""
    options = [*EXACT, *ODD, "--model.schedule_steps", "15"]
    begin, end = ["--trainer.max_steps", "7", "--run", "a"], ["--ckpt_path", "last", "--run", "a"]
    assert fit(*options, *AS_TWO, "--run", "whole") == 0
    on_one, on_two = (begin, end) if first == 1 else (end, begin)

    def two():
        assert run("fit", *tiny, *options, *TWO, *on_two)[0] == 0

    if first == 2:
        two()
    capsys.readouterr()
    assert fit(*options, *AS_TWO, *on_one) == 0
    said = capsys.readouterr().err
    assert ("qattn: goes on with 1 instead of 2 processes: dropout draws otherwise" in said) == (first == 2)
    if first == 1:
        two()
    assert_same_run("whole", "a")


def test_another_batch_together_is_refused(fit, refused, tiny):
    assert fit(*AS_TWO, "--run", "a", "--trainer.max_steps", "4") == 0
    line = refused("fit", *tiny, "--run", "a", "--ckpt_path", "last")  # as on one process instead of two
    assert "batch_size * processes was 8 in the checkpoint and is 4 now" in line


@pytest.mark.slow
def test_evaluation_and_prediction(fit, tiny, capsys):
    """Every window once, in the order of the text, and the same table."""
    assert fit(*EXACT, *ODD, *AS_TWO, "--run", "a", "--trainer.max_steps", "4") == 0
    capsys.readouterr()
    here = ["--ckpt_path", "runs/a", "--trainer.accelerator", "cpu", "--data.eval_windows", "7"]
    assert cli.main(["test", *here, "--data.batch_size", "2"]) == 0
    status, out, _ = run("test", *here, *TWO, "--data.batch_size", "2")
    assert status == 0 and out.split() == capsys.readouterr().out.split()
    assert cli.main(["predict", *here]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    status, _, _ = run("predict", *here, *TWO, "--data.batch_size", "1", "--output", "out.jsonl")
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert status == 0 and len(found) == len(expected)
    for row, window in zip(found, expected, strict=True):
        assert row.pop("log_likelihood") == pytest.approx(window.pop("log_likelihood"), rel=1e-5)
        assert row == window


# --- weights in parts -------------------------------------------------------------------------------------------

#: Lightning's strategy asks for GPUs, and torch frees on the way to the CPU what is there already; otherwise as it is.
ON_CPU = """
import torch
from lightning.pytorch.strategies import FSDPStrategy, fsdp
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig

def whole(module, world_size, rank0_only=True):
    options = {"offload_to_cpu": False, "rank0_only": rank0_only}
    kinds = FullStateDictConfig(**options), FullOptimStateDictConfig(**options)
    return FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *kinds)

fsdp._get_full_state_dict_context = whole

class OnCPU(FSDPStrategy):
    def _setup_model(self, model):
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)
        wrapped = [m.module for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
        if self.global_rank == 0:
            print([type(m).__name__ for m in wrapped], {p.ndim for p in model.parameters()}, flush=True)
        return model
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attention", ["qisa", "grover"])
def test_fully_sharded_weights_train_as_whole_ones(fit, tiny, attention):
    """Wrapping by the config's policy, tied weights, circuits, decay, clipping, certificate, and going on."""
    Path("on_cpu.py").write_text(ON_CPU)
    config = yaml.safe_load((ROOT / "configs" / "gpt1-fsdp.yaml").read_text())["trainer"]["strategy"]
    assert config["class_path"] == "lightning.pytorch.strategies.FSDPStrategy"
    Path("fsdp.yaml").write_text(yaml.dump({"trainer": {"strategy": {**config, "class_path": "on_cpu.OnCPU"}}}))
    options = [
        *("--model.preset", "gpt1-tiny", "--model.num_layers", "2", "--model.embed_dim", "6", *ODD),
        *("--model.attention", attention, "--model.num_heads", "2", "--model.dropout", "0"),
        *("--trainer.gradient_clip_val", "0.5", "--model.schedule_steps", "15", "--model.weight_decay", "0.5"),
    ]
    assert fit(*options, *AS_TWO, "--run", "one") == 0
    sharded = [
        "fit",
        *tiny,
        "--trust",
        "on_cpu",
        "--config",
        "fsdp.yaml",
        *options,
        "--trainer.devices",
        "2",
        "--run",
        "two",
    ]
    for end in (["--trainer.max_steps", "7"], ["--ckpt_path", "last"]):
        status, out, error = run(*sharded, *end, PYTHONPATH=f"{ROOT}:{Path.cwd()}")
        assert status == 0, error
        assert out.startswith("['LanguageModel', 'PostNormBlock', 'PostNormBlock'] {1}")
    one, two = rows("one"), rows("two")
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        for column in ("train_loss", "grad_norm", "val_loss", "learning_rate"):
            assert second[column] == first[column] or float(second[column]) == pytest.approx(float(first[column]), 1e-5)
    last, other = (read_checkpoint(LAST.format(name)) for name in ("one", "two"))
    assert last["causality"]["verdict"] == other["causality"]["verdict"]
    weights, others = last["state_dict"], other["state_dict"]
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-4, atol=1e-5)
    tied = others["gpt.head.weight"], others["gpt.token_embedding.weight"]
    assert torch.equal(*tied)


# --- started by others ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_starts_processes_as_the_page_says(tmp_path):
    text = (ROOT / "docs" / "several_machines.md").read_text().replace("\\\n", " ")
    (line,) = re.findall("^torchrun --standalone .*$", text, re.MULTILINE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    status, out, error = run(*shlex.split(line)[1:], program=["-m", "torch.distributed.run"])
    assert status == 0, error
    assert error.count("qattn: 2 processes, each with batches of 16 windows: 32 windows together") == 1
    assert error.count("qattn: step 3") == 1 and read_checkpoint(LAST.format("two-processes"))["global_step"] == 3


#: Starts two processes with what SLURM tells them, and gives the worst of their exit statuses.
SRUN = """#!{python}
import os, subprocess, sys
assert sys.argv[1:4] == ["--kill-on-bad-exit=1", "qattn", "fit"]
tasks = [dict(os.environ, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), SLURM_NODEID="0") for i in range(2)]
command = [sys.executable, *os.environ["PROGRAM"].split(), *sys.argv[3:]]
started = [subprocess.Popen(command, env=task) for task in tasks]
sys.exit(max(process.wait() for process in started))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> requeued
"""


@pytest.mark.slow
def test_the_script_for_slurm_goes_on_by_itself(tiny, tmp_path):
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    Path("failing.py").write_text(FAILING.format(process=1, what=signalled("SIGTERM")))
    Path("tiny.yaml").write_text("run: a\n")
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "31", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": "1"},
        **{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "CONFIG": "tiny.yaml", "RUN": "a"},
    }

    def submit(program):
        command = ["bash", str(ROOT / "scripts" / "train.slurm"), *tiny]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **job, "PROGRAM": program}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    done = submit("failing.py")
    assert done.returncode == 143 and STOPPED in done.stderr, done.stderr
    assert Path("requeued").read_text() == "requeue 31\n"
    assert submit("-m lightning_modules").returncode == 0
    assert read_checkpoint(LAST.format("a"))["global_step"] == 15
    assert Path("requeued").read_text() == "requeue 31\n"


# --- ends -------------------------------------------------------------------------------------------------------

#: Fails in a process, at a step; what Lightning starts as the other process is this file, too.
FAILING = """
import os, signal, sys
from lightning_modules import cli
from lightning_modules.language_model import LanguageModel
step = LanguageModel.training_step
def fails(model, batch, batch_idx):
    if (model.global_rank, model.global_step) == ({process}, 5):
        {what}
    return step(model, batch, batch_idx)
LanguageModel.training_step = fails
if __name__ == "__main__":
    sys.exit(cli.main())
"""
LOST = "another of the 2 processes has ended at step 5, which ends the run"
STOPPED = "qattn: error: stopped by SIGTERM at step 6; last checkpoint: runs/a/checkpoints/last.ckpt"


def signalled(name):
    return f"os.kill(os.getpid(), signal.{name})"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "what", "status", "errors"),
    [
        (1, "raise KeyError('mine')", 1, ["qattn: error: process 1: KeyError: 'mine'", f"qattn: error: {LOST}"]),
        (0, "raise KeyError('mine')", 1, ["qattn: error: KeyError: 'mine'"]),
        (1, "next(model.parameters()).data.fill_(float('nan'))", 1, ["qattn: error: the loss is nan at step 5"]),
        (1, signalled("SIGKILL"), 1, [f"qattn: error: {LOST}"]),
        (0, signalled("SIGKILL"), -signal.SIGKILL, [f"qattn: error: process 1: {LOST}"]),
        (1, signalled("SIGTERM"), 143, [STOPPED]),
        (0, signalled("SIGTERM"), 143, [STOPPED]),
    ],
)
def test_what_ends_one_process_ends_the_run(tiny, process, what, status, errors):
    Path("failing.py").write_text(FAILING.format(process=process, what=what))
    found, out, error = run("fit", *tiny, *TWO, "--run", "a", program=["failing.py"])
    assert found == status and out == "" and "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("qattn: error")]
    assert len(lines) == len(errors)
    assert all(line.startswith(wanted) for line, wanted in zip(lines, errors, strict=True))
    # Checkpoints are whole, and nothing else is left.
    assert read_checkpoint(LAST.format("a"))["global_step"] == (6 if "TERM" in what else 4)
    assert [path for path in Path("runs").rglob("*") if path.name.startswith(".")] == []
