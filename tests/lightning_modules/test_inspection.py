import pytest
import torch

from lightning_modules.inspection import attention_maps, circuit_drawing, is_causal
from lightning_modules.language_model import LanguageModel
from lightning_modules.tokenizers import CharTokenizer
from pennylane_qattn import ATTENTION


def model(attention, **options):
    torch.manual_seed(3)
    sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": 6, "block_size": 7, **options}
    return LanguageModel(CharTokenizer("abcde"), attention=attention, **sizes).eval()


@pytest.mark.parametrize("name", ATTENTION)
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


@pytest.mark.parametrize("name", ATTENTION)
def test_registered_mechanisms_are_causal(name):
    assert is_causal(model(name).gpt)


def test_what_looks_ahead_is_found():
    assert not is_causal(model(ATTENTION.build("qisa", is_causal=False)).gpt)


def test_one_token_has_no_future():
    assert is_causal(model("classical", block_size=1).gpt)


def test_drawing():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure = circuit_drawing(model("qisa"))
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"RX", "RY"} <= texts and pyplot.get_fignums() == before
    assert circuit_drawing(model("classical")) is None
