"""Options, exit status and what stands in the package: no benchmark has a way that users do not have."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import lightning_modules.benchmarks
from lightning_modules.benchmarks import machine
from lightning_modules.benchmarks.command import BENCHMARKS, command_line, main
from lightning_modules.benchmarks.models import Setup
from lightning_modules.benchmarks.options import mechanisms_of, variant
from lightning_modules.gpt import GPT, PRESETS, preset
from pennylane_qattn import ATTENTION, build_attention

SOURCES = sorted(Path(lightning_modules.benchmarks.__file__).parent.glob("*.py"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["attention", "--mechanisms", "nope"], "unknown attention 'nope'; choose from classical, "),
        (["attention", "--mechanisms", "qisa:depth=2"], "attention 'qisa' has no option 'depth'; its options: "),
        (["attention", "--mechanisms", "qisa:split"], "written option=value; got 'split'"),
        (["attention", "--mechanisms", "qisa:split=maybe"], "split must be true or false; got 'maybe'"),
        (["attention", "--mechanisms", "gaussian:values=cubic"], "values must be one of linear, "),
        (["attention", "--length", "1"], "must be at least 2, for a token to have a past; got 1"),
        (["scaling", "--lengths", "1", "2"], "must be at least 2, for a token to have a past; got 1"),
        (["grover", "--length", "1"], "must be at least 2, for a token to have a past; got 1"),
        (["attention", "--num_heads", "3"], "embed_dim must be divisible by num_heads; got 16 and 3"),
        (["attention", "--target", "qis", "inference", "2"], "a target is for one of the mechanisms "),
        (["attention", "--target", "qisa", "speed", "2"], "one of inference, training, peak, activations; got 'speed'"),
        (["attention", "--target", "qisa", "inference", "0"], "the target of qisa must be a number above 0; got 0"),
        (["generate", "--tokens", "256"], "tokens must be fewer than block=256, as a prompt comes first; got 256"),
        (["generate", "--mechanisms", "qisa-published"], "qisa-published has no key/value cache to be timed"),
        (["scaling", "--sweeps", "n", "--mechanisms", "classical"], "only mechanisms with circuits have qubits"),
        (["scaling", "--memory", "inf"], "must be a number above 0; got inf"),
        (["peers", "--pairs", "nope:adjoint"], "unknown device 'nope'; choose from default.mixed, "),
        (["peers", "--pairs", "default.qubit"], "the method of default.qubit must be one of backprop, "),
        (["peers", "--pairs", "lightning.qubit:backprop", "--features", "2"], "no backprop on lightning.qubit"),
        (["devices", "--pairs", "lightning.qubit:backprop"], "lightning.qubit has no backprop; use adjoint"),
        (["grover", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["grover", "--speed", "3"], "unknown option 'speed'"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "required: command"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark.py: error: ") and message in line


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_gpu_that_is_not_there(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([benchmark, "--device", "cuda"]) == 2
    error = "benchmark.py: error: there is no device 'cuda' on this machine; leave --device out, or give --device cpu\n"
    assert capsys.readouterr().err == error


def test_a_folder_that_cannot_be_written_to(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["grover", "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.endswith("choose another one with --output\n")


def test_an_error_of_the_program_itself(capsys, monkeypatch):
    def broken(device):
        raise KeyError("x")

    monkeypatch.setattr("lightning_modules.benchmarks.command.use_device", broken)
    assert main(["grover"]) == 1
    assert capsys.readouterr().err == "benchmark.py: error: KeyError: 'x' (QATTN_DEBUG=1 shows where)\n"


def test_threads_are_fixed_and_told(run):
    status, out, _ = run("grover", "--length", "3", "--keys", "5", "--kept", "2", "--rounds", "1", "--threads", "2")
    assert status == 0 and torch.get_num_threads() == 2
    assert "threads 2;" in out


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_one_thread_unless_told_otherwise(benchmark, capsys, monkeypatch, tmp_path):
    module = importlib.import_module(f"lightning_modules.benchmarks.{BENCHMARKS[benchmark][0]}")
    threads = []
    monkeypatch.setattr(module, "run", lambda options: threads.append(machine.describe("cpu")["threads"]) or [])
    torch.set_num_threads(3)
    assert main([benchmark, "--output", str(tmp_path)]) == 0 and threads == [1]
    with pytest.raises(SystemExit):
        main([benchmark, "--help"])
    assert "torch's threads (default: 1)" in " ".join(capsys.readouterr().out.split())


def test_the_command_is_kept_without_its_folder():
    line = "python scripts/benchmark.py attention --batch 2 --mechanisms 'a b'"
    for arguments in (
        ["--output", "/x", "--batch", "2"],
        ["--output=/x", "--batch", "2"],
        ["--batch", "2", "--output=y"],
    ):
        assert command_line(["attention", *arguments, "--mechanisms", "a b"]) == line


# --- mechanisms -------------------------------------------------------------------------------------------------


class Options:
    def __init__(self, mechanisms=None, published=False):
        self.mechanisms, self.published = mechanisms, published


def test_all_mechanisms_but_the_published_forms():
    chosen = [each.label for each in mechanisms_of(Options())]
    assert chosen == [name for name in ATTENTION if not name.endswith("-published")]
    assert {each.label for each in mechanisms_of(Options(published=True))} == set(ATTENTION)


def test_a_mechanism_that_is_registered_is_measured(plant):
    plant(build_attention("classical", 2, 1, 2).__class__, "new-here")
    assert "new-here" in [each.label for each in mechanisms_of(Options())]


def test_options_of_mechanisms():
    found = variant("qisa:split=true,head_dim=3,values=linear,ansatz=basic-entangler")
    expected = ATTENTION.build("qisa", split=True, head_dim=3, values="linear", ansatz="basic-entangler")
    assert found.mechanism == expected and found.label.startswith("qisa:split=true,")
    twice = [variant("qisa"), variant("qisa"), variant("qisa:seed=1")]
    assert [each.label for each in mechanisms_of(Options(twice))] == ["qisa", "qisa:seed=1"]


# --- no way of its own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ATTENTION if not name.endswith("-published")])
def test_what_is_timed_is_what_users_build(name):
    config = preset("qisa-16", num_layers=1)
    model = Setup(config, ATTENTION.build(name), 1).model()
    attention, own = model.blocks[0].attention, build_attention(name, 16, 1, 16)
    assert type(model) is GPT and repr(attention) == repr(own)
    assert [type(part) for part in attention.modules()] == [type(part) for part in own.modules()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_package_is_used_by_its_public_names(path):
    """Nothing of `pennylane_qattn` that begins with an underscore is imported, and nothing is set in its modules."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pennylane_qattn"):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]
            modules |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        set_in = [
            target.value.id for target in targets if isinstance(target, ast.Attribute) and hasattr(target.value, "id")
        ]
        assert not modules & set(set_in)


