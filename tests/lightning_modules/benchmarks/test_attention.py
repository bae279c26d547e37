"""Every mechanism against classical attention, on tiny sizes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lightning_modules.benchmarks import attention, memory
from lightning_modules.benchmarks.memory import Peak
from lightning_modules.benchmarks.models import Setup
from lightning_modules.benchmarks.options import variant
from lightning_modules.benchmarks.result import Result
from lightning_modules.gpt import GPT, preset
from lightning_modules.timing import activation_bytes
from pennylane_qattn import ATTENTION, Attention

TINY = ("attention", "--batch", "3", "--rounds", "2", "--num_layers", "1", "--embed_dim", "4", "--length", "5")
NAME = "attention-qisa-16-length-5-embed_dim-4-num_layers-1"


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    """Peak memory by a table, as starting a process takes seconds."""
    peaks = {"classical": (Peak(1000, 7 * 2**20), ""), "gaussian": (Peak(1500, 9500), ""), "qisa": (None, "not here")}
    monkeypatch.setattr(attention, "peak_bytes", lambda setup: peaks.get(setup.mechanism.name, (Peak(2000, 9000), "")))


def test_ratios_of_every_round(run):
    mechanisms = ("classical", "gaussian:values=quadratic", "qisa")
    status, out, err = run(*TINY, "--mechanisms", *mechanisms, "--target", "qisa", "inference", "1000000")
    assert (status, err) == (0, "")
    result = Result.read(run.folder / f"{NAME}.json")
    assert (run.folder / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    assert [row["mechanism"] for row in result.rows] == list(mechanisms)
    for row in result.rows:
        for kind in ("inference", "training"):
            assert len(row[kind]) == 2 and min(row[kind]) > 0
    classical, gaussian, qisa = result.rows
    assert classical["inference"] != [1.0, 1.0]  # a second model, not the first one by itself
    assert (classical["peak"], gaussian["peak"], qisa["peak"]) == (1.0, 1.5, None)
    assert gaussian["peak_bytes"] == 1500 and "not here" in result.notes
    assert (gaussian["whole_bytes"], qisa["whole_bytes"]) == (9500, None)
    assert any("7.0 MiB of memory in all" in note for note in result.notes)
    config = preset("qisa-16", num_layers=1, embed_dim=4, block_size=5)
    setup = Setup(config, ATTENTION.build("qisa"), 3)
    kept = activation_bytes(setup.model(), setup.tokens())
    assert qisa["activation_bytes"] == kept
    assert qisa["activations"] == kept / classical["activation_bytes"]
    assert qisa["parameters"] == sum(p.numel() for p in setup.model().parameters())
    assert "1 layer, 1 head, width 4, 5 tokens, batch 3, float32" in out and "at most 1e+06: reached" in out
    assert (
        result.command.startswith("python scripts/benchmark.py attention --batch 3 ") and "output" not in result.command
    )


def test_the_mechanism_and_classical_attention_take_turns(run, monkeypatch):
    timed = []

    def record(kind):
        return lambda model, *_: timed.append((kind, type(model.blocks[0].attention.score).__name__))

    monkeypatch.setattr(attention, "inference", record("inference"))
    monkeypatch.setattr(attention, "training_step", record("training"))
    assert run(*TINY, "--mechanisms", "gaussian")[0] == 0
    turns = ["ScaledDotScore", "GaussianScore"] * 3  # once to warm up
    assert timed == [(kind, name) for kind in ("inference", "training") for name in turns]


def test_published_forms_are_labelled(run):
    status, out, _ = run(*TINY, "--mechanisms", "qsann", "--published", "--rounds", "1")
    assert status == 0
    result = Result.read(run.folder / f"{NAME}.json")
    assert [row["mechanism"] for row in result.rows][:2] == ["qsann", "LEAKS: qisa-published"]
    assert len(result.rows) == 5
    assert "LEAKS: the published form" in out


def test_bfloat16(run):
    status, out, _ = run(*TINY, "--mechanisms", "gaussian", "qisa", "--dtype", "bfloat16", "--rounds", "1")
    assert status == 0 and "bfloat16" in out
    assert (run.folder / f"{NAME}-bfloat16.json").exists()
    for dtype in ("bfloat16", "float32"):
        setup = Setup(preset("qisa-16", num_layers=1), ATTENTION.build("gaussian"), 2, dtype=dtype)
        with setup.precision():
            assert str(setup.model()(setup.tokens()[:, :-1]).dtype) == f"torch.{dtype}"


class Zeros(Attention):
    def forward(self, x, **context):
        return 0 * super().forward(x, **context)


class Wider(Attention):
    def forward(self, x, **context):
        return super().forward(x, **context).repeat(1, 1, 2)


@pytest.mark.parametrize("planted, message", [(Zeros, "does not attend"), (Wider, "does not run on the tokens")])
def test_another_kind_of_result_ends_the_run(run, plant, planted, message, monkeypatch):
    monkeypatch.setattr(attention, "interleaved_seconds", None)  # the fault is found before anything is timed
    status, out, err = run(*TINY, "--mechanisms", "classical", plant(planted))
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith(f"benchmark.py: error: planted {message}")
    assert list(run.folder.iterdir()) == []


def test_a_baseline_that_is_not_fused_ends_the_run(run, monkeypatch):
    monkeypatch.setattr("pennylane_qattn.ScaledDotScore.is_dot_product", False)
    status, _, err = run(*TINY, "--mechanisms", "gaussian")
    assert status == 1 and "torch's fused kernels" in err


# --- compiled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda logits: 1.01 * logits, "the logits differ by "),
        (
            lambda logits: logits + 0.5 * (logits - logits.detach()),
            "the gradient of token_embedding.weight differs by ",
        ),
    ],
)
def test_a_compiled_model_that_does_otherwise_ends_the_run(run, monkeypatch, fault, message):
    def compile(self, mode):
        if type(self.blocks[0].attention.score).__name__ == "GaussianScore":
            self.register_forward_hook(lambda module, inputs, output: fault(output))

    monkeypatch.setattr(GPT, "compile", compile)
    status, _, err = run(*TINY, "--mechanisms", "classical", "gaussian", "--compile")
    assert status == 1 and err.startswith(f"benchmark.py: error: gaussian, compiled: {message}")
    assert "the model that is not compiled" in err and list(run.folder.iterdir()) == []


def test_a_compiled_model_that_does_the_same(run, monkeypatch):
    monkeypatch.setattr(GPT, "compile", lambda self, mode: None)
    status, _, err = run(*TINY, "--mechanisms", "gaussian", "--compile")
    assert (status, err) == (0, "")
    (path,) = run.folder.glob("*.json")
    assert path.stem == f"{NAME}-compiled-default"
    assert Result.read(path).title.endswith("5 tokens, batch 3, compiled by torch.compile(mode='default')")


# --- targets ----------------------------------------------------------------------------------------------------


def targets_at(preset_name: str, *names: str, dtype: str = "float32", **changes) -> dict:
    return attention.targets_of([variant(name) for name in names], preset(preset_name, **changes), dtype)


def times(name: str, inference: float, training: float) -> dict:
    return {(name, "peak"): 1.3, (name, "inference"): inference, (name, "training"): training}


def test_targets_come_with_a_size():
    for published in ("qisa-16", "qisa-128"):
        found = targets_at(published, "qisa", "gaussian", "overlap")
        assert found == times("qisa", 1.2, 1.5) | times("gaussian", 1.25, 1.25) | {("overlap", "peak"): 1.3}
    found = targets_at("gpt1", "qisa:split=true", "gaussian:values=linear", block_size=128)
    assert found == times("qisa:split=true", 1.0, 1.2) | times("gaussian:values=linear", 1.05, 1.05)
    assert targets_at("qisa-16", "gaussian", block_size=127) == {("gaussian", "peak"): 1.3}
    assert targets_at("qisa-16", "gaussian", block_size=128) == times("gaussian", 1.05, 1.05)


def test_what_has_no_target_of_time():
    others = ("qisa:ansatz=basic-entangler", "qisa:split=true", "gaussian:values=circuit", "classical")
    assert targets_at("qisa-16", *others) == {(name, "peak"): 1.3 for name in others}
    assert targets_at("qisa-16", "qisa", embed_dim=32) == {("qisa", "peak"): 1.3}
    assert targets_at("qisa-16", "qisa", dtype="bfloat16") == {("qisa", "peak"): 1.3}


@pytest.fixture
def published_size(monkeypatch):
    """The tiny size has the targets of a published one."""
    monkeypatch.setattr(attention, "PUBLISHED_SIZES", ((4, 1, 5),))


def bounds(result: Result, row: int) -> dict[str, str]:
    label = result.label(result.rows[row])
    return {column.key: column.target_text(result.rows[row], label) for column in result.columns if column.targets}


def test_targets_are_shown_unless_they_are_left_out(run, published_size):
    asked_for = ("--target", "gaussian", "peak", "2", "--target", "gaussian", "training", "1e6")
    for options, expected in (
        ([], {"inference": "at most 1.25", "training": "at most 1.25", "peak": "at most 1.3"}),
        (asked_for, {"inference": "at most 1.25", "training": "at most 1e+06", "peak": "at most 2"}),
        (["--no_targets", *asked_for], {"training": "at most 1e+06", "peak": "at most 2"}),
        (["--no_targets"], {}),
    ):
        status, out, err = run(*TINY, "--rounds", "1", "--mechanisms", "gaussian", "scaled-dot", *options)
        assert (status, err) == (0, "")
        result = Result.read(run.folder / f"{NAME}.json")
        assert {key: text.partition(":")[0] for key, text in bounds(result, 0).items()} == expected
        if not options:
            assert bounds(result, 0)["peak"] == "at most 1.3: not reached"  # 1500 over 1000
            assert bounds(result, 1)["peak"] == "at most 1.3: not reached"  # 2000
            assert bounds(result, 1)["inference"] == "–" and "target" in out


def test_what_is_replaced_stands_in_the_title(run):
    assert run(*TINY, "--rounds", "1", "--mechanisms", "gaussian")[0] == 0
    title = "Time and memory over classical attention, qisa-16: 1 layer, width 4, 5 tokens, batch 3"
    assert Result.read(run.folder / f"{NAME}.json").title == title


# --- memory -----------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not memory.CLEAR.exists(), reason="peak memory is read from Linux")


PEAKS = """
import json, torch
from lightning_modules.benchmarks import memory

