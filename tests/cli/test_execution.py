"""Circuits on devices from the command line: `model.execution.*` and `execution.*`."""

import csv
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.checkpoints import read_checkpoint
from lightning_modules.cli import Parser, main
from lightning_modules.execution_options import OPTIONS, add_execution_options, execution_of
from lightning_modules.executions import Executions
from lightning_modules.language_model import LanguageModel
from pennylane_qattn import Execution, Noise

#: One layer, two heads of 2 qubits each.
MODEL = """--model.attention qisa --model.num_layers 1 --model.num_heads 2 --model.embed_dim 6 --model.block_size 5
    --model.attention.split true --model.dropout 0 --data.batch_size 2 --data.eval_windows 7""".split()
PATHS = [("lightning.qubit", "adjoint"), ("default.qubit", "backprop"), ("default.qubit", "parameter-shift")]


def fit(folder, name, *options):
    arguments = ["fit", *MODEL, "--trainer.default_root_dir", str(folder), "--run", name, *options]
    assert main([*arguments, "--trainer.log_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0"]) == 0
    with open(folder / name / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(row["train_loss"]) for row in rows if row.get("train_loss")], folder / name


def on(device, method, group="model.execution"):
    options = {"executor": "qnode", "device": device, "diff_method": method}
    return [part for name, value in options.items() for part in (f"--{group}.{name}", value)]


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_qnodes_train_as_folded(tmp_path, precision, capsys):
    steps = ["--trainer.precision", precision, "--trainer.max_steps", "20", "--trainer.val_check_interval", "20"]
    losses, folder = fit(tmp_path, "folded", *steps)
    weights = read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]
    assert len(losses) == 20
    for device, method in PATHS:
        found, folder = fit(tmp_path, f"{device}-{method}", *steps, *on(device, method))
        assert f"QNodes on {device}, gradients by {method}" in capsys.readouterr().err
        state = read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]
        assert state.keys() == weights.keys()
        if precision == "64-true":
            assert found == pytest.approx(losses, rel=0, abs=1e-8)
            assert all(torch.allclose(state[name], weights[name], rtol=0, atol=1e-8) for name in weights)
        else:
            assert found == pytest.approx(losses, rel=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("execution"), "trained", "--trainer.max_steps", "3")[1]


def loss_of(output, name):
    return float(next(line for line in output.splitlines() if f"{name}_loss" in line).split("│")[2])


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_on_devices(run, capsys, command):
    arguments = [command, "--ckpt_path", str(run)]
    name = "val" if command == "validate" else "test"
    assert main(arguments) == 0
    printed = capsys.readouterr()
    folded = loss_of(printed.out, name)
    assert "executions" not in printed.err
    for device in ("lightning.qubit", "default.mixed", "default.qubit"):
        assert main([*arguments, *on(device, "auto")]) == 0
        printed = capsys.readouterr()
        assert loss_of(printed.out, name) == folded
        assert f"QNodes on {device}" in printed.err
        assert "executions" in printed.err
    assert main([*arguments, "--model.execution.shots", "3"]) == 0
    printed = capsys.readouterr()
    assert loss_of(printed.out, name) != folded
    assert "not folded, since folding gives exact values, not shots=3" in printed.err
    assert "at most" in printed.err
    noisy = ["--model.execution.device", "default.mixed", "--model.execution.noise.depolarizing", "0.3"]
    assert main([*arguments, *noisy]) == 0
    assert loss_of(capsys.readouterr().out, name) != folded


