"""`qattn report`: the numbers of runs as they were written, what a run lacks, maps that the pointer reads."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lightning_modules import cli
from lightning_modules.checkpoints import rewrite
from lightning_modules.inspection import attention_maps
from lightning_modules.language_model import LanguageModel

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
UNSEEN = TEXT[int(len(TEXT) * 0.9) :]  # the test split
CHROMIUM = shutil.which("chromium")
SHORT = ["--sample_length", "9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of a second: two on one text, one of them leaking, and one on another text with other sizes."""
    folder = tmp_path_factory.mktemp("trained")
    for name, attention, text, block_size in (
        ("quantum", "qisa", TEXT, 5),
        ("leaking", "qisa-published", TEXT, 5),
        ("other", "classical", TEXT.upper(), 7),
    ):
        file = folder / ("lower.txt" if text == TEXT else "upper.txt")
        file.write_text(text)
        options = {"trainer.default_root_dir": folder, "run": name, "model.attention": attention}
        options |= {"data.corpus": file, "data.batch_size": 4, "data.eval_windows": 7, "model.num_layers": 1}
        options |= {"model.num_heads": 2, "model.embed_dim": 4, "model.block_size": block_size}
        options |= {"trainer.max_steps": 6, "trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1}
        options |= {"trainer.accelerator": "cpu", "allow_noncausal": "true"}
        assert cli.main(["fit", *(f"--{option}={value}" for option, value in options.items())]) == 0
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def report(tmp_path, capsys):
    """Runs `qattn report`; gives its results by name, its page and what it says on stderr."""

    def report(*arguments):
        capsys.readouterr()
        assert cli.main(["report", *map(str, arguments), *SHORT, "--output", str(tmp_path / "out")]) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
        page = (tmp_path / "out" / "report.html").read_text()
        return {result["name"]: result for result in results}, page, capsys.readouterr().err

    return report


def table(folder, name):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def maps_of(page):
    """Tokens and weights of every map that the script of the page reads."""
    found = []
    for card in page.split('data-tokens="')[1:]:
        tokens = json.loads(html.unescape(card.partition('"')[0]))
        for coded in re.findall(r'data-weights="([^"]*)"', card):
            weights = np.frombuffer(base64.b64decode(coded), "<f4")
            found.append((tokens, weights.reshape(len(tokens), len(tokens))))
    return found


def test_the_numbers_are_those_that_the_run_has_written(runs, report):
    results, page, said = report(runs / "quantum", runs / "leaking")
    (quantum, leaking), last = results.values(), table(runs / "quantum", "metrics.csv")[-1]
    assert last["val_loss"] and quantum["metrics"]["cross_entropy"] == float(last["val_loss"])
    for name in ("perplexity", "bits_per_character", "cer", "wer", "bleu"):
        assert quantum["metrics"][name] == float(last[f"val_{name}"])
    positions = table(runs / "quantum", "val_cross_entropy_per_position.csv")[-1]
    assert quantum["per_position"] == [float(positions[f"position_{i:04}"]) for i in range(5)]
    assert [row["step"] for row in quantum["history"] if "val_loss" in row] == [1, 3, 5]
    model = LanguageModel.load_from_checkpoint(runs / "quantum" / "checkpoints" / "best.ckpt")
    assert quantum["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(quantum["sample"]) == 2 + 9 and quantum["sample"].startswith(UNSEEN[:2]) and quantum["causal"] is True
    assert quantum["settings"]["metrics"] == "validation text, step 6" and quantum["settings"]["steps"] == "6 of 6"
    assert quantum["settings"]["trainer"]["val_check_interval"] == 2
    assert leaking["causal"] is False and leaking["title"] == "LEAKS: leaking" and "LEAKS: leaking" in page
    assert said == ""


def test_the_page_needs_no_network(runs, report):
    _, page, _ = report(runs / "quantum")
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert loaded and all(link.startswith(("data:", "#")) for link in loaded)
    assert page.count("<script>") == 1 and "<script " not in page and "import" not in page.partition("<script>")[2]
    for heading in ("Learning", "Generated text", "Attention", "The circuit", "Settings"):
        assert f"<h2>{heading}</h2>" in page


def test_a_run_leaves_its_report(runs, fit, capsys):
    assert "LEAKS: leaking" in (runs / "leaking" / "report.html").read_text()
    assert fit("--run", "a", "--report", "true") == 0
    assert capsys.readouterr().err.endswith("\nqattn: report: runs/a/report.html\n")
    page = Path("runs/a/report.html")
    first = page.read_text()
    assert "<h1>Run a</h1>" in first and "<h2>Learning</h2>" in first and len(maps_of(first)) == 1
    losses = [row["val_loss"] for row in table(page.parent, "metrics.csv") if row["val_loss"]]
    assert f"{min(map(float, losses)):.3f}" in first
    others = {path for path in Path("runs").rglob("*")}
    page.write_text("old")
    assert cli.main(["report", "runs/a", *SHORT]) == 0  # which replaces it
    assert "report: runs/a/report.html" in capsys.readouterr().out
    assert "<h1>Run a</h1>" in page.read_text() and {path for path in Path("runs").rglob("*")} == others
    assert fit("--run", "a", "--overwrite") == 0  # with --report false
    assert not page.exists()
    assert fit("--run", "b", "--report", "true", "--trainer.fast_dev_run", "true") == 0
    assert not Path("runs/b").exists()


def test_a_report_that_fails_leaves_the_run(fit, refused, tiny, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such font")

    monkeypatch.setattr("lightning_modules.report.render_page", broken)
    assert "RuntimeError: no such font" in refused("fit", *tiny, "--run", "a", "--report", "true", status=1)
    assert Path("runs/a/checkpoints/best.ckpt").exists() and not Path("runs/a/report.html").exists()


def test_maps_hold_the_weights_of_the_model(runs, report):
    _, page, _ = report(runs / "quantum")
    model = LanguageModel.load_from_checkpoint(runs / "quantum" / "checkpoints" / "best.ckpt")
    text = UNSEEN[:5]
    expected, labels = attention_maps(model, text)
    found = maps_of(page)
    assert len(found) == 2 and labels == list(text)
    for (tokens, weights), head in zip(found, expected["layer 1"], strict=True):
        assert tokens == [token.replace(" ", "␣") for token in text]
        np.testing.assert_allclose(weights, head, rtol=1e-6)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page with")
def test_the_pointer_brings_up_query_key_and_weight(runs, report, tmp_path):
    _, page, _ = report(runs / "other")
    tokens, weights = maps_of(page)[1]
    moved = """<script>addEventListener("load", () => {
      const figure = document.querySelectorAll("figure[data-weights]")[1];
      const box = figure.querySelector("image").getBoundingClientRect();
      const at = (x, y) => new PointerEvent("pointermove", {clientX: box.left + x, clientY: box.top + y});
      figure.dispatchEvent(at(box.width * 2.5 / 7, box.height * 4.5 / 7));
      document.body.dataset.inside = tip.hidden + "|" + tip.textContent.replaceAll("\\n", "|");
      figure.dispatchEvent(at(-3, 1));
      document.body.dataset.outside = tip.hidden;
    })</script></body>"""
    (tmp_path / "moved.html").write_text(page.replace("</body>", moved))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        (tmp_path / "moved.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (body,) = re.findall("<body[^>]*>", dom)
    _, query, key, weight = re.search('data-inside="(.*?)"', body)[1].removeprefix("false").split("|")
    assert (query, key) == (f"query 4  {tokens[4]}", f"key 2  {tokens[2]}") and 'data-outside="true"' in body
    assert float(weight.removeprefix("weight ")) == pytest.approx(weights[4, 2], rel=5e-3)


def test_a_run_without_a_checkpoint_is_shown_with_what_there_is(runs, report):
    for name in ("quantum", "leaking"):
        shutil.rmtree(runs / name / "checkpoints")
    lines = (runs / "quantum" / "metrics.csv").read_text().splitlines(keepends=True)
    (runs / "quantum" / "metrics.csv").write_text("".join(lines[:5]) + lines[5][:6])  # as while it is written
    results, page, said = report(runs / "quantum", runs / "leaking", runs / "other")
    quantum = results["quantum"]
    assert [row["step"] for row in quantum["history"]] == [float(row.split(",")[3]) for row in lines[1:5]]
    assert quantum["parameters"] is None and quantum["sample"] == "" and quantum["causal"] is None
    note = "quantum has no checkpoint yet, so there is no attention, circuit or sample of it"
    assert note in said and note in page and "quantum is at step 3 of 6" in page
    assert results["leaking"]["causal"] is False  # by the column of its table


def test_a_run_that_has_not_been_validated(runs, report):
    lines = (runs / "quantum" / "metrics.csv").read_text().splitlines(keepends=True)
    (runs / "quantum" / "metrics.csv").write_text("".join(lines[:2]))
    results, _, _ = report(runs / "quantum")
    assert results["quantum"]["metrics"] == {} and results["quantum"]["per_position"] == []
    assert results["quantum"]["settings"]["metrics"] == "not validated yet"


def test_a_checkpoint_has_the_metrics_of_its_step(runs, report):
    early = runs / "quantum" / "checkpoints" / "early.ckpt"
    shutil.copy(runs / "quantum" / "checkpoints" / "last.ckpt", early)
    rewrite(early, global_step=5)
    results, _, _ = report(early, runs / "quantum")
    assert list(results) == ["quantum-early", "quantum"]
    row = next(row for row in table(runs / "quantum", "metrics.csv") if row["val_loss"] and row["step"] == "3")
    assert results["quantum-early"]["metrics"]["cross_entropy"] == float(row["val_loss"])
    assert results["quantum-early"]["settings"]["checkpoint"] == "early.ckpt, step 5"
    assert results["quantum"]["metrics"]["cross_entropy"] != float(row["val_loss"])


def test_a_checkpoint_that_lies_alone(runs, report, tmp_path):
    alone = shutil.copy(runs / "quantum" / "checkpoints" / "best.ckpt", tmp_path / "mine.ckpt")
    results, page, _ = report(alone)
    assert results["mine"]["parameters"] > 0 and results["mine"]["metrics"] == {} and len(maps_of(page)) == 2


def test_runs_of_other_texts_and_sizes(runs, report):
    results, page, said = report(runs / "quantum", runs / "other")
    assert {len(tokens) for tokens, _ in maps_of(page)} == {5, 7}
    assert "The runs read different texts or tokens" in page and "The runs read different texts or tokens" in said
    assert results["other"]["sample"].isupper()


def test_a_run_of_a_comparison_has_its_test_metrics(runs, report, tmp_path):
    fit = {"model": {"num_layers": 1, "embed_dim": 4, "block_size": 5}, "trainer": {"max_steps": 2}}
    fit["data"] = {"corpus": str(runs / "lower.txt"), "batch_size": 3, "eval_windows": 7}
    compare = ["--mechanisms", '{"qisa": "qisa"}', "--fit", json.dumps(fit), "--evaluate", "last", "--output"]
    assert cli.main(["compare", *compare, str(tmp_path / "compared"), *SHORT]) == 0
    row = json.loads((tmp_path / "compared" / "qisa" / "row.json").read_text())
    results, page, _ = report(tmp_path / "compared" / "qisa", runs / "quantum")
    assert results["qisa"]["metrics"]["cross_entropy"] == row["cross_entropy"]
    assert results["qisa"]["per_position"] == row["per_position"]
    assert results["qisa"]["settings"]["metrics"] == "test text, by qattn compare"
    assert "The metrics are not of the same text" in page


def test_a_text_that_is_not_here(runs, report):
    name = runs.parent / "moved.txt"
    for checkpoint in (runs / "quantum" / "checkpoints").iterdir():
        rewrite(checkpoint, data={"corpus": str(name)})
    results, page, said = report(runs / "quantum")
    assert (
        f"{str(name)!r} is not on this machine" in said and maps_of(page) == [] and results["quantum"]["sample"] == ""
    )
    assert "<h2>The circuit</h2>" in page
    results, page, said = report(runs / "quantum", "--sentence", "the", "--prompt", "fox", "--overwrite")
    assert said == "" and len(maps_of(page)) == 2 and results["quantum"]["sample"].startswith("fox")


def test_runs_of_one_name_are_called_by_their_paths(runs, report):
    shutil.copytree(runs / "quantum", runs / "again" / "quantum")
    results, _, _ = report(runs / "quantum", runs / "again" / "quantum")
    assert list(results) == ["quantum", "again/quantum"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no run 'nowhere'; give the folder of a run of qattn fit, or a checkpoint in it"),
        (["empty"], "'empty' holds no run: neither metrics.csv nor a checkpoint is in it"),
        (["quantum", "quantum"], "is given twice; give each run once"),
        (["lower.txt"], "'lower.txt' is damaged, or no checkpoint at all"),
        (["quantum", "--sentence", "€"], "sentence: quantum: character '€' at position 0 is outside the vocabulary"),
        (["quantum", "--prompt", ""], "prompt is empty; give at least one token"),
        (["quantum", "--temperature", "-1"], "temperature must be 0 (greedy) or positive and finite; got -1.0"),
        (["quantum", "--sample_length", "0"], "sample_length must be at least 1; got 0"),
        (["quantum", "--output", "lower.txt"], "cannot write to 'lower.txt'"),
        ([], "required: RUN; see qattn report --help"),
    ],
)
def test_bad_input(runs, refused, monkeypatch, arguments, message):
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    assert message in refused("report", *arguments)
    assert not (runs / "runs").exists()


def test_damaged_files(runs, refused):
    (runs / "quantum" / "config.yaml").write_text("[")
    assert "config.yaml' is damaged; remove it, and the report does without" in refused("report", runs / "quantum")
    (runs / "quantum" / "metrics.csv").write_bytes(b"\xff\n")
    assert "metrics.csv' is damaged; remove it" in refused("report", runs / "quantum")


def test_a_report_is_not_overwritten_unasked(runs, report, refused, tmp_path):
    report(runs / "other")
    page = tmp_path / "out" / "report.html"
    before = page.read_bytes()
    line = refused("report", runs / "quantum", "--output", tmp_path / "out")
    assert "is there already; choose another --output, or replace it with --overwrite" in line
    assert page.read_bytes() == before
    report(runs / "quantum", "--overwrite")
    assert page.read_bytes() != before
