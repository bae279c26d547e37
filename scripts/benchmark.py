#!/usr/bin/env python
"""Times what is here against what one would use otherwise, side by side in one run.

    python scripts/benchmark.py attention --preset qisa-16 --batch 1024
        every attention of the registry against the classical one, inside the same GPT, on the same batch
    python scripts/benchmark.py devices
        circuits on devices against PennyLane's own TorchLayer, same device, method, circuit and inputs
    python scripts/benchmark.py grover
        the amplification layer against softmax attention, and sparse products against dense ones with the same matrix

The contestants take turns, and what is printed is the median over the rounds of the ratio of their times in the same
round, so that a machine whose speed drifts slows all alike.
"""

import argparse
import platform
import statistics
from collections.abc import Callable

import pennylane as qml
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.gpt import GPT, PRESETS, preset
from lightning_modules.timing import describe_spread, inference, interleaved_ratios, seconds_of, training_step
from pennylane_qattn import (
    ATTENTION,
    Attention,
    Circuit,
    CircuitLayer,
    Execution,
    LinearFeatureMap,
    ScaledDotScore,
    build_attention,
)
from pennylane_qattn.grover.sparse import SparseAttention
from pennylane_qattn.grover.support import DotProductScores, top_support
from pennylane_qattn.observables import draw_words, to_pennylane

BASELINE = "classical"