def test_predictions_and_text_on_a_device(run, capsys):
    assert main(["predict", "--ckpt_path", str(run)]) == 0
    folded = capsys.readouterr().out
    assert main(["predict", "--ckpt_path", str(run), *on("lightning.qubit", "adjoint")]) == 0
    texts = [line.partition('"log_likelihood"')[0] for line in folded.splitlines()]
    assert [line.partition('"log_likelihood"')[0] for line in capsys.readouterr().out.splitlines()] == texts
    arguments = ["generate", "--checkpoint", str(run), "--prompt", "The", "--max_new_tokens", "9"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    there = ["--execution.executor", "qnode", "--execution.device", "lightning.qubit"]
    assert main([*arguments, *there]) == 0
    printed = capsys.readouterr()
    assert printed.out == text
    assert "QNodes on lightning.qubit" in printed.err


def test_a_config_says_where(tmp_path, capsys):
    config = tmp_path / "where.yaml"
    config.write_text("""
model:
  execution:
    executor: qnode
    device: lightning.qubit
    device_options: {c_dtype: complex64}
    gradient_options: {h: 0.01}
    diff_method: finite-diff
""")
    fit(tmp_path, "where", "--config", str(config), "--trainer.max_steps", "1")
    assert "QNodes on lightning.qubit, gradients by finite-diff" in capsys.readouterr().err


def test_costs_are_said_first_and_limited(run, tmp_path, capsys):
    arguments = ["test", "--ckpt_path", str(run), "--model.execution.shots", "7"]
    assert main([*arguments, "--model.execution.max_executions", "11"]) == 1
    error = capsys.readouterr().err
    assert "max_executions is 11 and 0 are done" in error
    assert error.index("at most") < error.index("max_executions is")
    sampled = ["--model.execution.shots", "7", "--trainer.max_steps", "2", "--model.execution.diff_method", "spsa"]
    fit(tmp_path, "sampled", *sampled)
    said = capsys.readouterr().err
    assert "executions per training step" in said
    assert "for 2 steps" in said


def test_a_run_stopped_by_its_budget_is_continued(tmp_path, capsys):
    """A limit in the middle of training: what was done until the last checkpoint is kept."""
    steps = ["--trainer.max_steps", "4", "--checkpoint_every", "1", *on("default.qubit", "parameter-shift")]
    arguments = ["fit", *MODEL, "--trainer.default_root_dir", str(tmp_path), "--run", "r", *steps]
    arguments += ["--trainer.num_sanity_val_steps", "0"]
    assert main([*arguments, "--model.execution.max_executions", "700"]) == 1
    assert "max_executions" in capsys.readouterr().err
    assert 0 < read_checkpoint(tmp_path / "r/checkpoints/last.ckpt")["global_step"] < 4
    assert main([*arguments, "--ckpt_path", "last"]) == 0
    losses, folder = fit(tmp_path, "unbroken", *steps)
    broken, unbroken = (read_checkpoint(f / "checkpoints/last.ckpt")["state_dict"] for f in (tmp_path / "r", folder))
    assert all(torch.equal(broken[name], unbroken[name]) for name in broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["executor", "qnode", "device", "foo"], "unknown device 'foo'"),
        (["executor", "qnode", "device", "lightning.qubit", "diff_method", "backprop"], "has no backprop; use adjoint"),
        (["shots", "5", "diff_method", "adjoint"], "adjoint needs exact values, not shots=5; use parameter-shift"),
        (["executor", "folded", "shots", "5"], "folding gives exact values, not shots=5; use executor qnode"),
        (["noise.readout", "1.5"], "noise.readout is a probability"),
        (["noise.depolarizing", "0.1"], "default.qubit simulates no noise channels; use default.mixed"),
        (["shots", "0"], "shots must be an integer of at least 1; got 0"),
        (["executor", "nowhere"], "unknown executor 'nowhere'"),
        (["executor", "qnode", "device_options", "{wires: 1}"], "the circuit needs 2 wires; got wires=1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, run, capsys, options, message):
    pairs = list(zip(options[::2], options[1::2], strict=True))
    given = [part for name, value in pairs for part in (f"--model.execution.{name}", value)]
    for arguments in (
        ["fit", *MODEL, "--trainer.default_root_dir", str(tmp_path), "--run", "r"],
        ["test", "--ckpt_path", str(run)],
    ):
        assert main([*arguments, *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "r").exists()
    if all(name in OPTIONS for name, _ in pairs):
        given = [part for name, value in pairs for part in (f"--execution.{name}", value)]
        assert main(["generate", "--checkpoint", str(run), "--prompt", "The", *given]) == 2
        assert message in capsys.readouterr().err


def test_options_of_generate_are_those_of_execution():
    plain = {"executor": "qnode", "device": "x", "device_options": {"a": 1}, "shots": 5, "seed": 3, "retries": 1}
    plain |= {
        "max_executions": 9,
        "processes": 2,
        "noise.depolarizing": 0.1,
        "noise.amplitude_damping": 0.2,
        "noise.readout": 0.3,
    }
    assert plain.keys() == OPTIONS.keys()
    parser = Parser()
    add_execution_options(parser)
    given = [part for name, value in plain.items() for part in (f"--execution.{name}", str(value))]
    found = execution_of(parser.parse_args(given))
    noise = Noise(depolarizing=0.1, amplitude_damping=0.2, readout=0.3)
    flat = {name: value for name, value in plain.items() if not name.startswith("noise")}
    assert found == Execution(**flat, noise=noise)
    assert execution_of(parser.parse_args([])) == Execution()


def test_checkpoints_do_not_know_the_execution(run):
    model = LanguageModel.load_from_checkpoint(run / "checkpoints/last.ckpt")
    plain, names = model.to_plain(), list(model.state_dict())
    model.set_execution(Execution(executor="qnode", device="lightning.qubit"))
    assert model.to_plain() == plain
    assert list(model.state_dict()) == names


def test_models_without_circuits_say_so(tmp_path, capsys):
    where = ["--model.attention", "classical", "--model.execution.executor", "qnode"]
    steps = ["--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path), "--run", "r"]
    model = ["--model.num_layers", "1", "--model.embed_dim", "4", "--model.block_size", "5", "--data.eval_windows", "7"]
    assert main(["fit", *where, *steps, *model]) == 0
    assert "classical attention has none, so model.execution changes nothing" in capsys.readouterr().err


def test_processes_share_the_budget_and_not_the_shots(run):
    """What each of several processes makes of an execution, as Lightning sets a callback up."""
    found = []
    for rank in range(3):
        model = LanguageModel.load_from_checkpoint(run / "checkpoints/last.ckpt")
        model.set_execution(Execution(shots=5, seed=4, max_executions=100))
        Executions().setup(SimpleNamespace(world_size=3, global_rank=rank), model, "fit")
        found.append(model.execution)
    assert [execution.seed for execution in found] == [12, 13, 14]
    assert [execution.max_executions for execution in found] == [33] * 3
    alone = LanguageModel.load_from_checkpoint(run / "checkpoints/last.ckpt")
    Executions().setup(SimpleNamespace(world_size=1, global_rank=0), alone, "fit")
    assert alone.execution == Execution()
