#!/usr/bin/env python
"""Times what is here against what one would use otherwise, side by side in one run.

    python scripts/benchmark.py attention --preset qisa-16 --batch 1024
        every attention of the registry against the classical one, inside the same GPT, on the same batch
    python scripts/benchmark.py devices
        circuits on devices against PennyLane's own TorchLayer, same device, method, circuit and inputs

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

from lightning_modules.gpt import GPT, PRESETS, preset
from lightning_modules.timing import describe_spread, inference, interleaved_ratios, seconds_of, training_step
from pennylane_qattn import ATTENTION, Circuit, CircuitLayer, Execution
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
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    {"attention": attention, "devices": devices}[options.command](options)


if __name__ == "__main__":
    main()