def attention(options: argparse.Namespace) -> None:
    """Prints inference and training step of each mechanism as ratios to the classical one."""
    config = preset(options.preset)
    names = [BASELINE, *(name for name in options.mechanisms or ATTENTION if name != BASELINE)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (options.batch, config.block_size + 1), generator=generator)
    tokens = tokens.to(options.device)
    runs: dict[str, dict[str, Callable[[], None]]] = {"inference": {}, "training step": {}}
    for name in names:
        torch.manual_seed(0)
        model = GPT(config, ATTENTION.build(name)).to(options.device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        runs["inference"][name] = lambda model=model: inference(model, tokens)
        runs["training step"][name] = lambda model=model, optimizer=optimizer: training_step(model, optimizer, tokens)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    table = Table(
        "mechanism",
        "inference",
        "training step",
        title=f"time over classical, {options.preset}, batch {options.batch}, {where}, torch {torch.__version__}",
        caption=f"median of {options.rounds} rounds (lowest to highest); {platform.processor() or platform.machine()}",
    )
    synchronize = torch.cuda.synchronize if options.device == "cuda" else None
    ratios = {
        kind: interleaved_ratios(functions, BASELINE, track(range(options.rounds), transient=True), synchronize)
        for kind, functions in runs.items()
    }
    for name in names:
        table.add_row(name, *(describe_spread(ratios[kind][name]) for kind in runs))
    Console(width=100).print(table)


#: What `devices` runs: the one circuit for which the cost of plain TorchLayer is known from elsewhere.
FEATURES, WORDS = 16, 16


def devices(options: argparse.Namespace) -> None:
    """Prints forward and backward on devices, by `CircuitLayer` and by `TorchLayer`."""
    circuit = Circuit(FEATURES, draw_words(WORDS, 4, seed=0))
    inputs = torch.randn(options.tokens, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = Table(
        "device",
        "method",
        "TorchLayer\nms per token",
        "here\nms per token",
        "TorchLayer\nover here",
        "device's executions, here\nforward, backward",
        title=f"{options.tokens} distinct tokens, {circuit.num_wires} qubits, {WORDS} observables, amplitude encoding, "
        f"forward and backward, {torch.get_num_threads()} CPU threads, PennyLane {qml.__version__}",
        caption=f"median of {options.rounds} rounds (lowest to highest); {platform.processor() or platform.machine()}",
    )
    for pair in options.pairs:
        name, _, method = pair.partition(":")
        ours = CircuitLayer(circuit, Execution(executor="qnode", device=name, diff_method=method)).double()
        # PennyLane's documented way: its embedding normalises and pads
        plain = qml.qnn.TorchLayer(_plain_qnode(circuit, name, method), {"weights": circuit.weight_shape}).double()
        plain.load_state_dict(ours.state_dict())
        refusal = _refusal(plain, inputs[:2])
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        _forward_and_backward(ours, inputs)
        for _ in track(range(options.rounds), transient=True, description=pair):
            if not refusal:
                seconds["plain"].append(seconds_of(lambda layer=plain: _forward_and_backward(layer, inputs)))
            seconds["ours"].append(seconds_of(lambda layer=ours: _forward_and_backward(layer, inputs)))
        per_token = {k: f"{1000 * statistics.median(v) / len(inputs):.2f}" for k, v in seconds.items() if v}
        ratio = "" if refusal else describe_spread([a / b for a, b in zip(*seconds.values(), strict=True)])
        table.add_row(name, method, refusal or per_token["plain"], per_token["ours"], ratio, _tracked(ours, inputs))
    Console(width=120).print(table)


def _plain_qnode(circuit: Circuit, device: str, method: str) -> qml.QNode:
    wires = range(circuit.num_wires)

    @qml.qnode(qml.device(device, wires=circuit.num_wires), interface="torch", diff_method=method)
    def qnode(inputs, weights):
        qml.AmplitudeEmbedding(inputs, wires=wires, pad_with=0.0, normalize=True)
        circuit.ansatz(weights, wires)
        return [qml.expval(to_pennylane(word, wires)) for word in circuit.words]

    return qnode


def _forward_and_backward(layer: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    inputs = inputs.clone().requires_grad_()
    layer(inputs).square().sum().backward()
    return inputs.grad


def _refusal(layer: torch.nn.Module, inputs: torch.Tensor) -> str:
    """Why a layer cannot be trained on inputs that need gradients; empty if it can."""
    try:
        gradient = _forward_and_backward(layer, inputs)
    except Exception as error:  # whatever PennyLane raises
        return f"raises {type(error).__name__}"
    return "" if gradient.isfinite().all() else "NaN gradients"


def _tracked(layer: CircuitLayer, inputs: torch.Tensor) -> str:
    """What the device's own tracker counts, forward and then backward."""
    inputs = inputs.clone().requires_grad_()
    with qml.Tracker(layer.executor.runner.device) as forward:
        values = layer(inputs)
    with qml.Tracker(layer.executor.runner.device) as backward:
        values.square().sum().backward()
    counted = []
    for tracker in (forward, backward):
        totals = tracker.totals
        runs = totals.get("simulations", totals.get("executions", 0))
        counted.append(
            f"{runs:.0f}" + (f" + {totals['derivatives']:.0f} derivatives" if "derivatives" in totals else "")
        )
    return ", ".join(counted)


# --- Grover -----------------------------------------------------------------------------------------------------


def grover(options: argparse.Namespace) -> None:
    """Prints the closed-form layer over softmax attention, and dense products over sparse ones."""
    where = f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    caption = f"median of {options.rounds} rounds (lowest to highest); {platform.processor() or platform.machine()}"
    rounds = options.rounds
    layers = _grover_layers(options.length)
    table = Table(
        "attention layer",
        "inference",
        "training step",
        title=f"time over softmax attention, T = {options.length}, d = 64, 4 heads, batch 8, {where}",
        caption=caption,
    )
    x = torch.randn(8, options.length, 64, generator=torch.Generator().manual_seed(0))
    runs = {
        "inference": {name: lambda layer=layer: _forward(layer, x) for name, layer in layers.items()},
        "training": {name: lambda layer=layer: _forward_and_backward(layer, x) for name, layer in layers.items()},
    }
    baseline = "softmax, weights written out"
    ratios = {kind: interleaved_ratios(each, baseline, rounds) for kind, each in runs.items()}
    for name in layers:
        table.add_row(name, *(describe_spread(ratios[kind][name]) for kind in runs))
    console = Console(width=110)
    console.print(table)

    products, numbers = _sparse_products(options.keys, options.kept)
    table = Table(
        "product with the values",
        "time over sparse",
        "largest tensor, numbers",
        title=f"n = {options.keys:,}, k = {options.kept}, d = 64, causal, float32, {where}",
        caption=caption,
    )
    ratios = {"product": interleaved_ratios(products, "sparse", rounds)}
    for name in products:
        table.add_row(name, describe_spread(ratios["product"][name]), f"{numbers[name]:,}")
    console.print(table)


def _grover_layers(length: int) -> dict[str, torch.nn.Module]:
    """Layers with the same weights; the softmax also as conditional amplification, which must give the same."""
    torch.manual_seed(0)
    softmax = build_attention("grover", 64, 4, length, marks="softmax", conditional=True)
    layers: dict[str, torch.nn.Module] = {"softmax, weights written out": WrittenOut(64, 4, length)}
    layers["softmax, fused"] = build_attention("classical", 64, 4, length)
    layers["amplification, conditional softmax marks"] = softmax
    for name, options in {
        "amplification, iterations per row": {},
        "amplification, quarter rule": {"iterations": "quarter"},
        "amplification, fixed point": {"iterations": "fixed-point"},
        "amplification, phase oracle": {"oracle": "phase", "iterations": 2},
    }.items():
        layers[name] = build_attention("grover", 64, 4, length, **options)
    for layer in layers.values():
        layer.load_state_dict(softmax.state_dict(), strict=False)
    x = torch.randn(2, length, 64)
    alike = [layer(x) for layer in list(layers.values())[:3]]
    for other in alike[1:]:  # what is compared computes the same kind of thing
        torch.testing.assert_close(other, alike[0], rtol=1e-4, atol=1e-5)
    return layers


class WrittenOut(Attention):
    """Softmax attention whose weights are written out, as the amplification's are."""

    def __init__(self, embed_dim: int, num_heads: int, block_size: int):
        maps = (LinearFeatureMap(embed_dim, num_heads, embed_dim // num_heads) for _ in range(3))
        score = ScaledDotScore(num_heads, embed_dim // num_heads)
        score.is_dot_product = False  # keeps it from the fused kernels
        super().__init__(*maps, score, block_size=block_size)


def _forward(layer: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _sparse_products(keys: int, kept: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """The product by structure, and with a dense matrix; and the largest tensor that each of them makes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(keys, 64, generator=generator) for _ in range(3))
    scores = DotProductScores(q, k)
    operator = SparseAttention(scores, top_support(scores, kept))
    mask = operator.support.dense(slice(None), keys)
    future = torch.ones(keys, keys, dtype=torch.bool).triu_(1)

    def formed() -> torch.Tensor:
        b = (q @ k.T).mul_(scores.scale).exp_()
        return b.masked_fill_(~mask, 1.0).masked_fill_(future, 0.0)

    ready = formed()
    products = {"sparse": lambda: operator @ v, "dense": lambda: formed() @ v, "dense, matrix ready": lambda: ready @ v}
    torch.testing.assert_close(products["sparse"](), products["dense"](), rtol=1e-3, atol=1e-3)
    largest = {}
    for name, product in products.items():
        with LargestTensor() as seen:
            product()
        largest[name] = seen.numbers
    largest["dense, matrix ready"] = ready.numel()
    return products, largest


class LargestTensor(TorchDispatchMode):
    """Watches the sizes of the tensors that are made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1; got {text}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("attention", help="every mechanism against classical attention").add_argument
    add("--preset", default="qisa-16", choices=sorted(PRESETS), help="the GPT (default: %(default)s)")
    add("--batch", type=_positive, default=1024, help="windows in a batch (default: %(default)s, as published)")
    add("--mechanisms", nargs="*", choices=sorted(ATTENTION), help="which ones (default: all)")
    add("--rounds", type=_positive, default=21, help="how often each is timed (default: %(default)s)")
    add("--threads", type=_positive, help="torch's threads (default: torch's own choice)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    add = commands.add_parser("devices", help="circuits on devices against PennyLane's TorchLayer").add_argument
    add(
        "--pairs",
        nargs="+",
        metavar="DEVICE:METHOD",
        default=["lightning.qubit:adjoint", "default.qubit:backprop", "lightning.qubit:parameter-shift"],
        help="what to time (default: %(default)s)",
    )
    add("--tokens", type=_positive, default=256, help="distinct inputs (default: %(default)s)")
    add("--rounds", type=_positive, default=3, help="how often each is timed (default: %(default)s)")
    add("--threads", type=_positive, help="torch's threads (default: torch's own choice)")
    add = commands.add_parser("grover", help="amplification and sparse products").add_argument
    add("--length", type=_positive, default=256, help="tokens of the layers (default: %(default)s)")
    add("--keys", type=_positive, default=8192, help="keys of the sparse product (default: %(default)s)")
    add("--kept", type=_positive, default=32, help="keys that its rows keep (default: %(default)s)")
    add("--rounds", type=_positive, default=9, help="how often each is timed (default: %(default)s)")
    add("--threads", type=_positive, help="torch's threads (default: torch's own choice)")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    {"attention": attention, "devices": devices, "grover": grover}[options.command](options)


if __name__ == "__main__":
    main()
