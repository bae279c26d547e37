import math

import pytest
import torch
from matplotlib import pyplot

from lightning_modules.inspection import (
    attention_maps,
    attentions_of,
    circuit_drawing,
    circuit_figure,
    circuit_tape,
    circuit_text,
    head_circuit,
    is_causal,
    layer_input,
)
from lightning_modules.language_model import LanguageModel
from lightning_modules.tokenizers import CharTokenizer
from pennylane_qattn import ATTENTION

#: The published forms see the future, and have their own tests.
CAUSAL = [name for name, mechanism in ATTENTION.items() if not mechanism.is_published]


def model(attention, **options):
    torch.manual_seed(3)
    sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": 6, "block_size": 7, **options}
    return LanguageModel(CharTokenizer("abcde"), attention=attention, **sizes).eval()


@pytest.mark.parametrize("name", CAUSAL)
def test_maps_of_every_layer(name):
    maps, labels = attention_maps(model(name), "abcabcabc")
    assert list(maps) == ["layer 1", "layer 2"] and labels == list("abcabca")
    for weights in maps.values():
        weights = torch.tensor(weights)
        assert weights.shape == (2, 7, 7) and (weights.triu(1) == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))


def test_hooks_are_removed():
    inspected = model("qisa")
    attention_maps(inspected, "ab")
    assert not any(m._forward_pre_hooks for m in inspected.modules())


@pytest.mark.parametrize("name", CAUSAL)
def test_registered_mechanisms_are_causal(name):
    assert is_causal(model(name).gpt)


def test_what_looks_ahead_is_found():
    assert not is_causal(model(ATTENTION.build("qisa", is_causal=False)).gpt)


def test_one_token_has_no_future():
    assert is_causal(model("classical", block_size=1).gpt)


def test_drawing():
    before = pyplot.get_fignums()
    figure = circuit_drawing(model("qisa"))
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"RX", "RY", "amplitude encoding"} <= texts and pyplot.get_fignums() == before
    assert circuit_drawing(model("classical")) is None


def test_which_circuit():
    inspected = model("qsann")
    (first, second) = attentions_of(inspected.gpt)
    found = head_circuit(second, 2, head=2, map="key")
    assert str(found) == "layer 2, head 2, key map" and found.circuit.words == ("ZII",)
    torch.testing.assert_close(found.weights, second.key_map.weights[1].detach().double())
    assert head_circuit(first, 1).map == "value" and head_circuit(first, 1).inputs == slice(0, 6)
    overlap = head_circuit(attentions_of(model("overlap").gpt)[0], 1)
    assert overlap.map == "query" and not overlap.measures_words
    split = attentions_of(model(ATTENTION.build("qisa", split=True)).gpt)[0]
    assert head_circuit(split, 1, head=2).inputs == slice(3, 6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("classical", {}, "Classical attention has no circuits; choose one that has, such as qisa"),
        ("qisa", {"map": "key"}, "the key map of QISA attention is no circuit; choose value"),
        ("qisa", {"head": 3}, "head must be 1 to 2; got 3"),
    ],
)
def test_circuits_that_are_not_there(name, options, message):
    with pytest.raises(ValueError, match=message):
        head_circuit(attentions_of(model(name).gpt)[0], 1, **options)


@pytest.mark.parametrize(
    ("name", "options", "map"),
    [
        ("qisa", {}, "value"),
        ("qisa", {"split": True}, "value"),
        ("qisa", {"span": 2}, "value"),
        ("qsann-multi", {"span": 3}, "query"),
    ],
)
def test_what_a_layer_reads(name, options, map):
    """The vector that a head encodes gives the features that its map computes."""
    inspected = model(ATTENTION.build(name, **options)).double()
    attention = attentions_of(inspected.gpt)[1]
    seen = []
    hook = getattr(attention, f"{map}_map").register_forward_hook(lambda module, args, output: seen.append(output))
    inspected.gpt(torch.tensor([inspected.tokenizer.encode("abcde")]))
    hook.remove()
    for head, position in ((1, 0), (2, 3)):
        read, found = layer_input(inspected, "abcde", 2, position, map)
        assert found == position
        shown = head_circuit(attention, 2, head, map)
        values = shown.circuit.qnode()(read[shown.inputs], shown.weights)
        torch.testing.assert_close(torch.stack(values), seen[0][0, head - 1, position])
    assert layer_input(inspected, "abcde", 2)[1] == 4
    assert not any(module._forward_pre_hooks for module in inspected.modules())


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", None, "the text must have 1 to 7 tokens, the model's block_size; got 0"),
        ("abcdabcd", None, "the text must have 1 to 7 tokens, the model's block_size; got 8"),
        ("abc", 3, "position must be 0 to 2 in this text of 3 tokens; got 3"),
    ],
)
def test_inputs_that_are_not_there(text, position, message):
    with pytest.raises(ValueError, match=message):
        layer_input(model("qisa"), text, 1, position)


def test_text_of_a_circuit():
    shown = head_circuit(attentions_of(model("qisa").gpt)[0], 1)
    text = circuit_text(shown, circuit_tape(shown))
    assert "layer 1, head 1, value map; qubits: 3, trainable angles: 9" in text
    assert text.count("─RX─") == 3 and text.count("amplitude encoding") == 3 and text.count("╭●") == 2
    for word in shown.circuit.words:
        assert word in text
    numbers = circuit_text(shown, circuit_tape(shown), decimals=4)
    for angle in shown.weights.flatten():
        assert f"({angle:.4f})" in numbers
    gates = circuit_text(shown, circuit_tape(shown, torch.arange(6.0), gates=True), decimals=3)
    assert "encoding──" not in gates and gates.count("RY(") == 7 + 6 and gates.count("RX(") == 3
    # the first rotation of the tree: amplitudes 4, 5 against 0, 1, 2, 3
    assert f"RY({2 * math.atan2(41**0.5, 14**0.5):.3f})" in gates


def test_pictures_of_a_circuit():
    shown = head_circuit(attentions_of(model("qisa").gpt)[0], 1)
    texts = {text.get_text() for text in circuit_figure(circuit_tape(shown), decimals=2).axes[0].texts}
    assert {f"RX\n({angle:.2f})" for angle in shown.weights[0, 0]} <= texts
    wide = head_circuit(ATTENTION.build("qisa")(300, 1, 5), 1)
    with pytest.raises(ValueError, match="a picture holds 400 layers of gates, and these are 10"):
        circuit_figure(circuit_tape(wide, gates=True))
