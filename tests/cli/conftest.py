"""A text, a tiny run of `qattn fit` in a folder of its own, and errors as one line."""

import os

import pytest
import torch

from lightning_modules import cli

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(autouse=True)
def _settings_stay_in_the_test(monkeypatch, tmp_path):
    """What `qattn` sets for its process: deterministic algorithms, and the seed in the environment."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def tiny(text_file):
    """Options of a run of a second."""
    return [
        *("--data.corpus", str(text_file), "--data.batch_size", "4", "--data.eval_windows", "7"),
        *("--data.shuffle", "epoch", "--data.stride", "18"),
        *("--model.attention", "classical", "--model.num_layers", "1", "--model.embed_dim", "4"),
        *("--model.block_size", "5", "--model.dropout", "0.3", "--model.warmup_steps", "4"),
        *("--trainer.max_steps", "15", "--trainer.val_check_interval", "4", "--trainer.log_every_n_steps", "1"),
        *("--trainer.accelerator", "cpu", "--checkpoint_every", "3", "--report", "false"),
    ]


@pytest.fixture
def fit(tiny):
    def fit(*options):
        return cli.main(["fit", *tiny, *options])

    return fit


@pytest.fixture
def refused(capsys):
    """Runs `qattn` with these arguments, which are wrong; gives its one line."""

    def refused(*arguments, status=2):
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == status
        captured = capsys.readouterr()
        line = [line for line in captured.err.splitlines() if line.startswith("qattn: error: ")]
        assert len(line) == 1 and captured.err.endswith(line[0] + "\n") and "Traceback" not in captured.err
        assert captured.out == ""
        return line[0].removeprefix("qattn: error: ")

    return refused
