"""Amplitude amplification against softmax attention, and sparse products against dense ones with the same matrix."""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.benchmarks import machine
from lightning_modules.benchmarks.checks import check_layer
from lightning_modules.benchmarks.options import (
    add_common,
    name_on,
    positive,
    spread_note,
    synchronize_of,
    two_or_more,
)
from lightning_modules.benchmarks.result import CheckFailed, Column, Result
from lightning_modules.progress import shown
from lightning_modules.timing import forward, forward_and_backward, interleaved_ratios
from pennylane_qattn import Attention, LinearFeatureMap, ScaledDotScore, build_attention
from pennylane_qattn.grover.sparse import SparseAttention
from pennylane_qattn.grover.support import DotProductScores, top_support

LAYERS = (
    Column("layer", "attention layer"),
    Column("inference", "inference", drawn=True),
    Column("training", "forward and backward", drawn=True),
)
PRODUCTS = (
    Column("product", "product with the values"),
    Column("ratio", "time over sparse", drawn=True),
    Column("numbers", "largest tensor, numbers"),
)
WRITTEN_OUT, SPARSE = "softmax, weights written out", "sparse"
WIDTH, HEADS, BATCH = 64, 4, 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py grover`."""
    add_common(parser, rounds=9)
    add = parser.add_argument
    add("--length", type=two_or_more, default=256, metavar="N", help="tokens of the layers (default: %(default)s)")
    add("--keys", type=positive, default=8192, metavar="N", help="keys of the sparse product (default: %(default)s)")
    add("--kept", type=positive, default=32, metavar="N", help="keys that its rows keep (default: %(default)s)")


def run(options: argparse.Namespace) -> Iterator[Result]:
    """The closed-form layer over softmax attention, and dense products over sparse ones."""
    note = f"{spread_note(options.rounds)}."
    common = {"command": options.command_line, "machine": machine.describe(options.device), "notes": (note,)}
    synchronize = synchronize_of(options.device)

    def rounds(doing: str):
        return shown(range(options.rounds), doing)

    layers = grover_layers(options.length, options.device)
    x = embeddings(options.length, options.device)
    passes = {"inference": forward, "training": forward_and_backward}
    ratios = {
        kind: interleaved_ratios(
            {name: lambda layer=layer, run=run: run(layer, x) for name, layer in layers.items()},
            WRITTEN_OUT,
            rounds(kind),
            synchronize,
        )
        for kind, run in passes.items()
    }
    rows = tuple({"layer": name, **{kind: each[name] for kind, each in ratios.items()}} for name in layers)
    yield Result(
        name_on("grover-layers", options.device),
        "Amplification over softmax",
        f"T = {options.length}, d = {WIDTH}, {HEADS} heads, batch {BATCH}",
        columns=LAYERS,
        rows=rows,
        labels=("layer",),
        **common,
    )
    products, numbers = sparse_products(options.keys, options.kept, options.device)
    ratios = interleaved_ratios(products, SPARSE, rounds("products"), synchronize)
    rows = tuple({"product": name, "ratio": ratios[name], "numbers": numbers[name]} for name in products)
    yield Result(
        name_on("grover-products", options.device),
        "Products with the values",
        f"n = {options.keys:,}, k = {options.kept}, d = {WIDTH}, causal, float32",
        columns=PRODUCTS,
        rows=rows,
        labels=("product",),
        **common,
    )


def embeddings(length: int, device: str) -> Tensor:
    """What the layers read."""
    return torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)


def grover_layers(length: int, device: str) -> dict[str, Attention]:
    """Layers with the same weights; the softmax also as conditional amplification, which must give the same."""
    torch.manual_seed(0)
    softmax = build_attention("grover", WIDTH, HEADS, length, marks="softmax", conditional=True)
    layers: dict[str, Attention] = {WRITTEN_OUT: WrittenOut(WIDTH, HEADS, length)}
    layers["softmax, fused"] = build_attention("classical", WIDTH, HEADS, length)
    layers["amplification, conditional softmax marks"] = softmax
    for name, options in {
        "amplification, iterations per row": {},
        "amplification, quarter rule": {
            "iterations": "quarter",
            "threshold": "fixed",
        },  # the rule sets thresholds by itself
        "amplification, fixed point": {"iterations": "fixed-point"},
        "amplification, phase oracle": {"oracle": "phase", "iterations": 2},
    }.items():
        layers[name] = build_attention("grover", WIDTH, HEADS, length, **options)
    for layer in layers.values():
        layer.load_state_dict(softmax.state_dict(), strict=False)
        layer.to(device)
    x = embeddings(length, device)
    for name, layer in layers.items():
        check_layer(name, layer, x)
    with torch.no_grad():
        outputs = {name: layer(x) for name, layer in layers.items()}
    for name in list(layers)[1:3]:
        _check_close(name, outputs[name], outputs[WRITTEN_OUT], rtol=1e-4, atol=1e-5)
    return layers


class WrittenOut(Attention):
    """Softmax attention whose weights are written out, as the amplification's are."""

    def __init__(self, embed_dim: int, num_heads: int, block_size: int):
        maps = (LinearFeatureMap(embed_dim, num_heads, embed_dim // num_heads) for _ in range(3))
        score = ScaledDotScore(num_heads, embed_dim // num_heads)
        score.is_dot_product = False  # keeps it from the fused kernels
        super().__init__(*maps, score, block_size=block_size)


def sparse_products(keys: int, kept: int, device: str) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """The product by structure, and with a dense matrix; and the largest tensor that each of them makes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(keys, WIDTH, generator=generator).to(device) for _ in range(3))
    scores = DotProductScores(q, k)
    operator = SparseAttention(scores, top_support(scores, kept))
    mask = operator.support.dense(slice(None), keys)
    future = torch.ones(keys, keys, dtype=torch.bool, device=device).triu_(1)

    def formed() -> Tensor:
        b = (q @ k.T).mul_(scores.scale).exp_()
        return b.masked_fill_(~mask, 1.0).masked_fill_(future, 0.0)

    ready = formed()
    products = {SPARSE: lambda: operator @ v, "dense": lambda: formed() @ v, "dense, matrix ready": lambda: ready @ v}
    for name, product in products.items():
        _check_close(name, product(), ready @ v, rtol=1e-3, atol=1e-3)
    largest = {}
    for name, product in products.items():
        with LargestTensor() as seen:
            product()
        largest[name] = seen.numbers
    largest["dense, matrix ready"] = ready.numel()
    return products, largest


def _check_close(name: str, found: Tensor, expected: Tensor, **tolerances: float) -> None:
    if found.shape != expected.shape or not torch.allclose(found, expected, **tolerances):
        raise CheckFailed(f"{name}: it is not the product that the others compute")


class LargestTensor(TorchDispatchMode):
    """Watches the sizes of the tensors that are made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out