def test_every_preset_has_a_batch():
    from lightning_modules.benchmarks.attention import BATCHES

    assert set(BATCHES) == set(PRESETS)


# --- the machine ------------------------------------------------------------------------------------------------


def test_the_machine_in_words(monkeypatch):
    found = machine.describe("cpu")
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1
    assert found["torch"] == torch.__version__ and found["device"] == "CPU"
    assert all(isinstance(value, str | int) and value != "" for value in found.values())
    monkeypatch.setenv("QATTN_KERNELS", "0")
    assert machine.describe("cpu")["kernels"].startswith("not in use, ")
    monkeypatch.setattr(machine.kernels, "numba", None)
    found = machine.describe("cpu")
    assert found["kernels"] == "not in use, numba is not installed" and found["numba"] == "not installed"


@pytest.mark.parametrize(
    ("triton", "words"), [(None, "not in use, triton is not installed"), (1, "not in use, QATTN_K")]
)
def test_kernels_of_a_gpu_in_words(monkeypatch, triton, words):
    monkeypatch.setattr(machine.cuda_kernels, "triton", triton)
    monkeypatch.setattr(machine.cuda_kernels, "serve", lambda tensor: False)
    monkeypatch.setattr(machine.torch, "empty", lambda *size, device: None)
    assert machine.kernels_in_words("cuda").startswith(words)


def test_a_gpu_computes_in_float32_proper(monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(machine, "kernels_in_words", lambda device: "")
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        assert machine.describe("cuda")["TF32"] == "on"
        machine.use_device("cuda")
        assert not matmul.allow_tf32 and not cudnn.allow_tf32
        found = machine.describe("cuda")
        assert found["TF32"] == "off" and found["device"] == "a GPU"
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_every_benchmark_says_what_it_is():
    for module, _ in BENCHMARKS.values():
        loaded = __import__(f"lightning_modules.benchmarks.{module}", fromlist=["run"])
        assert loaded.__doc__ and inspect.signature(loaded.run).parameters.keys() == {"options"}
