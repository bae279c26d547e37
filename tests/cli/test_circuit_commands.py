"""`qattn draw`, `qattn resources` and `qattn export-qasm`: what they write, and bad input."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from dense_reference import amplitude_state, qisa_values
from matplotlib import image
from qasm_interpreter import parity, probabilities, run

from lightning_modules import cli
from lightning_modules.checkpoints import PlainCheckpointIO
from lightning_modules.inspection import attentions_of
from lightning_modules.language_model import LanguageModel
from lightning_modules.tokenizers import CharTokenizer
from pennylane_qattn import ATTENTION


def model_of(attention):
    torch.manual_seed(0)
    sizes = dict(num_layers=2, num_heads=2, embed_dim=6, block_size=5)
    return LanguageModel(CharTokenizer("abcd é"), attention=attention, **sizes).eval()


def save(model, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": model.state_dict(), "hyper_parameters": model.to_plain()}
    PlainCheckpointIO().save_checkpoint(content, path)
    return str(path)


@pytest.fixture(scope="module")
def model():
    return model_of("qsann")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    return save(model, tmp_path_factory.mktemp("checkpoint") / "model.ckpt")


@pytest.fixture
def say(capsys):
    def say(*arguments):
        assert cli.main(list(arguments)) == 0
        return capsys.readouterr().out

    return say


# --- draw -------------------------------------------------------------------------------------------------------


def test_draw_a_preset(say, tmp_path):
    text = say("draw", "--preset", "qisa-16", "--attention", "qisa")
    assert "layer 1, head 1, value map; qubits: 4, trainable angles: 12" in text
    assert text.count("─RX─") == 4 and "picture: circuit.png" in text
    assert image.imread(tmp_path / "circuit.png").shape[0] > 100


def test_draw_a_checkpoint(say, checkpoint, model, tmp_path):
    options = ["--checkpoint", checkpoint, "--layer", "2", "--head", "2", "--map", "key", "--angles", "3"]
    text = say("draw", *options, "--output", "new/drawing.svg")
    for angle in attentions_of(model.gpt)[1].key_map.weights[1].flatten().tolist():
        assert f"({angle:.3f})" in text
    assert (tmp_path / "new" / "drawing.svg").read_text().startswith("<?xml")


def test_draw_the_gates_of_an_input(say, checkpoint, tmp_path):
    (tmp_path / "x.json").write_text("[0, 0, 0, 0, 1, 1]")
    text = say("draw", "--checkpoint", checkpoint, "--level", "gates", "--angles", "--input", "x.json")
    assert f"RY({np.pi:.2f})" in text  # everything is in the second half
    assert "RY(" not in say("draw", "--checkpoint", checkpoint, "--level", "gates")


def test_draw_the_run_of_a_folder(say, model, tmp_path):
    save(model, tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert "layer 1, head 1, value map" in say("draw", "--checkpoint", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --checkpoint and --preset"),
        (["--preset", "qisa-16", "--checkpoint", "x"], "give one of --checkpoint and --preset"),
        (["--preset", "qisa-16"], "a preset is a size without an attention; give --attention, one of classical"),
        (["--preset", "qisa-17", "--attention", "qisa"], "unknown preset 'qisa-17'; choose from gpt1"),
        (["--preset", "qisa-16", "--attention", "magic"], "'magic'"),
        (["--preset", "qisa-16", "--attention", "classical"], "Classical attention has no circuits"),
        (["--preset", "qisa-16", "--attention", "qisa", "--layer", "7"], "layer must be 1 to 6; got 7"),
        (["--preset", "qisa-16", "--attention", "qisa", "--layer", "0"], "layer must be an integer of at least 1"),
        (["--preset", "qisa-16", "--attention", "qisa", "--head", "2"], "head must be 1 to 1; got 2"),
        (["--preset", "qisa-16", "--attention", "qisa", "--map", "key"], "the key map of QISA attention is no circuit"),
        (["--preset", "qisa-16", "--attention", "qisa", "--angles"], "a preset has no trained angles"),
        (["--preset", "qisa-16", "--attention", "qisa", "--output", "x.txt"], "no picture can be written as 'x.txt'"),
        (["--checkpoint", "nowhere.ckpt"], "there is no checkpoint 'nowhere.ckpt'"),
        (["--checkpoint", "x", "--level", "gates", "--angles"], 'give --text "TEXT" or --input F'),
        (["--checkpoint", "x", "--text", "abc"], "add --level gates --angles"),
        (["--checkpoint", "x", "--attention", "qisa"], "leave --attention qisa out"),
        (["--checkpoint", "x", "--angles", "-1"], "decimals must be an integer of at least 0; got '-1'"),
        (["--preset", "gpt1", "--attention", "qisa", "--level", "gates"], "a picture holds 400 layers"),
        (["--preset", "qisa-16", "--attention", "qisa", "--output", "a.txt/x.png"], "a.txt' is a file; name a file in"),
    ],
)
def test_bad_drawings(refused, options, message, tmp_path):
    (tmp_path / "a.txt").touch()
    assert message in refused("draw", *options)
    assert not list(tmp_path.glob("*.png"))


# --- export-qasm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2", "3"])
def test_export_a_trained_head(say, checkpoint, model, tmp_path, version):
    """The programs measure what the model computes, from the text alone to each value of the head."""
    options = ["--text", "ab é", "--position", "2", "--layer", "2", "--head", "2", "--version", version]
    text = say("export-qasm", "--checkpoint", checkpoint, *options, "--output", "out")
    assert "written to out: circuit.qasm, setting-1.qasm" in text
    manifest = json.loads((tmp_path / "out" / "observables.json").read_text())
    version = f"{version}.0"
    assert manifest["openqasm"] == version and manifest["qubits"] == 3

    attention = attentions_of(model.gpt)[1]
    seen = []
    hook = attention.value_map.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model.gpt(torch.tensor([model.tokenizer.encode("ab é")]))
    hook.remove()
    ((read, features),) = seen
    np.testing.assert_allclose(manifest["input"], read[0, 2].detach().numpy(), rtol=1e-7)
    values = [
        parity(probabilities((tmp_path / "out" / each["file"]).read_text(), version), each["bits"])
        for each in manifest["observables"]
    ]
    np.testing.assert_allclose(values, features[0, 1, 2].detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(values, [each["exact"] for each in manifest["observables"]], atol=1e-12)
    angles = attention.value_map.weights[1, 0].detach().double().numpy()
    expected = qisa_values(np.array(manifest["input"]), angles, [each["word"] for each in manifest["observables"]])
    np.testing.assert_allclose(values, expected, atol=1e-12)
    state, measured = run((tmp_path / "out" / "circuit.qasm").read_text(), version)
    assert measured is None and np.isclose(np.linalg.norm(state), 1)
    for file in (tmp_path / "out").glob("*.qasm"):
        assert file.read_text().isascii()


def test_export_for_numbers(say, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("[0, 0, 0, 0, 0, 0]"))
    say("export-qasm", "--checkpoint", checkpoint, "--input", "-")
    text = (tmp_path / "qasm" / "circuit.qasm").read_text()
    gates = text.splitlines()
    first = next(i for i, line in enumerate(gates) if line.startswith("rx("))
    state, _ = run("\n".join(gates[:first]), "2.0")
    np.testing.assert_allclose(state, amplitude_state(np.zeros(6), 3))  # |000>


def test_export_of_states(say, tmp_path):
    checkpoint = save(model_of("overlap"), tmp_path / "overlap.ckpt")
    say("export-qasm", "--checkpoint", checkpoint, "--text", "a")
    assert sorted(file.name for file in (tmp_path / "qasm").iterdir()) == ["circuit.qasm", "observables.json"]
    assert json.loads((tmp_path / "qasm" / "observables.json").read_text())["observables"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a program encodes one input; give --text"),
        (["--text", "a", "--input", "x"], "give --text or --input, not both"),
        (["--position", "1", "--input", "x"], "--position is that of a token in a text"),
        (["--text", "abx"], "character 'x' at position 2 is outside the vocabulary"),
        (["--text", ""], "the text must have 1 to 5 tokens"),
        (["--text", "ab", "--position", "2"], "position must be 0 to 1 in this text of 2 tokens; got 2"),
        (["--text", "ab", "--layer", "3"], "layer must be 1 to 2; got 3"),
        (["--text", "ab", "--version", "4"], "--version"),
        (["--input", "nowhere.json"], "nowhere.json: no such file"),
        (["--input", "short.json"], "the head encodes 6 numbers; 'short.json' has 2"),
        (["--input", "text.json"], "'text.json' must hold a list of 6 finite numbers"),
        (["--input", "nan.json"], "'nan.json' must hold a list of 6 finite numbers"),
        (["--input", "broken.json"], "'broken.json' is not JSON"),
        (["--input", "binary.json"], "'binary.json' is not UTF-8"),
    ],
)
def test_bad_exports(refused, checkpoint, options, message, tmp_path):
    for name, content in (("short", "[1, 2]"), ("text", '["a"]'), ("nan", "[1, 2, 3, 4, 5, NaN]"), ("broken", "[1")):
        (tmp_path / f"{name}.json").write_text(content)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    assert message in refused("export-qasm", "--checkpoint", checkpoint, *options)
    assert not (tmp_path / "qasm").exists()


# --- resources --------------------------------------------------------------------------------------------------


def test_resources_of_a_checkpoint(say, checkpoint):
    text = say("resources", "--checkpoint", checkpoint, "--batch_size", "3", "--accuracy", "0.1")
    assert "layers: 2, heads: 2, embedding: 6, tokens of a training step: 3 x 5 = 15" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    rows = {label: values for label, *values in cells}
    assert rows["circuits"] == ["8", "4"] and rows["qubits"] == ["3", "3"]
    assert rows["parameter-shift"][0] == f"{15 * 8 * (1 + 18 + 1):,} / {15 * 8 * (1 + 18 + 12):,}"
    assert rows["adjoint"][0] == f"{15 * 8 * 3:,} / -"
    assert rows["shots for a standard"] == ["100", "100"]  # and so on in the next line


def test_resources_of_a_preset(say):
    plain = json.loads(say("resources", "--preset", "qisa-16", "--json", "--directions", "5"))
    assert list(plain["attentions"]) == list(ATTENTION)
    assert plain["attentions"]["classical"] == [] and plain["tokens_per_training_step"] == 64 * 16
    (values,) = plain["attentions"]["qisa"]
    assert values["circuits"] == 6 and values["circuit"]["angles"] == 12 and values["shots_per_setting"]
    assert values["executions_per_training_step"]["spsa"]["exact"]["total"] == 64 * 16 * 6 * (1 + 10 + 1)
    assert values["executions_per_token"] == {"exact": 6, "sampling": sum(m["settings"] for m in values["members"])}
    text = say("resources", "--preset", "qisa-16", "--attention", "classical")
    assert "without circuits in their maps: classical" in text


@pytest.mark.slow
def test_resources_of_gpt1(say):
    plain = json.loads(say("resources", "--preset", "gpt1", "--attention", "qisa", "--json"))
    (values,) = plain["attentions"]["qisa"]
    assert values["circuits"] == 144 and values["circuit"]["qubits"] == 10
    assert values["circuit"]["decomposed"]["by_name"] == {"CNOT": 1032, "RX": 10, "RY": 1043}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --checkpoint and --preset"),
        (["--preset", "qisa-16", "--batch_size", "0"], "batch_size must be an integer of at least 1; got '0'"),
        (["--preset", "qisa-16", "--accuracy", "0"], "accuracy of an expectation value must lie in (0, 1]; got 0.0"),
        (["--preset", "qisa-16", "--confidence", "1"], "confidence must lie in (0, 1); got 1.0"),
        (["--preset", "qisa-16", "--attention", "magic"], "'magic'"),
    ],
)
def test_bad_counts(refused, options, message):
    assert message in refused("resources", *options)
