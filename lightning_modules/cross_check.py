"""`qattn cross-check`: a trained model on devices beside its folded self: losses of training, cross-entropy, gradients.

Everything runs in float64 from the weights of one checkpoint, on the same windows, so the numbers of a row or a column
must agree to rounding; if they do not, the exit status is 1.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from lightning_modules.checkpoints import resolve
from lightning_modules.cli import COMMANDS, FAILURE, Parser, add_trust
from lightning_modules.data import Batch
from lightning_modules.executions import executed, say
from lightning_modules.labels import with_label
from lightning_modules.language_model import LanguageModel, cross_entropy
from lightning_modules.progress import shown
from lightning_modules.training_cli import TrainingCLI
from pennylane_qattn import Execution
from pennylane_qattn.execution import executors, with_circuits

#: Largest difference that is put down to rounding, in nats, or relative to the largest gradient.
TOLERANCE = 1e-9
GRADIENTS = (
    "default.qubit:backprop",
    "default.qubit:adjoint",
    "default.qubit:parameter-shift",
    "lightning.qubit:adjoint",
    "lightning.qubit:parameter-shift",
    "default.mixed:backprop",
)
#: Methods that have errors of their own, which are shown and not judged.
INEXACT = ("finite-diff", "spsa")
#: How many parameters the table of gradients shows.
SHOWN = 3


class Where(NamedTuple):
    """A device, and a method for its gradients."""

    device: str
    method: str = "auto"

    @classmethod
    def parse(cls, text: str) -> "Where":
        """From `DEVICE` or `DEVICE:METHOD`."""
        device, _, method = text.partition(":")
        return cls(device, method or "auto")

    def execution(self) -> Execution:
        """To run circuits there."""
        return Execution(executor="qnode", device=self.device, diff_method=self.method)

    def __str__(self) -> str:
        return f"{self.device}, {self.method}"


def cross_check(argv: list[str]) -> int:
    """`qattn cross-check`."""
    options = _options(argv)
    model, batches = _subject(options)
    for where in (options.train_on, *options.evaluate_on, *options.gradients):
        model.set_execution(where.execution())  # what cannot run is refused before anything has run
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    worst = _worst(
        [
            _training(model, batches, options, console),
            _evaluation(model, batches, options, console),
            _gradients(model, batches, options, console),
        ]
    )
    agree = worst <= TOLERANCE
    console.print(f"largest difference: {worst:.1e}, {'rounding' if agree else 'MORE than rounding'}")
    return 0 if agree else FAILURE


def _options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="qattn cross-check",
        description="Runs a trained model folded and through QNodes on devices, in float64 and on the same windows of "
        "the test text, and prints losses of training, cross-entropy and gradients side by side.",
        epilog=f"example: {COMMANDS['cross-check'].example}",
        allow_abbrev=False,
    )
    add_trust(parser)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="F", help="the .ckpt file, or the folder of a run (its best one)")
    add("--train_on", default="lightning.qubit:adjoint", metavar="DEVICE:METHOD", help="(default: %(default)s)")
    add("--steps", type=int, default=5, metavar="N", help="steps of training there (default: %(default)s)")
    add("--batch", type=int, default=2, metavar="N", help="windows in such a step (default: %(default)s)")
    devices = ["lightning.qubit", "default.mixed"]
    add("--evaluate_on", nargs="+", default=devices, metavar="DEVICE", help=f"(default: {' '.join(devices)})")
    add("--windows", type=int, default=16, metavar="N", help="windows to evaluate (default: %(default)s)")
    add("--gradients", nargs="+", default=GRADIENTS, metavar="DEVICE:METHOD", help=f"(default: {' '.join(GRADIENTS)})")
    options = parser.parse_args(argv)
    for name in ("steps", "batch", "windows"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(options, name)}")
    options.train_on = Where.parse(options.train_on)
    options.evaluate_on = [Where(device) for device in options.evaluate_on]
    options.gradients = [Where.parse(text) for text in options.gradients]
    return options


def _subject(options: argparse.Namespace) -> tuple[LanguageModel, list[Batch]]:
    """The model of the checkpoint, in float64, and windows of its test text."""
    windows = max(options.windows, options.steps * options.batch)
    own = {"ckpt_path": resolve(options.checkpoint), "data.eval_windows": windows, "data.batch_size": windows}
    own |= {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.enable_progress_bar": "false"}
    setup = TrainingCLI("test", [f"--{name}={value}" for name, value in own.items()])
    if not executors(setup.model.gpt):
        name = setup.model.attention.name
        raise ValueError(f"{name} attention has no circuits to run; give a checkpoint of qisa, for example")
    batches = list(setup.datamodule.test_dataloader())
    there = sum(len(inputs) for inputs, _ in batches)
    if there < windows:
        raise ValueError(f"{windows} windows are wanted and the test text has {there}; lower windows, steps or batch")
    return setup.model.double().eval(), batches


def _training(model: LanguageModel, batches: list[Batch], options: argparse.Namespace, console: Console) -> float:
    """Some steps of AdamW folded, and the same on a device."""
    chunks = list(_chunks(batches, options.batch))[: options.steps]
    folded = _losses(model, Execution(executor="folded"), chunks)
    there = _losses(model, options.train_on.execution(), chunks)
    title = with_label("training loss, nats per token", model.label)
    table = Table("step", "folded", str(options.train_on), title=title)
    for step, (one, other) in enumerate(zip(folded, there, strict=True), start=1):
        table.add_row(str(step), f"{one:.12f}", f"{other:.12f}")
    console.print(table)
    if options.train_on.method in INEXACT:
        return 0.0
    return _worst(abs(one - other) for one, other in zip(folded, there, strict=True))


def _chunks(batches: Sequence[Batch], size: int) -> Iterator[Batch]:
    for inputs, targets in batches:
        yield from zip(inputs.split(size), targets.split(size), strict=True)


def _losses(model: LanguageModel, execution: Execution, batches: Sequence[Batch]) -> list[float]:
    model = copy.deepcopy(model)
    model.set_execution(execution)
    optimizer = torch.optim.AdamW(model.parameters(), model.optimisation.learning_rate)
    losses = []
    for inputs, targets in shown(batches, "training"):
        loss = cross_entropy(model.gpt(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _say_executions(model, execution, f"{len(losses)} steps")
    return losses


def _evaluation(model: LanguageModel, batches: list[Batch], options: argparse.Namespace, console: Console) -> float:
    chunk = next(_chunks(batches, options.windows))
    exact = _cross_entropy(model, Execution(executor="folded"), chunk)
    title = with_label(f"cross-entropy of {len(chunk[0])} windows, nats per token", model.label)
    table = Table("executor", "cross-entropy", "minus folded", title=title)
    table.add_row("folded", f"{exact:.12f}", "")
    differences = []
    for where in shown(options.evaluate_on, "evaluating on devices"):
        value = _cross_entropy(model, where.execution(), chunk)
        table.add_row(where.device, f"{value:.12f}", f"{value - exact:.1e}")
        differences.append(abs(value - exact))
    console.print(table)
    return _worst(differences)


@torch.no_grad()
def _cross_entropy(model: LanguageModel, execution: Execution, batch: Batch) -> float:
    model.set_execution(execution)
    value = cross_entropy(model.gpt(batch[0]), batch[1]).item()
    _say_executions(model, execution, f"{len(batch[0])} windows")
    return value


def _gradients(model: LanguageModel, batches: list[Batch], options: argparse.Namespace, console: Console) -> float:
    """The gradient of one window's loss."""
    window = next(_chunks(batches, 1))
    reference, embedding = _gradient(model, Execution(executor="folded"), window)
    angles = [f"parameter {number}" for number in range(1, min(SHOWN, len(reference)) + 1)]
    title = "gradient of one window's loss by parameters of the first circuit, and largest differences from folded"
    table = Table(
        Column("device", no_wrap=True),
        Column("method", no_wrap=True),
        *angles,
        "parameters",
        "embeddings",
        title=with_label(title, model.label),
    )
    table.add_row("folded", "", *_shown(reference), "", "")
    counted = []
    for where in shown(options.gradients, "gradients on devices"):
        angles, inputs = _gradient(model, where.execution(), window)
        method = model.plans[0].diff_method
        differences = [_difference(angles, reference), _difference(inputs, embedding)]
        table.add_row(where.device, method, *_shown(angles), *(f"{value:.0e}" for value in differences))
        if method not in INEXACT:
            counted += differences
    console.print(table)
    return _worst(counted)


