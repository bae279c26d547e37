"""`qattn noise-sweep`: what it writes and prints, going on after a stop, and bad input."""

import csv
import json
import os
from pathlib import Path

import pytest
from matplotlib import image

from lightning_modules import cli, noise_sweep
from lightning_modules.language_model import LanguageModel
from pennylane_qattn.execution import executors
from pennylane_qattn.observables import group_words

SMALL = ("--shots", "7", "23", "--repetitions", "3", "--windows", "2")
NOISE = ("--depolarizing", "0.05", "--amplitude_damping", "0.02", "0.2", "--readout")
NO_NOISE = ("--depolarizing", "--amplitude_damping", "--readout")
WINDOWS, TOKENS = 2, 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a run of a second with the attention `qisa`."""
    folder = tmp_path_factory.mktemp("sweep")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    sizes = {"num_layers": 1, "num_heads": 2, "embed_dim": 4, "block_size": 5, "dropout": 0}
    options = {f"model.{name}": value for name, value in sizes.items()}
    options |= {"data.corpus": text, "data.batch_size": 4, "data.eval_windows": 7, "run": "a"}
    options |= {"trainer.max_steps": 2, "trainer.accelerator": "cpu", "trainer.default_root_dir": folder}
    assert cli.main(["fit", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return str(folder / "a")


def rows(folder="out", timed=False):
    with open(f"{folder}/noise_sweep.csv", newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        assert float(row["seconds"]) >= 0
        if not timed:
            row.pop("seconds")
    return found


def sweep(checkpoint, *options, output="out"):
    return cli.main(["noise-sweep", "--checkpoint", checkpoint, "--output", output, *options])


def test_files_and_tables(checkpoint, capsys):
    capsys.readouterr()
    assert sweep(checkpoint, *SMALL, *NOISE) == 0
    captured = capsys.readouterr()
    found = rows()
    kinds = ["exact", *["shots"] * 6, "depolarizing", "amplitude_damping", "amplitude_damping"]
    assert [row["kind"] for row in found] == kinds
    assert [row["repetition"] for row in found[1:7]] == ["1", "2", "3"] * 2
    seeds = [row["seed"] for row in found if row["seed"]]
    assert len(set(seeds)) == 6 and len({row["cross_entropy"] for row in found}) == len(found)

    # the exact value is that of `qattn test`, and the executions are what the words ask for
    assert cli.main(["test", "--ckpt_path", checkpoint, "--data.eval_windows", str(WINDOWS)]) == 0
    exact = float(found[0]["cross_entropy"])
    assert f"{exact:.4f}" in capsys.readouterr().out
    model = LanguageModel.load_from_checkpoint(f"{checkpoint}/checkpoints/last.ckpt")
    settings = [len(group_words(circuit.words)) for each in executors(model) for circuit in each.circuits]
    assert len(settings) == 2
    sampled = [int(row["executions"]) for row in found if row["kind"] == "shots"]
    assert sampled == [TOKENS * sum(settings)] * 6
    assert f"6 evaluations on default.qubit, {6 * TOKENS * sum(settings):,} executions at most" in captured.err
    assert f"3 evaluations on default.mixed, {3 * TOKENS * 2:,} executions at most" in captured.err
    assert f"executions per token: {sum(settings)} when sampling, 2 with exact values" in captured.out
    assert f"tokens: {TOKENS}, exact: {exact:.5f} nats/token" in captured.out
    assert "Finite shots" in captured.out and "weighted fit: intercept" in captured.out
    assert "standard error over 3 repetitions" in captured.out and "Exact values of noisy circuits" in captured.out
    assert all(len(line) <= 100 for line in captured.out.splitlines())

    saved = json.loads(Path("out/noise_sweep.json").read_text())
    assert saved["settings_per_circuit"] == settings
    assert saved["executions"] == sum(int(row["executions"]) for row in found)
    assert saved["seconds"] == pytest.approx(sum(float(row["seconds"]) for row in rows(timed=True)))
    (point,) = [point for point in saved["points"] if point["shots"] == 23]
    values = [float(row["cross_entropy"]) for row in found if row["shots"] == "23"]
    assert point["mean"] == pytest.approx(sum(values) / 3) and point["bias"] == pytest.approx(point["mean"] - exact)
    spread = sum((value - point["mean"]) ** 2 for value in values) / 2
    assert point["error"] == pytest.approx((spread / 3) ** 0.5)
    assert image.imread("out/noise_sweep.png").shape[:2] == (1110, 1560)


def test_a_stopped_sweep_goes_on_where_it_was(checkpoint, capsys, monkeypatch):
    assert sweep(checkpoint, *SMALL, *NOISE, output="whole") == 0
    evaluate, done = noise_sweep.Subject.evaluate, []

    def stops(self, condition, options):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(condition)
        return evaluate(self, condition, options)

    with monkeypatch.context() as patch:
        patch.setattr(noise_sweep.Subject, "evaluate", stops)
        assert sweep(checkpoint, *SMALL, *NOISE) == 130
    assert rows() == rows("whole")[:5] and not Path("out/noise_sweep.png").exists()
    with open("out/noise_sweep.csv", "a") as file:
        file.write("shots,,23,2,31")  # a row that a killed process has torn
    stamp = os.stat("whole/noise_sweep.csv").st_mtime_ns
    capsys.readouterr()
    assert sweep(checkpoint, *SMALL, *NOISE) == 0
    assert "4 of 9 evaluations are there already, 5 are left" in capsys.readouterr().err
    assert rows() == rows("whole") and Path("out/noise_sweep.png").exists()
    first, second = (json.loads(Path(f"{name}/noise_sweep.json").read_text()) for name in ("out", "whole"))
    for found in (first, second):
        del found["seconds"]
        for point in found["points"]:
            del point["seconds"]
    assert first == second

    # nothing is left to do, even where another machine has rounded differently
    file = Path("whole/noise_sweep.json")
    file.write_text(json.dumps({**second, "settings": {**second["settings"], "exact": second["exact"] * (1 + 1e-13)}}))
    assert sweep(checkpoint, *SMALL, *NOISE, output="whole") == 0
    assert os.stat("whole/noise_sweep.csv").st_mtime_ns == stamp


def test_rows_do_not_depend_on_the_rest_of_the_sweep(checkpoint):
    assert sweep(checkpoint, "--shots", "23", "--repetitions", "2", "--windows", "2", *NO_NOISE) == 0
    (before,) = [row["cross_entropy"] for row in rows() if row["repetition"] == "2"]
    assert sweep(checkpoint, *SMALL, "--noise_shots", "11", *NOISE) == 0
    found = rows()
    assert [row["cross_entropy"] for row in found if (row["shots"], row["repetition"]) == ("23", "2")] == [before]
    noisy = [row for row in found if row["kind"] == "amplitude_damping"]
    assert [row["shots"] for row in noisy] == ["11"] * 6 and len({row["cross_entropy"] for row in noisy}) == 6
    again = ("--seed", "1", "--overwrite", "--shots", "23", "--repetitions", "2", "--windows", "2", *NO_NOISE)
    assert sweep(checkpoint, *again) == 0
    assert len(rows()) == 3 and before not in [row["cross_entropy"] for row in rows()]


def test_another_device(checkpoint, capsys):
    none = ("--depolarizing", "--amplitude_damping", "--readout", "0.1")
    assert sweep(checkpoint, "--device", "lightning.qubit", *SMALL, *none) == 0
    assert "6 evaluations on lightning.qubit" in capsys.readouterr().err
    saved = json.loads(Path("out/noise_sweep.json").read_text())
    for point in saved["points"][:2]:
        assert point["word_error"] == pytest.approx(point["word_error_expected"], rel=0.5)


def test_a_folder_with_another_sweep(checkpoint, refused):
    assert sweep(checkpoint, "--shots", "7", "--repetitions", "2", "--windows", "2", *NO_NOISE) == 0
    where = ("noise-sweep", "--checkpoint", checkpoint, "--output", "out")
    assert "'out' holds another sweep: seed is 0 there and 1 here" in refused(*where, *SMALL, "--seed", "1")
    assert "holds another sweep: exact is" in refused(*where, *SMALL, "--data.eval_seed", "5")
    Path("out/noise_sweep.csv").write_text("a,b\n1,2\n")
    assert "holds no rows of a sweep; give another --output" in refused(*where, *SMALL)
    Path("out/noise_sweep.json").unlink()
    assert "is there without the settings of its sweep" in refused(*where, *SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shots", "0"), "shots must be at least 1; got 0"),
        (("--shots", "ten"), "argument --shots: invalid int value: 'ten'; see qattn noise-sweep --help"),
        (("--depolarizing", "1.5"), "noise.depolarizing is a probability in [0, 1]; got 1.5"),
        (("--readout", "nan"), "noise.readout is a probability in [0, 1]; got nan"),
        (("--readout", "0"), "readout must be more than 0, which is the exact evaluation; leave the 0 out"),
        (("--repetitions", "1"), "repetitions must be at least 2, as they give the error bars; got 1"),
        (("--windows", "0"), "windows must be at least 1; got 0"),
        (("--seed", "-1"), "seed must be at least 0; got -1"),
        (("--shots", "--depolarizing", "--amplitude_damping", "--readout"), "there is nothing to sweep"),
        (("--foo", "1"), "unknown option 'foo'; see qattn noise-sweep --help"),
        (("--data.foo", "1"), "unknown option 'data.foo'"),
        (("--device", "foo"), "unknown device 'foo'; installed here:"),
        (("--noise_device", "default.qubit"), "default.qubit simulates no noise channels; use default.mixed"),
        (("--max_executions", "100", *SMALL), "on default.qubit and max_executions is 100; lower repetitions"),
        (("--checkpoint", "nowhere.ckpt"), "there is no checkpoint 'nowhere.ckpt'"),
        (("--output", "text.txt/out"), "cannot write to 'text.txt/out'"),
    ],
)
def test_bad_input(checkpoint, refused_alone, options, message):
    assert message in refused_alone("noise-sweep", "--checkpoint", checkpoint, "--output", "out", *options)
    assert not Path("out").exists()


@pytest.fixture
def refused_alone(text_file, capsys):
    """As `refused`, of commands that say nothing before."""

    def refused_alone(*arguments):
        capsys.readouterr()
        assert cli.main(list(arguments)) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("qattn: error: ")
        assert captured.out == ""
        return line.removeprefix("qattn: error: ")

    return refused_alone


def test_attention_without_circuits(fit, refused):
    assert fit("--run", "a") == 0
    said = refused("noise-sweep", "--checkpoint", "runs/a", "--output", "out")
    assert said == "classical attention has no circuits to sample; give a checkpoint of qisa, for example"
