"""`qattn generate`: prompts from everywhere, sampling, streaming, and bad input."""

import io
import sys

import pytest
import torch

from lightning_modules import cli
from lightning_modules.checkpoints import PlainCheckpointIO
from lightning_modules.language_model import LanguageModel
from lightning_modules.tokenizers import CharTokenizer
from pennylane_qattn import QISA


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(num_layers=1, embed_dim=4, block_size=5)
    return LanguageModel(CharTokenizer("abcd "), attention=QISA(), **sizes).eval()


@pytest.fixture
def checkpoint(tmp_path, model):
    path = tmp_path / "model.ckpt"
    content = {"state_dict": model.state_dict(), "hyper_parameters": model.to_plain()}
    PlainCheckpointIO().save_checkpoint(content, path)
    return str(path)


@pytest.fixture
def say(checkpoint, capsys):
    def say(*options):
        assert cli.main(["generate", "--checkpoint", checkpoint, *options]) == 0
        return capsys.readouterr().out

    return say


def test_one_prompt(say, model):
    expected = model.generate(["ab c"], 17, temperature=0.5, top_k=4, top_p=0.9, seed=3)
    options = ["--max_new_tokens", "17", "--temperature", "0.5", "--top_k", "4", "--top_p", "0.9", "--seed", "3"]
    assert say("--prompt", "ab c", *options) == expected[0] + "\n"
    assert say("--prompt", "ab c", *options, "--stream") == expected[0] + "\n"
    assert say("--prompt", "ab c", "--max_new_tokens", "17") != expected[0] + "\n"


def test_many_prompts_and_samples(say, model, tmp_path, monkeypatch):
    texts = model.generate(["ab", "ab", "c", "c", "d d", "d d"], 6)
    expected = "".join(f"--- prompt {i // 2 + 1}, sample {i % 2 + 1} ---\n{text}\n" for i, text in enumerate(texts))
    options = ["--num_samples", "2", "--max_new_tokens", "6"]
    assert say("--prompt", "ab", "--prompt", "c", "--prompt", "d d", *options) == expected
    (tmp_path / "prompts.txt").write_text("c\n\nd d\n")
    assert say("--prompt", "ab", "--prompt_file", str(tmp_path / "prompts.txt"), *options) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\nc\nd d"))
    assert say("--prompt_file", "-", *options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "abx"], "character 'x' at position 2 is outside the vocabulary"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "a", "--prompt", "", "--num_samples", "3"], "prompt 2 is empty; give at least one token"),
        ([], "there is no prompt"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt: no such file or directory; check the path"),
        (["--prompt", "a", "--max_new_tokens", "x"], "max_new_tokens"),
        (["--prompt", "a", "--max_new_tokens", "-1"], "max_new_tokens must not be negative"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top_k", "0"], "top_k must be at least 1"),
        (["--prompt", "a", "--top_p", "1.5"], "top_p"),
        (["--prompt", "a", "--num_samples", "0"], "num_samples must be at least 1"),
        (["--prompt", "a", "--prompt", "b", "--stream"], "only one text can be streamed"),
        (["--prompt", "a", "--device", "abacus"], "unknown device 'abacus'; choose from cpu, cuda, mps"),
        (["--prompt", "a", "--device", "meta"], "unknown device 'meta'; choose from cpu, cuda, mps"),
        (["--prompt", "a", "--nope"], "unknown option 'nope'; see qattn generate --help"),
    ],
)
def test_bad_input(refused, checkpoint, options, message):
    assert message in refused("generate", "--checkpoint", checkpoint, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(refused, checkpoint):
    line = refused("generate", "--checkpoint", checkpoint, "--prompt", "a", "--device", "cuda")
    assert line.startswith("there is no device 'cuda' on this machine; choose from cpu")


def test_bad_checkpoints(refused, tmp_path):
    assert "no checkpoint" in refused("generate", "--checkpoint", tmp_path / "x.ckpt", "--prompt", "a")
    (tmp_path / "x.ckpt").write_bytes(b"abc")
    assert "damaged" in refused("generate", "--checkpoint", tmp_path / "x.ckpt", "--prompt", "a")
    assert "--checkpoint" in refused("generate", "--prompt", "a")


def test_a_file_of_prompts_that_is_not_utf8(refused, checkpoint, tmp_path):
    (tmp_path / "prompts").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused("generate", "--checkpoint", checkpoint, "--prompt_file", tmp_path / "prompts")


def test_a_diverged_model(refused, model, tmp_path):
    model.gpt.head.bias.data.fill_(torch.nan)
    content = {"state_dict": model.state_dict(), "hyper_parameters": model.to_plain()}
    PlainCheckpointIO().save_checkpoint(content, tmp_path / "nan.ckpt")
    assert "not finite" in refused("generate", "--checkpoint", tmp_path / "nan.ckpt", "--prompt", "a")
