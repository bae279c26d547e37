"""`qattn certify`: of attentions, checkpoints, anybody's modules and Hugging Face's models; exit status and errors."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_modules import certify_command, cli
from pennylane_qattn import ATTENTION, QISA, causality

SMALL = ["--embed_dim", "6", "--num_heads", "2", "--block_size", "5"]
MINE = """
import torch
from torch import nn

class Sums(nn.Module):
    def __init__(self, leaks=False):
        super().__init__()
        self.leaks, self.embedding, self.head = leaks, nn.Embedding(11, 3), nn.Linear(3, 11)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x.flip(1).cumsum(1).flip(1) if self.leaks else x.cumsum(1))

class Width(nn.Module):
    def forward(self, x):
        return x.cumsum(1)

def leaking():
    return Sums(leaks=True)

def wrong():
    raise KeyError("x")

def text():
    return "text"

class Large(Sums):
    def forward(self, tokens):
        self.leaks = len(tokens) > 40
        return super().forward(tokens)

number, module = 3, Sums()
"""


@pytest.fixture
def certify(capsys):
    """Runs `qattn certify`; gives exit status and stdout."""

    def certify(*arguments):
        capsys.readouterr()
        return cli.main(["certify", *map(str, arguments)]), capsys.readouterr().out

    return certify


@pytest.fixture
def mine():
    Path("mine.py").write_text(MINE)
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("mine", None)


# --- attentions -------------------------------------------------------------------------------------------------

CAUSAL = sorted(name for name, cls in ATTENTION.items() if not getattr(cls, "is_published", False))
PUBLISHED = sorted(set(ATTENTION) - set(CAUSAL))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_attentions(certify, name):
    status, text = certify(name, *SMALL)
    assert status == 0 and "causal" in text and "LEAKS" not in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_attentions_leak(certify, name):
    status, text = certify(name, *SMALL)
    assert status == 1 and "LEAKS" in text


def test_options_of_an_attention(certify, monkeypatch):
    status, text = certify("classical", *SMALL, "--option", "is_causal=false")
    assert status == 1 and "LEAKS" in text
    seen = caught(monkeypatch)
    assert certify("qisa", "--option", "split=true", "--option", "ansatz=basic-entangler", "--num_heads", "4")[0] == 0
    ((attention,), options) = seen
    assert attention.num_heads == 4 and attention.embed_dim == 16 and options.keys() == {"name"}
    assert attention.value_map.ansatz == QISA(ansatz="basic-entangler").ansatz


def caught(monkeypatch, verdict="causal"):
    """The arguments of the next certificate, which has this verdict."""
    seen = []
    found = SimpleNamespace(passes=verdict == "causal", to_plain=lambda: {"verdict": verdict})
    monkeypatch.setattr(causality, "certify", lambda *args, **options: seen.extend((args, options)) or found)
    return seen


def test_options_of_the_certificate(certify, monkeypatch):
    seen = caught(monkeypatch)
    arguments = "--length 7 --vocab_size 13 --batch_size 2 --modes train --time_limit 9.5 --seed 3"
    assert certify("qisa", *arguments.split())[0] == 0
    wanted = dict(length=7, vocab_size=13, batch_size=2, modes=("train",), time_limit=9.5, seed=3)
    assert wanted.items() <= seen[1].items()
    seen = caught(monkeypatch)
    assert certify("qisa")[0] == 0
    assert seen[1].keys() == {"name"}  # the rest is left to the certificate


@pytest.mark.parametrize("verdict, status", [("causal", 0), ("LEAKS", 1), ("undecided", 1)])
def test_exit_status(certify, monkeypatch, verdict, status):
    caught(monkeypatch, verdict)
    assert certify("qisa")[0] == status


def test_undecided_is_said(certify):
    status, text = certify("classical", *SMALL, "--time_limit", "1e-9")
    assert status == 1 and "undecided" in text


def test_weights_are_drawn_from_the_seed(certify):
    """And the same target twice gives the same certificate."""
    numbers = [
        json.loads(certify("classical", *SMALL, "--option", "is_causal=false", "--json", "--seed", seed)[1])
        for seed in (1, 1, 2)
    ]
    sizes = [number["leak"]["size"] for number in numbers]
    assert sizes[0] == sizes[1] != sizes[2]


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_checkpoints(fit, certify, refused):
    assert fit("--run", "a", "--trainer.max_steps", "3") == 0
    for target in ("runs/a", "runs/a/checkpoints/last.ckpt"):
        status, text = certify(target)
        assert status == 0 and "causal" in text
    leaking = ["--model.attention.is_causal", "false", "--allow-noncausal"]
    assert fit("--run", "b", "--trainer.max_steps", "3", *leaking) == 0
    status, text = certify("runs/b", "--length", "3")
    assert status == 1 and "LEAKS" in text and "blocks.0.attention" in text
    assert "another program" in refused("certify", foreign())


def foreign():
    import torch

    torch.save({"a": 1}, "foreign.ckpt")
    return "foreign.ckpt"


# --- anybody's modules ------------------------------------------------------------------------------------------


def test_a_module_of_ones_own(certify, mine):
    tokens = ["--vocab_size", "11", "--length", "5"]
    for target, status in (("mine:Sums", 0), ("mine:module", 0), ("mine:leaking", 1)):
        found, text = certify(target, *tokens)
        assert found == status and target in text
    assert certify("mine:Width", "--embed_dim", "3", "--length", "5")[0] == 0


def test_a_module_that_leaks_in_large_batches(certify, mine):
    arguments = ["mine:Large", "--vocab_size", "11", "--length", "5"]
    for size, expected in (("40", 0), ("41", 1)):
        status, text = certify(*arguments, "--run_batch_size", size)
        assert status == expected and "large calls" in text
    assert certify(*arguments)[0] == 0


def test_a_module_that_cannot_be_had(refused, mine):
    assert refused("certify", "mine:nothing") == "'mine' has no 'nothing'; check the name"
    assert refused("certify", "mine:wrong") == "mine:wrong() failed: KeyError: 'x' (QATTN_DEBUG=1 shows where)"
    assert refused("certify", "mine:text") == "mine:text() gave a str; it must give a torch module"
    assert "mine:number is a int; name a torch module" in refused("certify", "mine:number")
    assert "cannot import 'nowhere': ModuleNotFoundError" in refused("certify", "nowhere:x")
    Path("broken.py").write_text("x = (")
    assert "cannot import 'broken': SyntaxError" in refused("certify", "broken:x")


# --- Hugging Face -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GPT2", "OpenAIGPT"])
def test_hugging_face_models(certify, kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(vocab_size=13, n_positions=7, n_embd=6, n_layer=2, n_head=2)
    getattr(transformers, f"{kind}LMHeadModel")(config).save_pretrained("theirs")
    for target in ("theirs", "hf:theirs"):
        status, text = certify(target)
        assert status == 0 and target in text and "LEAKS" not in text


def test_hugging_face_models_that_cannot_be_had(refused, monkeypatch):
    pytest.importorskip("transformers")
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text("{}")
    assert "cannot load 'theirs': " in refused("certify", "theirs")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused("certify", "hf:./nowhere")
    assert "cannot load 'hf:./nowhere': " in line
    assert line.endswith("without a network give one that is on disk, hf:FOLDER")
    assert "needs a name behind it" in refused("certify", "hf:")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'pennylane-qattn[hf]'" in refused("certify", "theirs")


# --- JSON -------------------------------------------------------------------------------------------------------


def test_json(certify):
    status, text = certify("classical", *SMALL, "--option", "is_causal=false", "--json")
    content = json.loads(text)
    assert status == 1 and content["verdict"] == "LEAKS" and content["leak"]["size"] > 0
    status, text = certify("classical", *SMALL, "--json", "out/certificate.json")
    content = json.loads(Path("out/certificate.json").read_text())
    assert status == 0 and content["verdict"] == "causal" and content["leak"] is None
    assert "causal" in text and not text.startswith("{")


def test_json_is_written_whole_or_not_at_all(certify, refused, monkeypatch):
    Path("certificate.json").write_text("before")
    caught(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(certify_command.json, "dumps", lambda *args, **options: [][0])
        assert "IndexError" in refused("certify", "classical", "--json", "certificate.json", status=1)
    assert Path("certificate.json").read_text() == "before" and len(list(Path().glob("*certificate*"))) == 1
    Path("folder").mkdir()
    assert "it is a folder" in refused("certify", "classical", "--json", "folder")


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: TARGET; see qattn certify --help"),
        (["nope"], "cannot certify 'nope': it is no file or folder, and no attention (classical, "),
        (["nope.ckpt"], "there is no checkpoint 'nope.ckpt'"),
        (["empty"], "the folder 'empty' holds neither a checkpoint that qattn fit wrote nor the config.json"),
        (["text.txt"], "'text.txt' is damaged, or no checkpoint at all"),
        (["qisa", "--embed_dim", "6", "--num_heads", "4"], "embed_dim must be divisible by num_heads; got 6 and 4"),
        (["qisa", "--option", "nope=1"], "attention 'qisa' has no option 'nope'; its options: "),
        (["qisa", "--option", "split"], "an option is written NAME=VALUE, as in values=linear; got 'split'"),
        (["qisa", "--option", "split=[1"], "the value of option split cannot be read: '[1'"),
        (["nope.ckpt", "--option", "split=true"], "--option is for an attention by its name; 'nope.ckpt' is none of"),
        (["qisa", "--length", "1"], "length must be at least 2; got 1"),
        (["qisa", "--block_size", "0"], "block_size must be at least 1; got 0"),
        (["qisa", "--batch_size", "0"], "batch_size must be at least 1; got 0"),
        (["qisa", "--run_batch_size", "0"], "run_batch_size must be at least 1; got 0"),
        (["qisa", "--seed", "-1"], "seed must be at least 0; got -1"),
        (["qisa", "--time_limit", "0"], "time_limit must be positive and finite, in seconds; got 0.0"),
        (["qisa", "--modes", "test"], "modes are eval and train; got 'test'"),
        (["qisa", "--lenght", "3"], "unknown option 'lenght'; did you mean 'length'?"),
    ],
)
def test_bad_input(refused, text_file, arguments, message):
    Path("empty").mkdir()
    assert message in refused("certify", *arguments)
