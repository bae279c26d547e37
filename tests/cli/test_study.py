"""Comparisons as a whole: twins, ablations, tuning, corpora and sizes; killed and resumed, in shards and merged."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lightning_modules.cli import main
from lightning_modules.experiment import read_options
from lightning_modules.study import Study

FIT = {
    "model": {"preset": "qisa-16", "num_layers": 1, "embed_dim": 8, "block_size": 5},
    "data": {"corpus": "pydoc", "batch_size": 3, "eval_windows": 11},
    "trainer": {"max_steps": 4, "val_check_interval": 4, "enable_progress_bar": False, "logger": False},
}
MEASURED = {"train_seconds", "train_characters_per_second", "generation_characters_per_second", "certificate"}


@pytest.fixture
def write(tmp_path):
    def config(name="study", **options):
        path = tmp_path / f"{name}.yaml"
        content = {
            "output": str(tmp_path / name),
            "mechanisms": {"classical": "classical", "qisa": "qisa"},
            "evaluate": "last",
            "seeds": [3, 5],
            "sample_length": 3,
            "fit": FIT,
        }
        path.write_text(yaml.safe_dump({**content, **options}))
        return path

    return config


def rows_of(folder):
    found = {
        path.parent.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("row.json")
    }
    return {run: {k: v for k, v in row.items() if k not in MEASURED} for run, row in sorted(found.items())}


def table_of(folder):
    """The lines of `table.csv` without what is measured anew each time, and which of these columns say something."""
    with open(folder / "table.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    measured = [name for name in lines[0] if "time_ratio" in name or "_seconds" in name or "_per_second" in name]
    said = {name for name in measured if all(line[name] for line in lines)}
    return [{k: v for k, v in line.items() if k not in measured} for line in lines], said


EVERYTHING = {
    "corpora": {"pydoc": {"corpus": "pydoc"}, "markov": {"corpus": "markov:length=3000,symbols=3,order=1"}},
    "sizes": {"d8": {}, "d16": {"embed_dim": 16}},
    "twins": True,
    "ablations": ["frozen"],
    "learning_rates": [0.01, 0.001],
    "tuning_steps": 2,
    "seeds": [3],
}


def test_everything_at_once(write, tmp_path, capsys):
    file = write(**EVERYTHING, timing_rounds=2)
    assert main(["compare", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    rows = rows_of(tmp_path / "study")
    cells = {(row["corpus"], row["size"]) for row in rows.values()}
    assert cells == {(corpus, size) for corpus in ("pydoc", "markov") for size in ("d8", "d16")}
    of_cell = {row["variant"]: row for row in rows.values() if (row["corpus"], row["size"]) == ("markov", "d16")}
    assert {"classical", "qisa", "qisa-frozen"} < set(of_cell)
    twin = of_cell[of_cell["qisa"]["twin"]]
    assert twin["role"] == "twin" and "qisa" in twin["of"].split(",")
    assert abs(twin["parameters"] / of_cell["qisa"]["parameters"] - 1) < 0.02
    assert of_cell["qisa-frozen"]["parameters"] == of_cell["qisa"]["parameters"] - 3 * 4  # the angles of one layer
    for row in rows.values():
        assert row["causality"] == "causal" and row["steps"] == 4 and row["batch_size"] == 3
        assert [rate for rate, _ in row["learning_rates_tried"]] == [0.01, 0.001]
        best = min(row["learning_rates_tried"], key=lambda pair: pair[1])[0]
        assert row["learning_rate"] == best
        assert row["prefix_per_position"] == pytest.approx(row["per_position"], abs=1e-5)
        assert (row["excess"] is None) == (row["corpus"] == "pydoc")
    markov = of_cell["qisa"]
    assert markov["excess"] == pytest.approx(markov["cross_entropy"] - markov["optimum"], abs=1e-6)
    assert "runs of training to do" in out and "about" in out
    for name in ("rows.csv", "table.csv", "table.md", "comparison.html"):
        assert (tmp_path / "study" / name).stat().st_size > 100
    times = json.loads((tmp_path / "study" / "markov" / "d8" / "timing.json").read_text())
    assert set(times["training"]["qisa"]) and len(times["inference"]["classical"]) == 2
    assert times["inference"]["classical"] == [1.0, 1.0]


def test_a_mechanism_that_joins_later_is_timed_with_the_others(write, tmp_path):
    found = []
    for names in (["classical"], ["classical", "gaussian"], ["classical"]):
        mechanisms = {name: name for name in names}
        assert main(["compare", "--config", str(write(mechanisms=mechanisms, seeds=[3], timing_rounds=1))]) == 0
        found.append(json.loads((tmp_path / "study" / "timing.json").read_text()))
    assert [set(times["training"]) for times in found] == [{"classical"}, *[{"classical", "gaussian"}] * 2]
    assert found[2] == found[1]


def test_all_variants_are_trained_on_the_same_batches(write, tmp_path, monkeypatch):
    from lightning_modules.language_model import LanguageModel

    seen = {}
    step = LanguageModel.training_step

    def record(self, batch, batch_idx):
        seen.setdefault((self.attention.name, self.gpt.config.embed_dim), []).append(batch[0].tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", record)
    assert main(["compare", "--config", str(write())]) == 0
    (classical, quantum) = seen.values()
    assert classical == quantum and len(classical) == 8 and classical[:4] != classical[4:]


def test_two_shards_merged_are_one_run(write, tmp_path, capsys):
    options = {**EVERYTHING, "sizes": {}, "twins": False, "ablations": [], "learning_rates": [0.01], "timing_rounds": 1}
    whole = write("whole", **options)
    assert main(["compare", "--config", str(whole)]) == 0
    assert "times: not" not in capsys.readouterr().out
    for i in (1, 2):
        part = write(f"part{i}", **options)
        assert main(["compare", "--config", str(part), "--shard", f"{i}/2"]) == 0
        assert "a part measures no times" in capsys.readouterr().err
    parts = [str(tmp_path / f"part{i}") for i in (1, 2)]
    alone = [rows_of(tmp_path / f"part{i}") for i in (1, 2)]
    assert alone[0] and alone[1] and not set(alone[0]) & set(alone[1])
    capsys.readouterr()
    assert main(["merge", *parts, "--output", str(tmp_path / "merged")]) == 0
    expected = rows_of(tmp_path / "whole")
    out = capsys.readouterr().out
    assert f"{len(expected)} of {len(expected)} runs" in out and "times: not measured of all variants" in out
    assert rows_of(tmp_path / "merged") == expected
    assert (tmp_path / "merged" / "comparison.html").is_file()
    lines, said = table_of(tmp_path / "whole")
    times = {f"{kind}_time_ratio{end}" for kind in ("inference", "training") for end in ("", "_low", "_high")}
    assert times < said
    assert table_of(tmp_path / "merged") == (lines, said - times)
    assert main(["compare", "--config", str(whole), "--output", str(tmp_path / "merged")]) == 0  # what merge says
    assert "0 runs of training to do" in capsys.readouterr().out
    assert table_of(tmp_path / "merged") == (lines, said)
    assert main(["merge", str(tmp_path / "merged"), "--output", str(tmp_path / "again")]) == 0
    assert "times: not" not in capsys.readouterr().out


def test_one_comparison_at_a_time_in_a_folder(write, tmp_path, capsys, monkeypatch):
    options = {"mechanisms": {"classical": "classical", "qisa": "qisa"}, "seeds": [3]}
    file, parts = write(**options), [write(f"part{i}", **options) for i in (1, 2)]
    folders = [str(tmp_path / f"part{i}") for i in (1, 2)]
    train, statuses = Study.train, []

    def meanwhile(study):
        monkeypatch.setattr(Study, "train", train)
        for arguments in (["compare", "--config", str(file)], ["merge", *folders, "--output", str(tmp_path / "study")]):
            capsys.readouterr()
            statuses.append((main(arguments), capsys.readouterr().err))
        statuses.append(main(["compare", "--config", str(file), "--dry_run", "true"]))
        statuses.append(main(["merge", *folders, str(tmp_path / "study"), "--output", str(tmp_path / "elsewhere")]))
        train(study)

    for i, part in enumerate(parts, 1):
        assert main(["compare", "--config", str(part), "--shard", f"{i}/2"]) == 0
    assert main(["compare", "--config", str(file), "--shard", "1/2"]) == 0
    monkeypatch.setattr(Study, "train", meanwhile)
    assert main(["compare", "--config", str(file)]) == 0  # goes on with the other half
    line = f"qattn: error: another process is writing to {str(tmp_path / 'study')!r}; wait for its end, or name another"
    for status, error in statuses[:2]:
        assert status == 2 and error.startswith(line) and error.count("\n") == 1
    assert statuses[2:] == [0, 0] and len(rows_of(tmp_path / "elsewhere")) == 2 == len(rows_of(tmp_path / "study"))
    assert main(["merge", *folders, "--output", str(tmp_path / "study")]) == 0


def test_merging_what_does_not_belong_together(write, tmp_path, capsys):
    options = {"mechanisms": {"classical": "classical"}, "seeds": [3]}
    assert main(["compare", "--config", str(write("a", **options))]) == 0
    assert main(["compare", "--config", str(write("b", **options, title="another"))]) == 0
    other = {**FIT, "trainer": {**FIT["trainer"], "max_steps": 5}}
    assert main(["compare", "--config", str(write("c", **options, fit=other))]) == 0
    capsys.readouterr()
    for parts, message in (
        (["a", "b"], "is a part of another comparison than"),
        (["a", "c"], "have rows of 'classical' with different settings"),
        (["a", "nowhere"], "holds no comparison.json; give folders that qattn compare wrote"),
    ):
        folders = [str(tmp_path / part) for part in parts]
        assert main(["merge", *folders, "--output", str(tmp_path / "merged")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()


def test_a_killed_sweep_gives_the_same_table(write, tmp_path):
    options = {"learning_rates": [0.01], "tuning_steps": 3}
    assert main(["compare", "--config", str(write("unbroken", **options))]) == 0
    expected = rows_of(tmp_path / "unbroken")
    file = write("killed", **options)
    command = [sys.executable, "-m", "lightning_modules", "compare", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for wanted in (1, 2):  # killed once there are so many rows, in the middle of the next run
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(rows_of(tmp_path / "killed")) < wanted:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wanted <= len(rows_of(tmp_path / "killed"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("row.json")}
    assert main(["compare", "--config", str(file)]) == 0
    found = rows_of(tmp_path / "killed")
    assert found == expected
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_rows_of_other_settings_are_not_taken(write, capsys):
    options = {"mechanisms": {"classical": "classical"}, "seeds": [3]}
    assert main(["compare", "--config", str(write(**options))]) == 0
    other = {**FIT, "trainer": {**FIT["trainer"], "max_steps": 5}}
    assert main(["compare", "--config", str(write(**options, fit=other))]) == 2
    assert "belongs to a comparison with other settings; choose another output, or" in capsys.readouterr().err
    assert main(["compare", "--config", str(write(**options, fit=other)), "--overwrite", "true"]) == 0


def test_rows_learn_of_variants_that_join_later(write, tmp_path):
    """The values of `qisa` made linear are those of `qisa-absorbed` made linear, trained once."""
    own = {"ablations": ["linear"], "seeds": [3]}
    assert main(["compare", "--config", str(write(mechanisms={"qisa": "qisa"}, **own))]) == 0
    before = rows_of(tmp_path / "study")
    both = write(mechanisms={"qisa": "qisa", "qisa-absorbed": "qisa-absorbed"}, **own)
    assert main(["compare", "--config", str(both)]) == 0
    found = rows_of(tmp_path / "study")
    assert set(found) == {"qisa", "qisa-linear", "qisa-absorbed"}
    assert (before["qisa-linear"]["of"], found["qisa-linear"]["of"]) == ("qisa", "qisa,qisa-absorbed")
    assert found["qisa"] == before["qisa"] and found["qisa-linear"] == before["qisa-linear"] | {
        "of": "qisa,qisa-absorbed"
    }
    with open(tmp_path / "study" / "ablations.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["mechanism"], line["ablation"]) for line in lines] == [
        *(("qisa", "qisa-linear"), ("qisa-absorbed", "qisa-linear")),
    ]
    for line in lines:
        gain = found[line["mechanism"]]["cross_entropy"] - found["qisa-linear"]["cross_entropy"]
        assert float(line["gain_over_mechanism_nats"]) == pytest.approx(gain)


def test_a_dry_run_trains_nothing(write, tmp_path, capsys):
    assert main(["compare", "--config", str(write(twins=True)), "--dry_run", "true"]) == 0
    out = capsys.readouterr().out
    assert "6 runs of training to do, 24 steps" in out and "classical-h" in out
    assert not list((tmp_path / "study").rglob("*.ckpt"))


def test_what_diverges_is_not_taken(write, tmp_path):
    options = {
        "mechanisms": {"classical": "classical"},
        "seeds": [3],
        "learning_rates": [1e30, 0.01],
        "tuning_steps": 30,
    }
    assert main(["compare", "--config", str(write(**options))]) == 0
    (row,) = rows_of(tmp_path / "study").values()
    assert row["learning_rate"] == 0.01 and row["learning_rates_tried"][0] == [1e30, None]
    assert math.isfinite(row["cross_entropy"])


def test_a_seed_that_diverges_stops_no_sweep(write, tmp_path, capsys):
    fit = {**FIT, "model": {**FIT["model"], "learning_rate": 1e30}, "trainer": {**FIT["trainer"], "max_steps": 30}}
    options = {"mechanisms": {"classical": "classical"}, "fit": fit}
    assert main(["compare", "--config", str(write(**options))]) == 0
    said = capsys.readouterr()
    assert "diverged, and has no numbers" in said.err and "0 runs" not in said.out
    rows = rows_of(tmp_path / "study")
    assert set(rows) == {"classical-seed3", "classical-seed5"}
    assert all(row["cross_entropy"] is None and "the loss is" in row["failure"] for row in rows.values())
    assert main(["compare", "--config", str(write(**options))]) == 0
    assert "0 runs of training to do" in capsys.readouterr().out
    assert (tmp_path / "study" / "rows.csv").read_text().count("the loss is nan at step") == 2


@pytest.mark.parametrize("option", ["--allow-noncausal", "--allow_noncausal", "--allow-noncausal=true"])
def test_a_leak_is_allowed_as_in_fit(write, option):
    assert read_options(["--config", str(write())]).allow_noncausal is False
    assert read_options(["--config", str(write()), option, "--dry_run", "true"]).allow_noncausal is True


def test_single_options_leave_the_others(write):
    args = ["--fit.trainer.max_steps", "7", "--fit.model.attention.init_args.span=2", "--fit.seed_everything", "9"]
    fit = read_options(["--config", str(write()), *args]).fit
    assert fit["trainer"] == {**FIT["trainer"], "max_steps": 7}
    assert fit["model"] == {**FIT["model"], "attention": {"init_args": {"span": 2}}}
    assert fit["data"] == FIT["data"] and fit["seed_everything"] == 9


@pytest.mark.parametrize(
    ("fit", "args", "message"),
    [
        (FIT, ["--fit.trainer.max_steps"], "--fit.trainer.max_steps needs a value"),
        (FIT, ["--fit.trainer.max_steps", "[1"], "--fit.trainer.max_steps cannot be read as YAML"),
        (FIT, ["--fit.model.preset.size", "1"], "preset is 'qisa-16' and holds no options"),
        ("mine.yaml", ["--fit.trainer.max_steps", "1"], "fit is the file 'mine.yaml'; change that file"),
    ],
)
def test_single_options_that_cannot_be_set(write, fit, args, message, capsys):
    assert main(["compare", "--config", str(write(fit=fit)), *args]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]


def test_leaks_are_refused_or_labelled(write, tmp_path, capsys):
    def reports(err):
        return err.splitlines().count("qisa-published GPT LEAKS")

    options = {"mechanisms": {"classical": "classical", "copying": "qisa-published"}, "seeds": [3]}
    command = ["compare", "--config", str(write(**options))]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "--allow-noncausal trains it all the same" in err and reports(err) == 1
    assert not list((tmp_path / "study").rglob("*.ckpt"))
    assert main([*command, "--allow-noncausal"]) == 0  # the remedy of that error
    out, err = capsys.readouterr()
    assert reports(err) == 1
    budget = [" ".join(line.split()) for line in out.splitlines()]
    # how many parameters depends on the characters of the text, which Python's versions have in theirs
    said = "\n".join(budget)
    leaking, classical = (
        re.search(r"^copying LEAKS ([\d,]+) 1 4 ", said, re.M),
        re.search(r"^classical ([\d,]+) 1 4 ", said, re.M),
    )
    assert int(classical[1].replace(",", "")) - int(leaking[1].replace(",", "")) == 39
    rows = rows_of(tmp_path / "study")
    assert rows["copying"]["causality"] == "LEAKS" and rows["classical"]["causality"] == "causal"
    assert "LEAKS" in out
    for name in ("rows.csv", "table.csv", "table.md", "comparison.html", "report.html"):
        assert "LEAKS" in (tmp_path / "study" / name).read_text(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablations": ["foo"]}, "unknown ablation 'foo'; choose from frozen, random, linear"),
        ({"ablate": ["foo"]}, "ablate names 'foo'; choose from the mechanisms: classical, qisa"),
        ({"learning_rates": [0.1, -1.0]}, "learning_rates must be positive and finite; got [0.1, -1.0]"),
        ({"tuning_steps": 0}, "tuning_steps must be at least 1; got 0"),
        ({"timing_rounds": -1}, "timing_rounds must be at least 0; got -1"),
        ({"shard": "3/2"}, "shard must be i/n, as 1/3, 2/3 and 3/3; got '3/2'"),
        ({"shard": "0/2"}, "shard must be i/n"),
        ({"corpora": {"a/b": {}}}, "the name of a corpus is a folder's name, without slashes; got 'a/b'"),
        ({"corpora": {"a": {"corpus": "nowhere.txt"}}}, "unknown corpus 'nowhere.txt'"),
        ({"sizes": {"a": {"embed_dim": 0}}}, "embed_dim must be an integer of at least 1; got 0"),
        ({"split": "test", "fit": {**FIT, "data": {**FIT["data"], "val_fraction": 0.2}}}, "there is no test split"),
        (
            {"fit": {**FIT, "trainer": {**FIT["trainer"], "max_steps": -1, "max_time": "00:00:01:00"}}},
            "needs an end of its",
        ),
        (
            {"fit": {**FIT, "trainer": {**FIT["trainer"], "accelerator": "cpu", "devices": 2, "strategy": "ddp"}}},
            "each run in one process, and fit.trainer asks for 2; leave its devices at 1",
        ),
    ],
)
def test_bad_input(write, options, message, capsys, tmp_path):
    assert main(["compare", "--config", str(write(**options))]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]
    assert not list((tmp_path / "study").rglob("*.ckpt"))
