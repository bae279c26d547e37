"""`qattn` on languages whose entropy is known: the excess stands in the log and the tables; options are checked."""

import csv
from pathlib import Path

import pytest

from lightning_modules import cli


def test_excess_is_logged_and_printed(fit, capsys):
    corpus = ["--data.corpus", "markov:order=2,symbols=4,seed=3,length=4001"]
    assert fit(*corpus, "--trainer.max_steps", "5", "--run", "a") == 0
    with open("runs/a/metrics.csv") as file:
        (row,) = (row for row in csv.DictReader(file) if row["val_excess"])
    assert float(row["val_loss"]) - float(row["val_optimum"]) == pytest.approx(float(row["val_excess"]), rel=1e-5)
    assert float(row["val_excess_error"]) > 0
    capsys.readouterr()
    for command, stage in (("validate", "val"), ("test", "test")):  # the corpus is known from the checkpoint
        assert cli.main([command, "--ckpt_path", "runs/a"]) == 0
        table = capsys.readouterr().out
        assert all(f"{stage}_{name}" in table for name in ("optimum", "excess", "excess_error"))
        assert "LEAKS" not in table
    assert Path("runs/a/config.yaml").read_text().count("corpus: markov:order=2,symbols=4,seed=3,length=4001") == 1


def test_a_wrong_option_is_one_line(refused, tiny):
    message = refused("fit", *tiny, "--data.corpus", "hidden-markov:state=3")
    assert "'state=3' is no option of the corpus hidden-markov; it takes states, symbols, concentration" in message
