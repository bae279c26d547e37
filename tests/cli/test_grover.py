"""`qattn grover` from the command line: reports, pictures, refusals."""

import json

import pytest

from lightning_modules import cli

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
SMALL = ["--n", "16", "64", "--k", "1", "4", "--repeats", "5", "--rows", "3", "--dim", "8", "--causal_keys", "12"]


@pytest.fixture
def run(tmp_path):
    def run(attention: str) -> str:
        text = tmp_path / "text.txt"
        text.write_text(TEXT)
        folder = tmp_path / attention
        sizes = {"num_layers": 1, "num_heads": 1, "embed_dim": 8, "block_size": 8}
        options = [f"--model.{name}={value}" for name, value in sizes.items()]
        trainer = {"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": "null"}
        trainer |= {"enable_progress_bar": "false", "accelerator": "cpu", "default_root_dir": tmp_path}
        options += [f"--trainer.{name}={value}" for name, value in trainer.items()]
        options += [f"--data.corpus={text}", "--data.batch_size=4", "--data.eval_windows=16"]
        assert cli.main(["fit", "--model.attention", attention, "--run", str(folder), *options]) == 0
        return str(folder)

    return run


def test_random_rows(tmp_path, capsys):
    output = tmp_path / "report"
    assert cli.main(["grover", *SMALL, "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        *("errors.png", "grover.json", "grover.md", "queries.png", "resources.png"),
    ]
    printed = capsys.readouterr().out
    assert "Calls to find all marked keys of a row" in printed and "Without a QRAM" in printed
    sections = json.loads((output / "grover.json").read_text())
    assert len(sections) == 5
    assert [row["n"] for row in sections[0]["rows"]] == [16, 16, 64, 64]
    assert {row["finder"] for row in sections[1]["rows"]} >= {"full scan", "ball tree"}
    again = tmp_path / "again"
    assert cli.main(["grover", *SMALL, "--output", str(again)]) == 0
    assert (again / "grover.json").read_bytes() == (output / "grover.json").read_bytes()


def test_a_classical_and_a_grover_checkpoint(run, tmp_path, capsys):
    options = ["--windows", "8", "--searched", "2", "--keep", "1", "8"]
    assert cli.main(["grover", "--checkpoint", run("classical"), *options, "--output", str(tmp_path / "a")]) == 0
    titles = [section["title"] for section in json.loads((tmp_path / "a" / "grover.json").read_text())]
    assert any("Cross-entropy" in title for title in titles) and not any("Amplification" in title for title in titles)
    assert (tmp_path / "a" / "sparsity.png").is_file() and not (tmp_path / "a" / "success.png").exists()
    # into the same folder: no picture of another model stays behind
    assert cli.main(["grover", "--checkpoint", run("grover"), *options, "--output", str(tmp_path / "a")]) == 0
    titles = [section["title"] for section in json.loads((tmp_path / "a" / "grover.json").read_text())]
    assert any("Amplification" in title for title in titles)
    assert (tmp_path / "a" / "success.png").is_file() and not (tmp_path / "a" / "sparsity.png").exists()
    capsys.readouterr()
    assert cli.main(["grover", "--checkpoint", run("qisa"), "--output", str(tmp_path / "b")]) == 2
    assert "no dot products" in capsys.readouterr().err
    classical = ["--checkpoint", str(tmp_path / "classical"), "--keep", "2", "9", "--output", str(tmp_path / "b")]
    assert cli.main(["grover", *classical]) == 2
    assert "the keys of the longest row; got 9" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--k", "0"], "k must be at least 1; got 0"),
        (["--n", "-4"], "n must be at least 1; got -4"),
        (["--n", "4", "--k", "9"], "every k is above every n"),
        (["--share", "1.5"], "share must lie between 0 and 1; got 1.5"),
        (["--tau", "nan"], "tau must be a number; got nan"),
        (["--eta", "5"], "eta must be positive and below instance_tau"),
        (["--repeats", "0"], "repeats must be at least 1; got 0"),
        (["--text", "x.txt"], "text goes with a trained model"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, capsys):
    assert cli.main(["grover", *options, "--output", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_a_missing_index_is_named(tmp_path, capsys, monkeypatch):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "sklearn" else find_spec(name, *rest)
    )
    assert cli.main(["grover", *SMALL, "--index", "--output", str(tmp_path / "report")]) == 2
    assert "pip install 'pennylane-qattn[index]'" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    assert cli.main(["grover", *SMALL, "--output", str(tmp_path / "report")]) == 0
    assert "without an index" in capsys.readouterr().err
    assert "ball tree" not in (tmp_path / "report" / "grover.json").read_text()
