"""`qattn cross-check`."""

import pytest

from lightning_modules.cli import main
from pennylane_qattn import gradients

MODEL = """--model.num_layers 1 --model.num_heads 2 --model.embed_dim 6 --model.block_size 5 --model.dropout 0
    --data.batch_size 2 --data.eval_windows 7 --trainer.max_steps 1""".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("qisa", "classical"):
        arguments = ["--trainer.default_root_dir", str(folder), "--run", name, "--model.attention", name]
        assert main(["fit", *MODEL, *arguments]) == 0
    return folder


SMALL = ["--steps", "2", "--windows", "3"]


def test_agreement(runs, capsys):
    assert main(["cross-check", "--checkpoint", str(runs / "qisa"), *SMALL]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    losses = [line.split("│") for line in lines if line.startswith(("│ 1 ", "│ 2 "))]
    assert len(losses) == 2
    assert all(float(folded) == pytest.approx(float(there), abs=1e-11) for _, _, folded, there, _ in losses)
    assert all(len(line) <= 100 for line in lines)
    for device, method in (("default.mixed", "backprop"), ("lightning.qubit", "adjoint")):
        assert any(device in line and method in line for line in lines)
    assert "rounding" in lines[-1]
    assert "MORE" not in lines[-1]
    assert "executions for 2 steps" in printed.err


def test_a_wrong_gradient_is_found(runs, capsys, monkeypatch):
    right = gradients.shift_rule
    monkeypatch.setattr(gradients, "shift_rule", lambda gate: [(c * 1.001, s) for c, s in right(gate)])
    assert main(["cross-check", "--checkpoint", str(runs / "qisa"), *SMALL]) == 1
    assert "MORE than rounding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_on", "lightning.qubit:backprop"], "lightning.qubit has no backprop"),
        (["--evaluate_on", "foo"], "unknown device 'foo'"),
        (["--gradients", "default.qubit:foo"], "unknown diff_method 'foo'"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, options, message):
    assert main(["cross-check", "--checkpoint", str(runs / "qisa"), *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_models_without_circuits(runs, capsys):
    assert main(["cross-check", "--checkpoint", str(runs / "classical")]) == 2
    assert "classical attention has no circuits to run" in capsys.readouterr().err


def test_nan_is_no_agreement(runs, capsys, monkeypatch):
    right = gradients.from_states

    def broken(*arguments):
        return [product * float("nan") for product in right(*arguments)]

    monkeypatch.setattr(gradients, "from_states", broken)
    pairs = ["--gradients", "default.qubit:adjoint", "--train_on", "default.qubit:backprop"]
    assert main(["cross-check", "--checkpoint", str(runs / "qisa"), *SMALL, *pairs]) == 1
    assert "MORE than rounding" in capsys.readouterr().out
