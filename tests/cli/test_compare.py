import json

import pytest
import yaml

from lightning_modules.cli import main

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
        assert run["causal"] is True and run["parameters"] > 0 and len(run["sample"]) == 4 + 9
        assert 0 < run["metrics"]["cross_entropy"] < 10 and len(run["per_position"]) == 5
    assert (tmp_path / "out" / "quantum" / "checkpoints" / "best.ckpt").is_file()
    assert (tmp_path / "out" / "circuit-quantum.png").is_file()


def test_seeds_and_continuing(config, tmp_path, capsys):
    file = config(seeds=[0, 1], mechanisms={"qisa": "qisa"}, evaluate="last")
    assert main(["compare", "--config", file]) == 0
    first = capsys.readouterr()
    assert "qisa-seed1" in first.out and "standard deviation" in " ".join(first.out.split())
    last = tmp_path / "out" / "qisa-seed0" / "checkpoints" / "last.ckpt"
    before = last.stat().st_mtime_ns
    results = (tmp_path / "out" / "results.json").read_text()
    assert main(["compare", "--config", file]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "nothing was left to do" in capsys.readouterr().err and last.stat().st_mtime_ns == before

    def losses(found):
        return [run["metrics"]["cross_entropy"] for run in found["results"]]

    assert losses(again) == losses(json.loads(results)) and len(set(losses(again))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanisms": {}}, "there is nothing to compare"),
        ({"mechanisms": {"a/b": "qisa"}}, "is a folder's name; got 'a/b'"),
        ({"mechanisms": {"a": "foo"}}, "unknown attention 'foo'"),
        ({"mechanisms": {"a": 3}}, "is a name or has a class_path; got 3"),
        ({"fit": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_bad_input(config, options, message, capsys):
    assert main(["compare", "--config", config(**options)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("qattn: error: ") and message in errors[0]
