"""Options `--execution.*` for commands that run the circuits of a checkpoint, as `model.execution` is elsewhere."""

import argparse
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pennylane_qattn import Execution

#: What `pennylane_qattn.Execution` has, gradients apart; told here too, so that --help need not import it.
OPTIONS = {
    "executor": "folded, qnode, or auto: folded where that is exact (default: auto)",
    "device": "PennyLane's name of the device, such as lightning.qubit (default: default.qubit)",
    "device_options": "its keyword arguments, as {name: value}",
    "shots": "measurements of every circuit and setting (default: exact values)",
    "noise.depolarizing": "probability, after every gate on each of its wires",
    "noise.amplitude_damping": "probability, after every gate on each of its wires",
    "noise.readout": "probability that a measured bit is flipped",
    "seed": "of the shots (default: 0)",
    "max_executions": "most executions of circuits on the device",
    "retries": "how often a failed call is tried again on a device that is no simulator here (default: 2)",
    "processes": "of this machine that run circuits at a time, on a simulator each (default: 1)",
}


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options in a group of their own."""
    group = parser.add_argument_group("execution of the circuits")
    for name, help in OPTIONS.items():
        group.add_argument(f"--execution.{name}", type=_value, metavar="X", default=argparse.SUPPRESS, help=help)


def execution_of(options: argparse.Namespace) -> "Execution":
    """What the options describe; ValueError in one line if they describe nothing that can be."""
    from pennylane_qattn import Execution

    plain: dict[str, Any] = {}
    for name in OPTIONS:
        if hasattr(options, f"execution.{name}"):
            inner, _, leaf = name.rpartition(".")
            (plain.setdefault(inner, {}) if inner else plain)[leaf] = getattr(options, f"execution.{name}")
    return Execution.from_plain(plain)


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"is not a value: {text!r}") from None
