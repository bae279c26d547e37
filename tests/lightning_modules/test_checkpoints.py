"""Checkpoints in a fresh process; damaged, foreign and malicious ones; files whole or not at all."""

import hashlib
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning as L
import pennylane as qml
import pytest
import torch

from lightning_modules import checkpoints
from lightning_modules.checkpoints import PlainCheckpointIO, first_difference, load_weights, read_checkpoint, resolve
from lightning_modules.language_model import LanguageModel
from lightning_modules.tokenizers import BPETokenizer, CharTokenizer
from pennylane_qattn import ATTENTION, QISA, VALUES, FunctionAnsatz

ROOT = Path(__file__).parents[2]
TINY = {"num_layers": 2, "num_heads": 1, "embed_dim": 5, "block_size": 7}


def build(attention="classical", seed=0, tokenizer=None, **options):
    torch.manual_seed(seed)
    return LanguageModel(tokenizer or CharTokenizer("abcdé\n"), attention=attention, **{**TINY, **options}).eval()


def save(model, path):
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False, plugins=[PlainCheckpointIO()]
    )
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=False)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save(build(), tmp_path / "model.ckpt")


def tokens(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.tokenizer.vocab_size, (3, 7), generator=generator)


def digest(model):
    with torch.no_grad():
        logits = model(tokens(model))
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


# --- what a checkpoint holds ------------------------------------------------------------------------------------


def my_circuit(weights, wires):
    for wire, angle in zip(wires, weights, strict=True):
        qml.RY(angle, wires=wire)
    qml.CNOT(wires=wires[:2])
    qml.IsingXY(weights[0] * weights[-1], wires=wires[:2])


FRESH = """
import hashlib, sys, torch
from lightning_modules.language_model import LanguageModel
torch.set_num_threads(1)
for path in sys.argv[1:]:
    model = LanguageModel.load_from_checkpoint(path)
    tokens = torch.randint(model.tokenizer.vocab_size, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        print(hashlib.sha256(model(tokens).numpy().tobytes()).hexdigest(), model.tokenizer.to_plain() is not None)
assert "test_checkpoints" not in "".join(sys.modules)
"""


def test_the_same_logits_bit_for_bit_in_a_fresh_process_with_nothing_else(tmp_path):
    models = {name: build(name, seed=i) for i, name in enumerate(ATTENTION)}
    models |= {values: build(QISA(values=values, trainable=values != "circuit"), seed=3) for values in VALUES}
    models["own ansatz"] = build(QISA(ansatz=FunctionAnsatz(my_circuit, weight_shape=("wires",)), seed=3))
    models["bpe"] = build(
        "classical", tokenizer=BPETokenizer.train("the cat and the dog. " * 9, 270), preset="gpt1-tiny"
    )
    models["double"] = build(QISA(seed=4)).double()
    paths = [save(model, tmp_path / f"{i}.ckpt") for i, model in enumerate(models.values())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    run = [sys.executable, "-c", FRESH, *map(str, paths)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[::2] == [digest(model) for model in models.values()]


@pytest.mark.parametrize("name", ["qisa", "qisa-absorbed", "qsann-multi"])
def test_words_replace_those_of_a_model_from_another_seed(name):
    mechanism = ATTENTION[name]
    first, second = build(mechanism(seed=1), seed=1), build(mechanism(seed=2), seed=2)
    assert digest(first) != digest(second)
    load_weights(second, first.state_dict())
    assert digest(first) == digest(second)


def test_content_is_plain_and_holds_no_class_path(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    description = content["hyper_parameters"]
    assert description["format"] == "pennylane-qattn" and description["attention"]["name"] == "classical"
    assert not any("_class_path" in key or "instantiator" in key for key in (*content, *description))
    with zipfile.ZipFile(checkpoint) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        data = archive.read(name)
    assert b"lightning" not in data.replace(b"pytorch-lightning_version", b"") and b"pennylane_qattn" not in data


def test_precision_is_that_of_the_checkpoint(tmp_path):
    model = build(QISA()).double()
    loaded = LanguageModel.load_from_checkpoint(save(model, tmp_path / "a.ckpt"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert digest(loaded) == digest(model)


def test_a_tied_output_layer_stays_tied(tmp_path):
    model = build(preset="gpt1-tiny")
    loaded = LanguageModel.load_from_checkpoint(save(model, tmp_path / "a.ckpt"))
    assert loaded.gpt.head.weight is loaded.gpt.token_embedding.weight


def test_a_folder_of_a_run_means_its_best_checkpoint(tmp_path):
    assert resolve(tmp_path) == tmp_path
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").touch()
    assert resolve(tmp_path) == folder / "last.ckpt"
    (folder / "best.ckpt").touch()
    assert resolve(tmp_path) == resolve(folder) == folder / "best.ckpt"
    assert resolve(folder / "last.ckpt") == folder / "last.ckpt"


# --- files from elsewhere ---------------------------------------------------------------------------------------


def refusal(path):
    """The one line that refuses a checkpoint."""
    with pytest.raises(ValueError) as error:
        LanguageModel.load_from_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_truncated(checkpoint, fraction):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(len(data) * fraction)])
    assert "damaged" in refusal(checkpoint)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_changed(checkpoint, seed):
    """Wherever it is, either the change is found, or it is of no consequence."""
    expected = digest(LanguageModel.load_from_checkpoint(checkpoint))
    data, rng = bytearray(checkpoint.read_bytes()), random.Random(seed)
    start = rng.randrange(len(data) - 8)
    data[start : start + 8] = rng.randbytes(8)
    checkpoint.write_bytes(data)
    try:
        assert digest(LanguageModel.load_from_checkpoint(checkpoint)) == expected
    except ValueError as error:
        assert "\n" not in str(error) and "damaged" in str(error)


def test_a_changed_weight(checkpoint):
    data = bytearray(checkpoint.read_bytes())
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]["gpt.head.weight"].numpy().tobytes()
    data[data.index(weights) + 3] ^= 1
    checkpoint.write_bytes(data)
    assert "damaged" in refusal(checkpoint)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(range(256)) * 20])
