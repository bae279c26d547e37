"""Texts that are odd in every way from the file through training, generation and evaluation, and files that are no
texts."""

import io
import json
import math
import re
import sys

import pytest

from lightning_modules import cli
from lightning_modules.data import TextDataModule
from lightning_modules.language_model import LanguageModel

#: A byte order mark, line ends, controls, both directions, four bytes, marks, noncharacters, names of tokens.
ODD = (
    "\ufeffa\r\nb\rc\n\n\x85d\u2028e\u2029f\x0bg\x0ch\x1ci\t\0\0NUL שלום \u202eعليكم\u200f \u2067x\u2069 "
    "👩‍👩‍👧‍👦 𝔘 \U0010ffff e\u0301\u0323 é a\u0300\u0300\u0300 क्षि \ue000\ufffd\ufffe\uffff "
    "<unk> </w> [PAD] \\n {'a': \"%s\"}\r"
)
BLOCK = 7


@pytest.mark.parametrize("length", [100_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_an_odd_text_goes_through_all_commands(tmp_path, capsys, monkeypatch, tokenizer, length):
    training, held_out = ODD * 3 + "x𝔘" * (length // 5), ODD * 3  # a line of so many bytes, without a blank
    text = training + held_out * 2
    assert len(training.encode()) > length
    (tmp_path / "odd.txt").write_bytes(text.encode())
    fractions = {"train_fraction": len(training) / len(text), "val_fraction": len(held_out) / len(text)}
    data = {"corpus": "odd.txt", "tokenizer": tokenizer, "bpe_vocab_size": 270, "stride": BLOCK, **fractions}
    model = {"attention": "classical", "num_layers": 1, "embed_dim": 4, "block_size": BLOCK}
    trainer = {"max_steps": 3, "val_check_interval": 1, "accelerator": "cpu"}
    options = {"data": data, "model": model, "trainer": trainer}
    arguments = [f"--{kind}.{name}={value}" for kind, part in options.items() for name, value in part.items()]
    assert cli.main(["fit", "--run", "odd", *arguments]) == 0

    codec = LanguageModel.load_from_checkpoint("runs/odd/checkpoints/best.ckpt").tokenizer
    assert codec.decode(codec.encode(text)) == text
    splits = TextDataModule(**data, block_size=BLOCK).splits
    assert [codec.decode(split.tokens.tolist()) for split in splits.values()] == [training, held_out, held_out]

    for command in ("validate", "test"):
        capsys.readouterr()
        assert cli.main([command, "--ckpt_path", "runs/odd"]) == 0
        table = dict(re.findall(r"│ (?:val|test)_(\w+) +│ (\S+) +│", capsys.readouterr().out))
        assert set(table) == {"loss", "bits_per_character", "perplexity", "bleu", "cer", "wer"}
        assert all(math.isfinite(float(value)) for value in table.values())
    assert cli.main(["predict", "--ckpt_path", "runs/odd", "--output", "windows.jsonl"]) == 0
    windows = [json.loads(line) for line in (tmp_path / "windows.jsonl").read_bytes().decode().split("\n")[:-1]]
    assert len(windows) == (len(codec.encode(held_out)) - 1) // BLOCK > 9
    if tokenizer == "char":  # one after the other they are the text; a window of bytes may cut a character in two
        assert held_out.startswith(held_out[0] + "".join(window["target"] for window in windows))
    for window in windows:
        assert all(piece in held_out for piece in re.split("\ufffd+", window["target"]))

    def say(*options):
        capsys.readouterr()
        assert cli.main(["generate", "--checkpoint", "runs/odd", *options]) == 0
        return capsys.readouterr().out

    assert say("--prompt", ODD, "--max_new_tokens", "0") == ODD + "\n"
    written = say("--prompt", ODD, "--max_new_tokens", "29")
    assert written.startswith(ODD) and written == say("--prompt", ODD, "--max_new_tokens", "29", "--stream")
    (tmp_path / "prompts.txt").write_bytes(ODD.encode())
    lines = [line for line in ODD.replace("\r", "\n").split("\n") if line]
    from_file = say("--prompt_file", "prompts.txt", "--max_new_tokens", "0")
    assert re.split(r"^--- prompt \d, sample 1 ---\n", from_file, flags=re.M)[1:] == [f"{line}\n" for line in lines]
    monkeypatch.setattr(sys, "stdin", io.StringIO(ODD))
    assert say("--prompt_file", "-", "--max_new_tokens", "0") == from_file


NO_TEXTS = {
    "Latin-1": ("naïf".encode("latin-1"), 2),
    "UTF-16": ("\ufeffa text".encode("utf-16-le"), 0),
    "cut within a character": ("a 𝔘".encode()[:-1], 2),
    "a surrogate": (b"abc\xed\xa0\x80", 3),
    "overlong": (b"ab\xc0\x80", 2),
    "beyond Unicode": (b"a\xf4\x90\x80\x80", 1),
    "far inside": ("ä\r\n".encode() * 100_000 + b"\x80" + b"end" * 99, 400_000),
}


@pytest.mark.parametrize(("content", "byte"), NO_TEXTS.values(), ids=NO_TEXTS)
def test_a_file_that_is_not_utf8(refused, tiny, tmp_path, content, byte):
    (tmp_path / "bad.txt").write_bytes(content)
    expected = f"'bad.txt' is not UTF-8: byte {byte} is 0x{content[byte]:02x}; convert the file"
    for tokenizer in ("char", "bpe"):
        assert refused("fit", *tiny, "--data.tokenizer", tokenizer, "--data.corpus", "bad.txt") == expected


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_other_bad_texts_for_a_run_that_is_there(fit, refused, tmp_path, tokenizer):
    assert fit("--run", "a", "--trainer.max_steps", "1", "--data.tokenizer", tokenizer) == 0
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"the\nquick \xff")
    run = ("--ckpt_path", "runs/a/checkpoints/last.ckpt")
    assert "'empty.txt' is empty" in refused("validate", *run, "--data.corpus", "empty.txt")
    assert "'bad.txt' is not UTF-8: byte 10 is 0xff" in refused("test", *run, "--data.corpus", "bad.txt")
    generate = ("generate", "--checkpoint", run[1])
    assert refused(*generate, "--prompt_file", "bad.txt").startswith("'bad.txt' is not UTF-8: byte 10 is 0xff")
    assert "there is no prompt" in refused(*generate, "--prompt_file", "empty.txt")
    not_utf8 = b"the \xff".decode("utf-8", "surrogateescape")  # as Python gives it for an argument
    assert r"character '\udcff' at position 4 is outside the vocabulary" in refused(*generate, "--prompt", not_utf8)
