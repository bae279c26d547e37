import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_modules import experiment
from lightning_modules.cli import reported
from lightning_modules.comparison_rows import read_rows, read_timings
from lightning_modules.metrics import describe_bleu
from lightning_modules.reproduction import reproduce, write_page
from pennylane_qattn import ATTENTION

ROOT = Path(__file__).resolve().parents[2]


def row(variant, leaks, cross_entropy, **others):
    per_position = [0.01, 0.01, 2.6] if leaks else [3.0, 2.0, cross_entropy]
    return {
        "corpus": "shakespeare",
        "size": "",
        "cell": ".",
        "variant": variant,
        "title": variant,
        "role": "mechanism",
        "of": "",
        "twin": "",
        "twin_mismatch": None,
        "seed": 0,
        "parameters": 21_825,
        "learning_rate": 0.003,
        "steps": 1500,
        "batch_size": 1024,
        "split": "test",
        "cross_entropy": cross_entropy,
        "cer": cross_entropy / 4,
        "wer": cross_entropy / 2,
        "bleu": 0.1,
        "per_position": per_position,
        "prefix_per_position": [3.0, 2.5, per_position[-1]],
        "prefix_cross_entropy": 2.7,
        "generation": {"cer": 0.8, "wer": 1.0, "bleu": 0.0},
        "sample": "ROMEO: what\n",
        "causality": "LEAKS" if leaks else "causal",
        "certificate": {"leak": None},
        "failure": "",
        **others,
    }


ROWS = [row("classical", False, 2.0), row("qisa-absorbed-published", True, 0.16), row("qisa-absorbed", False, 2.5)]
TIMING = {
    "machine": "x86",
    "threads": 1,
    "batch_size": 1024,
    "rounds": 3,
    "inference": {"classical": [1.0] * 3, "qisa-absorbed-published": [1.3, 1.4, 1.5], "qisa-absorbed": [1.2] * 3},
    "training": {"classical": [1.0] * 3, "qisa-absorbed-published": [1.7, 1.6, 1.5], "qisa-absorbed": [1.5] * 3},
}


def line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found


def test_the_page_says_what_the_rows_say(tmp_path):
    text = write_page(tmp_path, ROWS, TIMING).read_text()
    leaking = text.splitlines()[[i for i, x in enumerate(text.splitlines()) if "-published` LEAKS | QISA" in x][0]]
    cells = [cell.strip() for cell in leaking.strip("|").split("|")]
    assert cells[2] == "LEAKS" and cells[4:8] == ["0.160", "12.50", "0.040", "12.50"]
    assert "| `qisa-absorbed` | QISA | causal | 21,825 | 2.500 | 0.80 |" in text
    assert line(text, "| cross-entropy, times better |") == (
        "| cross-entropy, times better | 13.0 | qisa-absorbed 12.5 | qisa-absorbed 0.80 |"
    )
    assert "| `qisa-absorbed-published` LEAKS | 1.40 (1.30 to 1.50) | 1.60 (1.50 to 1.70) |" in text
    assert (tmp_path / "reproduction-positions.png").read_bytes().startswith(b"\x89PNG")
    assert "consistent with* a leak" in text
    assert line(text, "| inference, times slower |") == (
        "| inference, times slower | 2.6 | qisa-absorbed 1.4 | qisa-absorbed 1.2 |"
    )
    assert "2.1 (v3, precomputed), 8.9 (v3), 46.7 (v2). Ours" in text
    assert describe_bleu() in " ".join(text.split())


def test_without_times(tmp_path):
    text = write_page(tmp_path, ROWS, None).read_text()
    assert "Times were not measured" in text
    assert "| inference, times slower | 2.6 | qisa-absorbed – | qisa-absorbed – |" in text


def test_seeds_are_averaged(tmp_path):
    text = write_page(tmp_path, [*ROWS, row("qisa-absorbed", False, 2.1, seed=1)], None).read_text()
    assert "| `qisa-absorbed` | QISA | causal | 21,825 | 2.300 | 0.87 |" in text and "Seeds: 0, 1;" in text


NUMBERS = ("cross_entropy", "cer", "wer", "bleu", "per_position", "prefix_cross_entropy", "generation", "sample")


def diverged(variant, leaks, **others):
    """As `VariantRuns.run` writes it."""
    return row(variant, leaks, 2.0) | dict.fromkeys(NUMBERS) | {"failure": "the loss is nan", "steps": 7, **others}


def test_a_run_that_diverged_has_no_numbers_and_says_so(tmp_path):
    rows = [diverged("classical", False, seed=1), *ROWS[:2], diverged("qisa-absorbed", False)]
    text = write_page(tmp_path, rows, TIMING).read_text()
    assert "| `classical` DIVERGED (1 of 2 runs) |  | causal | 21,825 | 2.000 | 1.00 |" in text
    lost = "| `qisa-absorbed` DIVERGED (1 of 1 runs) | QISA | causal | 21,825 | – | – | – | – | – | – | – |"
    assert lost in text and "| `qisa-absorbed` DIVERGED (1 of 1 runs) | – | – | – | – | – | – |" in text
    assert "qisa-absorbed 12.5 | qisa-absorbed – |" in text and "nan" not in text and "None" not in text
    assert "1500 steps of batch 1024" in text  # not those after which it diverged
    assert "`qisa-absorbed` DIVERGED (1 of 1 runs):" not in text  # it has written nothing