def test_no_checkpoint_at_all(tmp_path, data):
    path = tmp_path / "a.ckpt"
    path.write_bytes(data)
    assert "damaged" in refusal(path) or "another program" in refusal(path)


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, {"weight": torch.ones(3)}, [1, 2], torch.ones(2), {"hyper_parameters": {"lr": 1}}]
)
def test_of_another_program(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    assert "of another program" in refusal(tmp_path / "a.ckpt")


def test_missing_or_a_folder(tmp_path):
    assert "no checkpoint" in refusal(tmp_path / "nothing.ckpt")
    assert "no checkpoint" in refusal(tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["hyper_parameters", "callbacks", "state_dict"])
def test_malicious(checkpoint, tmp_path, legacy, place):
    content = torch.load(checkpoint, weights_only=True)
    content[place]["x"] = Evil(tmp_path / "pwned")
    torch.save(content, checkpoint, _use_new_zipfile_serialization=not legacy)
    assert "refused" in refusal(checkpoint) and "posix.mkdir" in refusal(checkpoint)
    with pytest.raises(ValueError, match="refused"):
        PlainCheckpointIO().load_checkpoint(checkpoint, weights_only=False)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpoint, weights_only=True)
    torch.load(checkpoint, weights_only=False)
    assert (tmp_path / "pwned").exists()  # it would have worked


def edit(checkpoint, change):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["hyper_parameters"].update(version=2), "version 2"),
        (lambda c: c["hyper_parameters"]["attention"].update(name="evil.Module"), "unknown attention 'evil.Module'"),
        (lambda c: c["hyper_parameters"].update(attention={"class_path": "evil.Module"}), "needs the keys"),
        (lambda c: c["hyper_parameters"]["attention"].update(hurry=1), "no option 'hurry'"),
        (lambda c: c["hyper_parameters"]["gpt"].pop("embed_dim"), "embed_dim"),
        (lambda c: c["hyper_parameters"]["gpt"].update(num_layers="two"), "num_layers"),
        (lambda c: c["hyper_parameters"].pop("tokenizer"), "not complete"),
        (lambda c: c["hyper_parameters"]["tokenizer"].update(name="evil"), "not a tokenizer's data"),
        (lambda c: c["hyper_parameters"]["optimisation"].update(hurry=1), "hurry"),
        (lambda c: c["hyper_parameters"]["optimisation"].update(learning_rate=-1.0), "learning_rate"),
        (lambda c: c["state_dict"].pop("gpt.head.bias"), "lacks the tensor gpt.head.bias"),
        (lambda c: c["state_dict"].update(extra=torch.ones(1)), "extra"),
        (lambda c: c["state_dict"].update({"gpt.head.bias": torch.ones(1)}), r"gpt.head.bias of shape \[1\]"),
        (lambda c: c.pop("state_dict"), "damaged"),
    ],
)
def test_descriptions_that_do_not_fit(checkpoint, change, message):
    edit(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        LanguageModel.load_from_checkpoint(checkpoint)
    refusal(checkpoint)


# --- writing ----------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file_and_nothing_else(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        PlainCheckpointIO().save_checkpoint({"a": 1}, checkpoint)
    assert checkpoint.read_bytes() == before and os.listdir(checkpoint.parent) == [checkpoint.name]


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    bad = {"state_dict": {}, "callbacks": {"Mine": {"when": [random.Random()]}}}
    with pytest.raises(ValueError, match=r"checkpoint\['callbacks'\]\['Mine'\]\['when'\]\[0\] is a Random"):
        PlainCheckpointIO().save_checkpoint(bad, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        PlainCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "file" / "a.ckpt")


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, None),
        ({"a": (1, 2)}, {"a": [1, 2]}, None),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b is 1 in the checkpoint and 2 here"),
        ({"a": 1}, {"a": 1, "b": 2}, "b is missing in the checkpoint"),
        ({"a": 1, "b": 2}, {"a": 1}, "b is missing here"),
        ({"a": "x" * 99}, {"a": 1}, f"a is '{'x' * 56}... in the checkpoint and 1 here"),
    ],
)
def test_first_difference(then, now, expected):
    assert first_difference(then, now) == expected


def test_reading_onto_the_meta_device_reads_no_weights(checkpoint):
    content = read_checkpoint(checkpoint, map_location="meta")
    assert content["state_dict"]["gpt.head.bias"].is_meta
