import json

import pytest
import torch
import yaml

from lightning_modules.cli import main
from lightning_modules.gpt import GPT

FIT = {
    "model": {"preset": "qisa-16", "num_layers": 1, "embed_dim": 4, "block_size": 5},
    "data": {"corpus": "pydoc", "batch_size": 3, "eval_windows": 7},
    "trainer": {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1, "enable_progress_bar": False},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "comparison.yaml"

    def write(**options):
        content = {
            "output": str(tmp_path / "out"),
            "mechanisms": {"classical": "classical", "quantum": {"class_path": "pennylane_qattn.QISA"}},
            "fit": FIT,
            "sample_length": 9,
            "sentence": "The list",
        }
        path.write_text(yaml.safe_dump({**content, **options}))
        return str(path)

    return write


def test_table_samples_and_report(config, tmp_path, capsys):
    assert main(["compare", "--config", config()]) == 0
    out = capsys.readouterr().out
    assert "classical GPT" in out and "quantum GPT writes" in out and "yes" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    text = (tmp_path / "out" / "report.html").read_text()
    assert "quantum GPT" in text and "BLEU" in text
    runs = results["results"]
    assert [run["name"] for run in runs] == ["classical", "quantum"]
    for run in runs:
        assert run["causal"] is True and run["parameters"] > 0 and len(run["sample"]) == 2 + 9
        assert 0 < run["metrics"]["cross_entropy"] < 10 and len(run["per_position"]) == 5
    assert (tmp_path / "out" / "quantum" / "checkpoints" / "best.ckpt").is_file()
    assert (tmp_path / "out" / "circuit-quantum.png").is_file()


def test_seeds_and_continuing(config, tmp_path, capsys):
    file = config(seeds=[0, 1], mechanisms={"qisa": "qisa"}, evaluate="last")
    assert main(["compare", "--config", file]) == 0
    first = capsys.readouterr()
    assert "qisa-seed1" in first.out and "2 runs of training to do" in first.out
    last = tmp_path / "out" / "qisa-seed0" / "checkpoints" / "last.ckpt"
    before = last.stat().st_mtime_ns
    results = (tmp_path / "out" / "results.json").read_text()
    assert main(["compare", "--config", file]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "0 runs of training to do" in capsys.readouterr().out and last.stat().st_mtime_ns == before

    def losses(found):
        return [run["metrics"]["cross_entropy"] for run in found["results"]]

    assert losses(again) == losses(json.loads(results)) and len(set(losses(again))) == 2


def trainer(**options):
    return {**FIT, "trainer": {**FIT["trainer"], **options}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanisms": {}}, "there is nothing to compare"),
        ({"mechanisms": {"a/b": "qisa"}}, "is a folder's name, without slashes; got 'a/b'"),
        ({"mechanisms": {"..": "qisa"}}, "is a folder's name, without slashes; got '..'"),
        ({"mechanisms": {"classical": "classical", "a": "foo"}}, "unknown attention 'foo'"),
        (
            {"mechanisms": {"classical": "classical", "a": 3}},
            "is a name, the path of a class, or has a class_path, with init_args or",
        ),
        ({"mechanisms": {"classical": "classical", "a": {"class_path": "foo"}}}, "model.attention: expected a class"),
        ({"fit": "nowhere.yaml"}, "nowhere.yaml"),
        ({"fit": trainer(max_steps=0)}, "trainer.max_steps must be at least 1"),
        ({"fit": trainer(val_check_interval=5)}, "a run of 4 steps would not be validated and have no best checkpoint"),
        ({"fit": trainer(limit_val_batches=0)}, "raise limit_val_batches (0), or give evaluate: last"),
        ({"fit": trainer(val_check_interval=1.0, check_val_every_n_epoch=2)}, "lower val_check_interval (1.0) or"),
        ({"fit": trainer(fast_dev_run=True)}, "fast_dev_run leaves no checkpoint"),
        ({"seeds": [0, 0]}, "no two may be the same; got [0, 0]"),
        ({"seeds": [-3]}, "seed_everything must be at least 0; got -3"),
        ({"temperature": -1.0}, "temperature must be 0 (greedy) or positive and finite; got -1.0"),
        ({"sample_length": -1}, "sample_length must be at least 1; got -1"),
        ({"prompt": ""}, "prompt is empty; give at least one token"),
        ({"prompt": "\u20ac"}, "prompt: character '\u20ac' at position 0 is outside the vocabulary"),
        ({"sentence": "a\u20ac"}, "sentence: character '\u20ac' at position 1 is outside the vocabulary"),
        ({"sentence": ""}, "sentence is empty; give at least one token"),
        ({"output": "comparison.yaml"}, "cannot write to 'comparison.yaml'"),
    ],
)
def test_bad_input_is_seen_before_anything_is_trained(config, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "out" / "classical" / "checkpoints" / "last.ckpt"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"an old run")
    assert main(["compare", "--config", config(**options), "--overwrite", "true"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("qattn: error: ") and message in errors[0]
    assert old.read_bytes() == b"an old run"


def test_the_last_checkpoint_needs_no_validation(config, tmp_path, capsys):
    fit = trainer(limit_val_batches=0, logger=False)
    assert main(["compare", "--config", config(mechanisms={"a": "classical"}, fit=fit, evaluate="last")]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]["causal"] is True


def test_a_model_that_is_better_than_the_best_leaks(config, tmp_path, monkeypatch, capsys):
    """In single precision only, so its certificate finds nothing; no validation sees it before."""
    own = GPT.forward

    def forward(gpt, tokens, *args, **options):
        logits = own(gpt, tokens, *args, **options)
        if logits.dtype == torch.float32 and tokens.shape[1] > 1:
            future = torch.nn.functional.one_hot(tokens[:, 1:], logits.shape[2])
            logits = logits + torch.nn.functional.pad(9.0 * future, (0, 0, 0, 1))
        return logits

    corpus = {"corpus": "markov:order=2,symbols=4,seed=3,length=4001", "batch_size": 3, "eval_windows": 70}
    fit = {**FIT, "data": corpus, "trainer": {**FIT["trainer"], "limit_val_batches": 0}}
    monkeypatch.setattr(GPT, "forward", forward)
    file = config(fit=fit, evaluate="last", mechanisms={"classical": "classical"}, sentence="abcd")
    assert main(["compare", "--config", file]) == 0
    captured = capsys.readouterr()
    assert "classical is better than the best there can be by " in captured.err and "LEAKS" in captured.out
    row = json.loads((tmp_path / "out" / "classical" / "row.json").read_text())
    assert row["causality"] == "LEAKS" and row["certificate"]["verdict"] == "causal" and row["excess"] < 0
