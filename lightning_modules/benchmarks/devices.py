"""Circuits on devices, forward and backward: `CircuitLayer` and PennyLane's `TorchLayer`, side by side."""

import argparse

import pennylane as qml
import torch
from torch import Tensor

from lightning_modules.benchmarks import machine
from lightning_modules.benchmarks.options import add_common, name_on, positive, spread_note, synchronize_of
from lightning_modules.benchmarks.result import CheckFailed, Column, Result
from lightning_modules.benchmarks.torchlayer import pair, plain_layer, refusal
from lightning_modules.progress import shown
from lightning_modules.timing import forward_and_backward, interleaved_seconds, quotients
from pennylane_qattn import Circuit, CircuitLayer, Execution
from pennylane_qattn.observables import draw_words

#: What is run: the one circuit for which the cost of plain TorchLayer is known from elsewhere.
FEATURES, WORDS = 16, 16
PAIRS = (("lightning.qubit", "adjoint"), ("default.qubit", "backprop"), ("lightning.qubit", "parameter-shift"))
#: Inputs of the check, and how far results may be apart.
CHECKED, TOLERANCE = 3, 1e-7

COLUMNS = (
    Column("device", "device"),
    Column("method", "method"),
    Column("plain", "TorchLayer, ms per token"),
    Column("ours", "here, ms per token"),
    Column("ratio", "TorchLayer over here", drawn=True),
    Column("executions", "device's executions, here: forward, backward"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py devices`."""
    add_common(parser, rounds=3)
    add = parser.add_argument
    help = f"what to time (default: {' '.join(map(':'.join, PAIRS))})"
    add("--pairs", nargs="+", type=pair, metavar="DEVICE:METHOD", default=list(PAIRS), help=help)
    add("--tokens", type=positive, default=256, metavar="N", help="distinct inputs (default: %(default)s)")


def run(options: argparse.Namespace) -> list[Result]:
    """Forward and backward on devices, by `CircuitLayer` and by `TorchLayer`."""
    circuit = Circuit(FEATURES, draw_words(WORDS, 4, seed=0))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(options.tokens, FEATURES, generator=generator, dtype=torch.float64).to(options.device)
    rows = []
    for name, method in options.pairs:
        execution = Execution(executor="qnode", device=name, diff_method=method)
        ours = CircuitLayer(circuit, execution).double().to(options.device)
        plain = plain_layer(circuit, name, method).double().to(options.device)
        plain.load_state_dict(ours.state_dict())
        why_not = refusal(plain, inputs[:2])
        layers = {"ours": ours} if why_not else {"plain": plain, "ours": ours}
        check(layers, inputs[:CHECKED], f"{name}:{method}")
        seconds = interleaved_seconds(
            {key: lambda layer=layer: forward_and_backward(layer, inputs) for key, layer in layers.items()},
            shown(range(options.rounds), f"{name}:{method}"),
            synchronize_of(options.device),
        )
        per_token = {key: [1000 * s / len(inputs) for s in values] for key, values in seconds.items()}
        rows.append(
            {
                "device": name,
                "method": method,
                "plain": why_not or per_token["plain"],
                "ours": per_token["ours"],
                "ratio": None if why_not else quotients(seconds["plain"], seconds["ours"]),
                "executions": _tracked(ours, inputs),
            }
        )
    setting = (
        f"{options.tokens:,} distinct tokens, {circuit.num_wires} qubits, {WORDS} observables, amplitude encoding, "
        "forward and backward"
    )
    notes = (f"{spread_note(options.rounds)}.",)
    return [
        Result(
            name_on("devices", options.device),
            "Circuits on devices",
            setting,
            options.command_line,
            machine.describe(options.device),
            COLUMNS,
            tuple(rows),
            notes,
            ("device", "method"),
        )
    ]


def check(layers: dict[str, torch.nn.Module], inputs: Tensor, what: str) -> None:
    """All layers give the same values and the same gradients by inputs.

    Raises:
        CheckFailed: if they do not.
    """
    found = {key: (layer(inputs).detach(), forward_and_backward(layer, inputs)) for key, layer in layers.items()}
    for others in found.values():
        for kind, own, other in zip(("values", "gradients"), found["ours"], others, strict=True):
            if own.shape != other.shape or not torch.allclose(own, other, rtol=TOLERANCE, atol=TOLERANCE):
                raise CheckFailed(f"{what}: TorchLayer and CircuitLayer do not give the same {kind}")


def _tracked(layer: CircuitLayer, inputs: Tensor) -> str:
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