mib = 2**20

def two_at_once_and_one_later():
    first, second = torch.ones(40 * mib, dtype=torch.uint8), torch.ones(24 * mib, dtype=torch.uint8)
    del first, second
    torch.ones(40 * mib, dtype=torch.uint8)

high = memory.peak_of_process(two_at_once_and_one_later)
low = memory.peak_of_process(lambda: torch.ones(10 * mib, dtype=torch.uint8))  # the peak of before is forgotten
print(json.dumps([high.rise / mib, low.rise / mib, (high.whole - low.whole) / mib]))
"""


@linux
def test_the_peak_is_what_was_there_at_once():
    # in a process of its own: here other tests' memory may be freed meanwhile
    environment = os.environ | memory.AT_ONCE
    run = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, timeout=200, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    high, low, difference = json.loads(run.stdout)
    assert high == pytest.approx(64, abs=4)
    assert low == pytest.approx(10, abs=4)
    assert difference == pytest.approx(54, abs=8)


@linux
def test_a_training_step_in_a_process_of_its_own():
    config = preset("qisa-16", num_layers=1)
    small, large = (Setup(config, ATTENTION.build("gaussian"), batch) for batch in (64, 1024))
    found, why_not = memory.peak_bytes(large)
    kept = activation_bytes(large.model(), large.tokens())
    assert why_not == "" and kept < found.rise < 6 * kept
    assert found.whole > found.rise + 50 * 2**20  # torch itself
    assert Setup.from_plain(json.loads(json.dumps(small.to_plain()))) == small


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    setup = Setup(preset("qisa-16"), ATTENTION.build("gaussian"), 1)
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nothing")
    assert memory.peak_bytes(setup) == (None, "peak memory on a CPU is measured on Linux alone")


@linux
def test_a_process_that_ends_otherwise(monkeypatch, tmp_path):
    setup = Setup(preset("qisa-16"), ATTENTION.build("gaussian"), 1)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(memory.sys, "executable", str(program))
    assert memory.peak_bytes(setup) == (None, "the process of gaussian was ended by signal 9")
    program.write_text("#!/bin/sh\necho one >&2\necho two >&2\nexit 3\n")
    with pytest.raises(RuntimeError, match="the process that measures memory failed: two"):
        memory.peak_bytes(setup)


def test_on_a_gpu_its_allocator_is_asked(monkeypatch):
    """The arithmetic, with the allocator's numbers made up."""
    monkeypatch.setattr(memory, "WARMED", 1)
    seen, step = [], memory.training_step

    def training_step(model, optimizer, tokens):
        seen.append(f"a step with {len(tokens)}")
        step(model, optimizer, tokens)

    monkeypatch.setattr(memory, "training_step", training_step)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: seen.append("before") or 300)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: seen.append("after") or 1000)
    setup = Setup(preset("qisa-16", num_layers=1), ATTENTION.build("classical"), 2)
    assert memory._peak_here(setup, memory._peak_on_gpu) == Peak(700, 1000)
    assert seen == ["a step with 1", "reset", "before", "a step with 2", "after"]
