"""Looking into a trained model: attention maps of a text, a drawing of its circuit, whether it sees the future."""

import copy
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.gpt import GPT
from lightning_modules.language_model import LanguageModel
from pennylane_qattn import Attention, CircuitFeatureMap
from pennylane_qattn.causality import largest_leak


@torch.no_grad()
def attention_maps(model: LanguageModel, text: str) -> tuple[dict[str, Any], list[str]]:
    """Attention weights of every layer on a text.

    Args:
        model: a model in evaluation mode.
        text: at most `block_size` tokens of it are used, the first ones.

    Returns:
        The weights `(heads, seq, seq)` by name of the layer, as nested lists, and the tokens as text.
    """
    ids = model.tokenizer.encode(text)[: model.gpt.config.block_size]
    maps: dict[str, Any] = {}

    def record(module: Attention, args: tuple, kwargs: dict) -> None:
        maps[f"layer {len(maps) + 1}"] = module.weights(args[0])[0].cpu().tolist()

    layers = [module for module in model.gpt.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        model.gpt(torch.tensor([ids], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return maps, [model.tokenizer.decode([i]) for i in ids]


def circuit_drawing(model: LanguageModel) -> Figure | None:
    """The circuit of the first head of the first layer that has one."""
    feature_map = next((m for m in model.gpt.modules() if isinstance(m, CircuitFeatureMap)), None)
    if feature_map is None:
        return None
    figure = feature_map.circuits[0].draw()
    pyplot.close(figure)  # PennyLane draws by pyplot, which would keep it for ever
    return figure


def is_causal(gpt: GPT, seed: int = 0) -> bool:
    """Whether changing any token of a random text leaves all logits before it as they were, to the last bit.

    Computed on a float64 copy in evaluation mode.
    """
    size, length = gpt.config.vocab_size, max(2, gpt.config.block_size)
    if gpt.config.block_size < 2 or size < 2:
        return True  # there is no future within one token, or no other token
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(size, (length,), generator=generator)
    others = (tokens + torch.randint(1, size, (length,), generator=generator)) % size
    precise = copy.deepcopy(gpt).cpu().double().eval()

    def forward(batch: Tensor) -> Tensor:
        return precise(batch)

    return largest_leak(forward, tokens, others) == 0.0
