"""One circuit for many tokens, forward and backward: folded here, as PennyLane's `TorchLayer`, and as dense matrices.

A token by itself is how circuits are called in most code that is about; the whole batch is what `TorchLayer` can do at
best; dense observables are the published algorithm gate by gate.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.benchmarks import machine
from lightning_modules.benchmarks.dense_observables import DenseObservables
from lightning_modules.benchmarks.options import (
    add_common,
    counted,
    name_on,
    positive,
    positive_number,
    spread_note,
    synchronize_of,
)
from lightning_modules.benchmarks.references import kernels_left_out
from lightning_modules.benchmarks.result import Cell, CheckFailed, Column, Result
from lightning_modules.benchmarks.torchlayer import pair, plain_layer, refusal
from lightning_modules.progress import following, shown
from lightning_modules.timing import forward_and_backward, interleaved_seconds, quotients, seconds_of
from pennylane_qattn import AmplitudeEncoding, Circuit, CircuitLayer, kernels
from pennylane_qattn.observables import draw_words

#: Tokens of the check.
CHECKED = 5
#: How far values and gradients may be apart, relative to the largest ones. In float32, which is timed, TorchLayer loses
#: digits of gradients by inputs, so that what is computed is the same is seen in float64.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-2}
PAIRS = (("default.qubit", "backprop"), ("lightning.qubit", "adjoint"))
FOLDED = "folded, here"
SETTING = "amplitude encoding, forward and backward, float32"

COLUMNS = (
    Column("peer", "computed as"),
    Column("by", "device and method"),
    Column("tokens", "tokens in a call"),
    Column("per_second", "tokens per second", digits=1),
    Column("ratio", "time per token, over folded", drawn=True),
    Column("error", "largest relative difference"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py peers`."""
    add_common(parser, rounds=5)
    add = parser.add_argument
    help = "widths of a token, each a circuit with as many observables (default: 16 and 128: 4 and 7 qubits)"
    add("--features", nargs="+", type=positive, default=[16, 128], metavar="N", help=help)
    help = f"how TorchLayer runs it (default: {' '.join(map(':'.join, PAIRS))})"
    add("--pairs", nargs="+", type=pair, default=list(PAIRS), metavar="DEVICE:METHOD", help=help)
    add("--tokens", type=positive, default=1024, metavar="N", help="tokens in a call, at most (default: %(default)s)")
    help = "a call takes no longer than about this: peers that are slower get fewer tokens (default: %(default)s)"
    add("--seconds", type=positive_number, default=2.0, metavar="S", help=help)


def run(options: argparse.Namespace) -> Iterator[Result]:
    """Tokens per second of every peer, for each circuit."""
    for features in dict.fromkeys(options.features):
        yield _result(features, options)


@dataclass(frozen=True, eq=False)
class Peer:
    """A way to compute the circuit's values.

    Attributes:
        name: what it is called.
        by: device and method, where it is PennyLane's.
        layer: `(tokens, features)` -> `(tokens, words)`, its angles called `weights`.
        around: within it the layer is run.
    """

    name: str
    by: str
    layer: nn.Module
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    @property
    def label(self) -> str:
        return f"{self.name}, {self.by}" if self.by else self.name

    def run(self, inputs: Tensor) -> Tensor:
        """Forward and backward; the gradient by inputs."""
        with self.around():
            return forward_and_backward(self.layer, inputs)

    def results(self, inputs: Tensor) -> dict[str, Tensor]:
        """Values, and gradients by inputs and by angles."""
        self.layer.zero_grad(set_to_none=True)
        with self.around():
            with torch.no_grad():
                values = self.layer(inputs)
            by_inputs = forward_and_backward(self.layer, inputs)
        return {
            "values": values,
            "gradients by inputs": by_inputs,
            "gradients by angles": self.layer.weights.grad.clone(),
        }


