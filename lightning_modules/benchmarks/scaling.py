r"""What one attention layer costs, forward and backward, as it grows in width, length, heads and qubits.

The exponent :math:`p` of :math:`t = c\, s^p` is fitted to the upper half of the sizes, by least squares in logarithms,
and stands beside the exponent of the leading term that theory counts. Small sizes are below their law, since calls cost
something by themselves.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightning_modules.benchmarks import machine
from lightning_modules.benchmarks.checks import check_layer
from lightning_modules.benchmarks.options import (
    Variant,
    add_common,
    add_mechanisms,
    mechanisms_of,
    name_on,
    positive,
    positive_number,
    synchronize_of,
    two_or_more,
)
from lightning_modules.benchmarks.result import Cell, Column, Result
from lightning_modules.progress import shown
from lightning_modules.timing import forward_and_backward, interleaved_seconds
from pennylane_qattn import Attention
from pennylane_qattn.features import PerHeadFeatureMap, circuit_within
from pennylane_qattn.grover.sparse_score import SparseScore
from pennylane_qattn.mechanisms import CircuitMechanism
from pennylane_qattn.published import PublishedAttention

#: Observables of a head where qubits are counted.
OBSERVABLES = 4
#: Tensors of the size of the weights that a backward pass has at once, where the weights are written out.
TENSORS_OF_WEIGHTS = 8
GIB = 2**30


# --- theory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theory:
    """The exponent of the leading term, and where it comes from."""

    exponent: int
    reason: str


def writes_weights(attention: Attention) -> bool:
    """Whether it makes a matrix of weights, T x T; others make some rows at a time, if at all."""
    return isinstance(attention, PublishedAttention)


def by_width(attention: Attention) -> Theory:
    """Against the width d, all else fixed."""
    return Theory(2, "every token is multiplied by matrices of d × d, with circuits folded too")


def by_length(attention: Attention) -> Theory:
    """Against the tokens T."""
    if isinstance(attention.score, SparseScore):
        return Theory(2, "a scan of all pairs finds the keys that are kept")
    return Theory(2, "every pair of tokens has a weight")


def by_heads(attention: Attention) -> Theory:
    """Against the heads H, the width being fixed."""
    maps = (attention.query_map, attention.key_map, attention.value_map)
    if any(isinstance(part, PerHeadFeatureMap) and not part.split for m in maps for part in m.modules()):
        return Theory(1, "every head reads the whole embedding")
    if isinstance(attention.score, SparseScore):
        return Theory(1, "every head scans all pairs and keeps keys of its own")
    if not attention.score.is_dot_product:
        return Theory(1, "every head computes a weight of its own for every pair of tokens")
    return Theory(0, "heads share the width, and only the exponentials of the softmax grow in number")


def by_qubits(attention: Attention) -> Theory:
    """Against 2^n, n being the qubits."""
    return Theory(2, "a folded circuit takes a token's 2^n amplitudes to a state by a matrix of 2^n × 2^n")


# --- sweeps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """What is varied: its name, the option that lists the sizes, and its theory."""

    name: str
    option: str
    theory: Callable[[Attention], Theory]


SWEEPS = {
    "d": Sweep("width d", "widths", by_width),
    "T": Sweep("tokens T", "lengths", by_length),
    "H": Sweep("heads H", "heads", by_heads),
    "n": Sweep("amplitudes 2^n", "qubits", by_qubits),
}

COLUMNS = (
    Column("mechanism", "mechanism"),
    Column("sweep", "against"),
    Column("range", "fitted to"),
    Column("fitted", "exponent"),
    Column("error", "standard error"),
    Column("theory", "in theory", digits=0),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py scaling`."""
    add_common(parser, rounds=5)
    add_mechanisms(parser)
    add = parser.add_argument
    add("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="what to vary (default: all)")
    numbers = {"nargs": "+", "type": positive, "metavar": "N"}
    add("--widths", **numbers, default=[16, 32, 64, 128, 256, 512], help="d (default: 16 to 512)")
    add(
        "--lengths",
        **numbers | {"type": two_or_more},
        default=[32, 64, 128, 256, 512, 1024, 2048],
        help="T (default: 32 to 2,048)",
    )
    add("--heads", **numbers, default=[1, 2, 4, 8, 16], help="H (default: 1 to 16)")
    add("--qubits", **numbers, default=[3, 4, 5, 6, 7, 8, 9, 10], help="n, by angle encoding (default: 3 to 10)")
    add("--width", type=positive, default=64, metavar="N", help="d where it is not varied (default: %(default)s)")
    add("--length", type=two_or_more, default=128, metavar="N", help="T where it is not varied (default: %(default)s)")
    add("--batch", type=positive, default=4, metavar="N", help="windows in a batch (default: %(default)s)")
    help = "sizes whose written-out weights would take more are left out (default: %(default)s)"
    add("--memory", type=positive_number, default=2.0, metavar="GIB", help=help)


def run(options: argparse.Namespace) -> list[Result]:
    """Times of every mechanism in every sweep, with exponents."""
    # everything is built and checked before anything is timed, so that whatever is wrong is found at once
    plan = [Series.of(variant, key, options) for variant in mechanisms_of(options) for key in options.sweeps]
    plan = [series for series in plan if series is not None]
    if not plan:
        raise ValueError("there is nothing to vary: only mechanisms with circuits have qubits; choose other --sweeps")
    for series in plan:
        series.check()
    rows = tuple(series.row(options.rounds, options.device) for series in plan)
    title = "Cost of a layer, forward and backward"
    setting = (
        f"width {options.width}, {options.length:,} tokens, 1 head, batch {options.batch}, apart from what is varied"
    )
    theories = dict.fromkeys(f"{row['sweep']}: {row['theory']} in theory, since {row['reason']}." for row in rows)
    notes = (
        f"A time is the least of {options.rounds} rounds: what disturbs a measurement only adds to it. The exponent is "
        "fitted to the upper half of the sizes, by least squares in logarithms.",
        *theories,
        *(note for series in plan for note in series.left_out),
    )
    if "n" in options.sweeps:
        notes += (f"Qubits: angle encoding, one for each feature, {OBSERVABLES} observables; the exponent is of 2^n.",)
    name = name_on("scaling", options.device)
    described = machine.describe(options.device)
    labels = ("mechanism", "sweep")
    return [Result(name, title, setting, options.command_line, described, COLUMNS, rows, notes, labels, "lines")]


@dataclass(frozen=True)
class Series:
    """The layers of one mechanism in one sweep, by size, with what they read; and what was left out, and why."""

    variant: Variant
    sweep: Sweep
    layers: dict[int, tuple[Attention, Tensor]]
    left_out: tuple[str, ...]
    theory: Theory

    @classmethod
    def of(cls, variant: Variant, key: str, options: argparse.Namespace) -> Self | None:
        """The layers of all sizes that fit; `None` where qubits are to be varied and there are none."""
        sweep, layers, left_out = SWEEPS[key], {}, []
        for size in sorted(set(getattr(options, sweep.option))):
            layer, x = _layer(variant, key, size, options)
            if key == "n" and not _has_circuit(layer):
                return None
            needed = bytes_of_weights(layer, options.batch, x.shape[1]) / GIB
            if needed > options.memory:
                left_out.append(
                    f"{variant.label}: {key} = {size:,} is left out; its weights would take {needed:.3g} GiB, more "
                    f"than the {options.memory:g} of --memory."
                )
            else:
                layers[2**size if key == "n" else size] = layer, x
        return cls(variant, sweep, layers, tuple(left_out), sweep.theory(layer))

    @property
    def name(self) -> str:
        return f"{self.variant.label}: {self.sweep.name}"

    def check(self) -> None:
        """Checks the layers of all sizes; `CheckFailed` at the first fault."""
        for size, (layer, x) in self.layers.items():
            check_layer(f"{self.name} = {size}", layer, x, leaks=self.variant.mechanism.is_published)

    def row(self, rounds: int, device: str) -> dict[str, Cell]:
        """Times of all sizes, with their exponent."""
        seconds = interleaved_seconds(
            {size: lambda pair=pair: forward_and_backward(*pair) for size, pair in self.layers.items()},
            shown(range(rounds), self.name),
            synchronize_of(device),
        )
        sizes, times = upper_half(list(seconds), [min(spent) for spent in seconds.values()])
        fit = fit_exponent(sizes, times)
        return {
            "mechanism": self.variant.title,
            "sweep": self.sweep.name,
            "range": f"{sizes[0]:,} to {sizes[-1]:,}" if fit else "too few sizes",
            "fitted": fit and fit.exponent,
            "error": fit and fit.error,
            "theory": self.theory.exponent,
            "reason": self.theory.reason,
            "sizes": list(seconds),
            "seconds": list(seconds.values()),
        }


def _layer(variant: Variant, key: str, size: int, options: argparse.Namespace) -> tuple[Attention, Tensor]:
    """The layer of that size, and what it reads."""
    mechanism = variant.mechanism
    width, length, heads = options.width, options.length, 1
    if key == "d":
        width = size
    elif key == "T":
        length = size
    elif key == "H":
        heads = size
    else:
        width = size
        if isinstance(mechanism, CircuitMechanism):
            mechanism = replace(mechanism, encoding="angle", head_dim=OBSERVABLES)
        else:
            mechanism = replace(mechanism, head_dim=OBSERVABLES)
    torch.manual_seed(0)
    layer = mechanism(width, heads, length).to(options.device)
    x = torch.randn(options.batch, length, width, generator=torch.Generator().manual_seed(0))
    return layer, x.to(options.device)


def _has_circuit(attention: Attention) -> bool:
    maps = (attention.query_map, attention.key_map, attention.value_map)
    return any(circuit_within(feature_map) is not None for feature_map in maps)


def bytes_of_weights(attention: Attention, batch: int, length: int) -> int:
    """About what written-out weights and what is made of them take in float32; 0 where they are not written out."""
    if not writes_weights(attention):
        return 0
    return 4 * TENSORS_OF_WEIGHTS * batch * attention.num_heads * length**2


# --- exponents --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """An exponent, and its standard error, which two points do not have."""

    exponent: float
    error: float | None


def upper_half(sizes: Sequence[int], times: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """The larger sizes with their times; of an odd number the middle one too."""
    first = len(sizes) // 2
    return sizes[first:], times[first:]


def fit_exponent(sizes: Sequence[float], times: Sequence[float]) -> Fit | None:
    """The slope of `log(times)` against `log(sizes)` by least squares; `None` of fewer than two sizes."""
    if len(sizes) < 2:
        return None
    xs, ys = [math.log(size) for size in sizes], [math.log(time) for time in times]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    if len(xs) == 2:
        return Fit(slope, None)
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Fit(slope, math.sqrt(residual / (len(xs) - 2) / spread))