def _worst(differences: Iterable[float]) -> float:
    """The largest; infinite if one is NaN, which is no agreement."""
    return max((math.inf if math.isnan(value) else value for value in differences), default=0.0)


def _shown(angles: Tensor) -> list[str]:
    return [f"{value:+.6f}" for value in angles[:SHOWN].tolist()]


def _difference(found: Tensor, reference: Tensor) -> float:
    """Relative to the largest gradient."""
    if not reference.numel():
        return 0.0
    largest = reference.abs().max().item()
    difference = (found - reference).abs().max().item()
    return difference / largest if largest else (math.inf if difference else 0.0)


def _gradient(model: LanguageModel, execution: Execution, window: Batch) -> tuple[Tensor, Tensor]:
    """By all parameters of circuits, the first layer's first, and by all embeddings of tokens."""
    model.set_execution(execution)
    model.zero_grad()
    cross_entropy(model.gpt(window[0]), window[1]).backward()
    _say_executions(model, execution, "one window's gradient")
    found = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for part in with_circuits(model.gpt)
        for parameter in cast(nn.Module, part).parameters(recurse=False)
    ]
    angles = torch.cat([gradient.flatten() for gradient in found]) if found else torch.zeros(0)
    return angles, model.gpt.token_embedding.weight.grad


def _say_executions(model: LanguageModel, execution: Execution, what: str) -> None:
    if done := executed(model):
        say(f"{execution.device}, {model.plans[0].diff_method}: {done:,} executions for {what}")