def test_a_text_too_short_to_be_continued(tmp_path):
    text = write_page(tmp_path, [r | {"generation": None} for r in ROWS], None).read_text()
    assert "| `qisa-absorbed` | 3.000 | 3.000 | 2.500 | 2.700 | – | – |" in text


def test_the_committed_rows():
    with open(ROOT / "docs" / "reproduction-rows.csv", encoding="utf-8", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    published = {name for name, mechanism in ATTENTION.items() if mechanism.is_published}
    assert set(rows) == {"classical", *published, *(name.removesuffix("-published") for name in published)}
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    for name, row in rows.items():
        gains = [float(rows["classical"][key]) / float(row[key]) for key in ("cross_entropy", "cer")]
        if name in published:
            assert row["causality"] == "LEAKS" and min(gains) >= 10
        else:
            assert row["causality"] == "causal" and max(gains) <= 1
        cells = f" | {float(row['cross_entropy']):.3f} | {gains[0]:.2f} | {float(row['cer']):.3f} | {gains[1]:.2f} | "
        label = f"| `{name}`{' LEAKS' * (name in published)} | "
        assert any(line.startswith(label) and cells in line for line in page.splitlines()), name


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--dry_run", "true"], "no page: a dry run has no rows"),
        (["--shard", "1/2"], "no page: shard 1/2 has a part of the rows only"),
    ],
)
def test_no_page_of_a_part(option, said, tmp_path, capsys, monkeypatch):
    compared = []
    monkeypatch.setattr(experiment, "compare", compared.append)
    config = ROOT / "configs" / "reproduce_qisa.yaml"
    assert reported(lambda: reproduce([*option, "--output", str(tmp_path / "out")], config)) == 0
    assert capsys.readouterr().out.strip() == said and not (tmp_path / "out").exists()
    assert compared == [["--config", str(config), "--output", str(tmp_path / "out"), *option]]


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    config = ROOT / "configs" / "reproduce_qisa.yaml"
    for options, message in (
        (["--timing_rounds", "-1"], "timing_rounds must be at least 0; got -1"),
        (["--shart", "1/2"], "unknown option 'shart'; did you mean 'shard'?"),
    ):
        assert reported(lambda options=options: reproduce([*options, "--output", str(tmp_path / "out")], config)) == 2
        err = capsys.readouterr().err
        assert err.startswith("qattn: error: ") and message in err and err.count("\n") == 1


def test_rows_that_make_no_page(tmp_path):
    with pytest.raises(ValueError, match="there is no row of it; add `classical`"):
        write_page(tmp_path, ROWS[1:], None)
    with pytest.raises(ValueError, match="one corpus and one size; got rows of 2"):
        write_page(tmp_path, [*ROWS, row("classical", False, 2.0, size="d64")], None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_script_in_little(tmp_path):
    content = {
        "mechanisms": {"classical": "classical", "qisa-published": "qisa-published", "qisa": "qisa"},
        "allow_noncausal": True,
        "evaluate": "last",
        "sample_length": 5,
        "timing_rounds": 1,
        "fit": {
            "model": {"preset": "qisa-16", "num_layers": 1, "embed_dim": 8, "block_size": 5},
            "data": {"corpus": "pydoc", "batch_size": 3, "eval_windows": 7},
            "trainer": {"max_steps": 2, "enable_progress_bar": False, "logger": False},
        },
    }
    config = tmp_path / "little.yaml"
    config.write_text(yaml.safe_dump(content))
    script = [sys.executable, str(ROOT / "scripts" / "reproduce_qisa.py"), "--config", str(config)]
    done = subprocess.run([*script, "--output", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "reproduction.md").read_text()
    assert "`qisa-published` LEAKS" in text and "| `qisa` |" in text
    done = subprocess.run([*script, "--timing_rounds", "x"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("qattn: error: ") and done.stderr.count("\n") == 1


def test_the_config_is_the_published_setting():
    config = yaml.safe_load((ROOT / "configs" / "reproduce_qisa.yaml").read_text())
    published = {name for name, mechanism in ATTENTION.items() if mechanism.is_published}
    causal = {name.removesuffix("-published") for name in published}
    assert set(config["mechanisms"]) == {"classical"} | published | causal and len(published) == 4
    assert all(name == mechanism for name, mechanism in config["mechanisms"].items())
    data, model = config["fit"]["data"], config["fit"]["model"]
    assert data["published_split"] and data["batch_size"] == 1024 and data["corpus"] == "shakespeare"
    assert model["preset"] == "qisa-16" and model["learning_rate"] == 0.003 and model["schedule"] == "constant"


def test_rows_are_read_in_order(tmp_path):
    from lightning_modules.comparison_rows import ROW, write_description, write_json

    for run in ("b", "a"):
        write_json(tmp_path / run / ROW, {"variant": run, "corpus": "", "size": "", "cell": "."})
    write_description(tmp_path, "t", [], ["b", "a", "c"])
    rows = read_rows(tmp_path)
    assert [found["variant"] for found in rows] == ["b", "a"] and read_timings(tmp_path, rows) == {}
    with pytest.raises(ValueError, match="give a folder that qattn compare wrote"):
        read_rows(tmp_path / "a")