class TokenByToken(nn.Module):
    """A layer that is called with one token at a time."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    @property
    def weights(self) -> nn.Parameter:
        return self.layer.weights

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(token) for token in x])


def peers(
    circuit: Circuit, pairs: Sequence[tuple[str, str]], device: str, dtype: torch.dtype = torch.float32
) -> list[Peer]:
    """All of them with the same angles; the first one is what the others are compared with."""
    torch.manual_seed(0)
    folded = CircuitLayer(circuit)
    found = [Peer(FOLDED, "", folded)]
    if kernels.serve(torch.empty(0, dtype=dtype, device=device)):
        found.append(Peer("folded, here, without kernels", "", folded, kernels_left_out))
    dense = DenseObservables(circuit.num_features, circuit.words, dtype.to_complex())
    found.append(Peer("dense observables, gate by gate", "", dense))
    for name, method in pairs:
        layer = plain_layer(circuit, name, method)
        found.append(Peer("TorchLayer, the whole batch", f"{name}:{method}", layer))
        found.append(Peer("TorchLayer, token by token", f"{name}:{method}", TokenByToken(layer)))
    for peer in found:
        # only what is real is cast: `to(dtype)` would make complex matrices real
        peer.layer.to(device).double() if dtype == torch.float64 else peer.layer.to(device).float()
        with torch.no_grad():
            peer.layer.weights.copy_(folded.weights)
    return found


def circuit_of(features: int) -> Circuit:
    """The published value map on tokens of that width: as many observables, amplitude encoding."""
    wires = AmplitudeEncoding().num_wires(features)
    return Circuit(features, draw_words(features, wires, seed=0))


def _result(features: int, options: argparse.Namespace) -> Result:
    circuit = circuit_of(features)
    inputs = torch.randn(max(options.tokens, CHECKED), features, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(options.device)
    for dtype in (torch.float64, torch.float32):  # what is timed comes last
        everyone = peers(circuit, options.pairs, options.device, dtype)
        refused, errors = check(everyone, inputs[:CHECKED].to(dtype))
    with following(f"{circuit.num_wires} qubits: how many tokens a call may have"):
        timed = {peer: inputs[: _tokens(peer, inputs, options)] for peer in everyone if peer not in refused}
    seconds = interleaved_seconds(
        {peer: lambda peer=peer, x=x: peer.run(x) for peer, x in timed.items()},
        shown(range(options.rounds), f"{circuit.num_wires} qubits"),
        synchronize_of(options.device),
    )
    per_token = {peer: [spent / len(timed[peer]) for spent in values] for peer, values in seconds.items()}

    def row(peer: Peer) -> dict[str, Cell]:
        cells: dict[str, Cell] = {"peer": peer.name, "by": peer.by}
        if peer in refused:
            return {**cells, "tokens": None, "per_second": refused[peer], "ratio": None, "error": None}
        return {
            **cells,
            "tokens": len(timed[peer]),
            "per_second": [1 / time for time in per_token[peer]],
            "ratio": quotients(per_token[peer], per_token[everyone[0]]),
            "error": f"{errors[peer]:.0e}" if peer in errors else None,
        }

    title = f"A circuit of {counted(circuit.num_wires, 'qubit')} and {counted(features, 'observable')}"
    notes = (
        f"{spread_note(options.rounds)}; in a round all take turns. All have "
        f"the same angles and tokens, and in float64 the same values and gradients, to "
        f"{TOLERANCES[torch.float64]:g} of the largest. The differences in the table are those in float32.",
        f"A call has {options.tokens:,} tokens, or as many as take about {options.seconds:g} s.",
    )
    described = machine.describe(options.device)
    rows = tuple(row(peer) for peer in everyone)
    name = name_on(f"peers-{circuit.num_wires}-qubits", options.device)
    return Result(name, title, SETTING, options.command_line, described, COLUMNS, rows, notes, ("peer", "by"))


def check(everyone: list[Peer], inputs: Tensor) -> tuple[dict[Peer, str], dict[Peer, float]]:
    """Compares values and gradients of all peers with the first one's, in the precision of the inputs.

    Returns:
        The peers that cannot be trained on these inputs, and why; and of the others the largest relative difference.

    Raises:
        CheckFailed: if one computes something else.
    """
    refused: dict[Peer, str] = {}
    errors: dict[Peer, float] = {}
    expected = everyone[0].results(inputs)
    for peer in everyone[1:]:
        if peer.by and (why_not := refusal(peer.layer, inputs)):
            refused[peer] = why_not
            continue
        errors[peer] = 0.0
        for kind, found in peer.results(inputs).items():
            wanted = expected[kind]
            if found.shape != wanted.shape:
                raise CheckFailed(f"{peer.label}: {kind} are {tuple(found.shape)}, and {tuple(wanted.shape)} here")
            error = float((found - wanted).abs().max() / wanted.abs().max())
            if not error <= TOLERANCES[inputs.dtype]:
                raise CheckFailed(f"{peer.label}: {kind} differ by {error:.2g} from those of the folded circuit")
            errors[peer] = max(errors[peer], error)
    return refused, errors


def _tokens(peer: Peer, inputs: Tensor, options: argparse.Namespace) -> int:
    """How many tokens a call has: doubled until it would take too long, or all are in."""

    def seconds(count: int) -> float:
        return seconds_of(lambda: peer.run(inputs[:count]), synchronize_of(options.device))

    count = 1
    seconds(count)  # warms up
    while count < options.tokens and 2 * seconds(count) <= options.seconds:
        count = min(2 * count, options.tokens)
    return count
