"""`qattn noise-sweep`: the cross-entropy of a trained model when its circuits are sampled, or run with noise.

The same windows of the test text are evaluated again and again: once exactly, several times with each number of shots,
and with each strength of each kind of noise. A repetition differs from the others in the seed of its shots and in
nothing else. Every evaluation is a row of noise_sweep.csv, written when it is done, so a sweep that was stopped goes on
where it was; noise_sweep.json and noise_sweep.png follow from the rows (see `noise_report`).
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from lightning_modules.checkpoints import first_difference, resolve
from lightning_modules.cli import COMMANDS, Parser, add_trust
from lightning_modules.data import Batch
from lightning_modules.executions import executed, needed, say
from lightning_modules.files import atomic_write, locked, whole_rows
from lightning_modules.inspection import attentions_of
from lightning_modules.labels import with_label
from lightning_modules.language_model import LanguageModel, cross_entropy
from lightning_modules.loggers import LABEL
from lightning_modules.noise_report import NOISES, Row, Summary, print_summary, sweep_picture
from lightning_modules.progress import following, shown
from lightning_modules.training_cli import TrainingCLI, check_writable
from pennylane_qattn import CircuitFeatureMap, Execution, Noise
from pennylane_qattn.execution import executors
from pennylane_qattn.observables import group_words
from pennylane_qattn.planning import make_meter

NAME = "noise_sweep"
SHOTS = (100, 300, 1000, 3000, 10_000)
STRENGTHS = (0.001, 0.003, 0.01, 0.03)


def noise_sweep(argv: list[str]) -> None:
    """`qattn noise-sweep`."""
    options, data_options = _options(argv)
    with locked(options.output):
        _sweep(options, data_options)


def _sweep(options: argparse.Namespace, data_options: list[str]) -> None:
    folder = Path(options.output)
    subject = _subject(options, data_options)
    plan = list(conditions(options))
    # which does not depend on the strength of the noise or the number of shots
    examples = {condition.kind: condition for condition in plan}
    needs = {kind: subject.needs(condition.execution(options)) for kind, condition in examples.items()}
    settings = _settings(options, subject)
    table = Rows(folder / f"{NAME}.csv", subject.model.label)
    done = {} if options.overwrite else _begun(folder, table, settings)
    left = [condition for condition in plan if condition not in done]
    _announce(plan, left, needs, options)
    if not done:
        (folder / f"{NAME}.png").unlink(missing_ok=True)
        table.begin()
        _write_json(folder, {"settings": settings})
        table.add(Row(cross_entropy=subject.exact, change=0.0))
    for condition in shown(left, "evaluating"):
        row = done[condition] = subject.evaluate(condition, options)
        table.add(row)
        say(f"{condition}: cross-entropy {row.cross_entropy:.5f}, {row.executions:,} executions, {row.seconds:.1f} s")
    summary = replace(Summary.of(subject.exact, [done[c] for c in plan]), label=subject.model.label)
    facts = _facts(subject, plan, needs, done)
    _write_json(folder, {"settings": settings, **facts, **summary.to_plain()})
    with following("drawing"), atomic_write(folder / f"{NAME}.png") as file:
        file.write(sweep_picture(summary))
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    _print(console, subject, facts, summary)
    console.print(f"picture: {folder / f'{NAME}.png'}", soft_wrap=True)


# --- options ----------------------------------------------------------------------------------------------------


def _options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and those of the data, which are handed on."""
    parser = Parser(
        prog="qattn noise-sweep",
        description="Evaluates a checkpoint on the test text with finite shots and with noise, and compares with the "
        "exact cross-entropy. The text comes from the checkpoint; --data.corpus and all the other --data. options of "
        "qattn test change it. A sweep that was stopped goes on where it was.",
        epilog=f"example: {COMMANDS['noise-sweep'].example}",
        allow_abbrev=False,
    )
    add_trust(parser)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="F", help="the .ckpt file, or the folder of a run (its best one)")
    listed = " ".join(map(str, SHOTS))
    add("--shots", type=int, nargs="*", default=SHOTS, metavar="N", help=f"of every setting (default: {listed})")
    listed = " ".join(map(str, STRENGTHS))
    for name, what in {
        "depolarizing": "probability of X, Y or Z after every gate, on each of its wires",
        "amplitude_damping": "probability of falling to |0> after every gate, on each of its wires",
        "readout": "probability that a measured bit is wrong",
    }.items():
        help = f"{what} (default: {listed}; without numbers: none)"
        add(f"--{name}", type=float, nargs="*", default=STRENGTHS, metavar="P", help=help)
    add("--noise_shots", type=int, metavar="N", help="sample the noisy circuits too (default: their exact values)")
    add("--repetitions", type=int, default=5, metavar="N", help="of all that is sampled (default: %(default)s)")
    add("--windows", type=int, default=16, metavar="N", help="windows of the test text (default: %(default)s)")
    add("--device", default="default.qubit", metavar="NAME", help="for shots without noise (default: %(default)s)")
    add("--noise_device", default="default.mixed", metavar="NAME", help="for noise (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all shots (default: %(default)s)")
    most = "most executions on a device (default: 10,000 on devices that are no simulators of this machine)"
    add("--max_executions", type=int, metavar="N", help=most)
    add("--output", default="runs/noise-sweep", metavar="DIR", help="folder for the results (default: %(default)s)")
    add("--overwrite", action="store_true", help="begin anew, whatever sweep the folder holds")
    own, data_options = _apart(argv)
    options = parser.parse_args(own)
    for name in ("shots", *NOISES):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    _check(options)
    return options, data_options


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    own: list[str] = []
    data: list[str] = []
    target = own
    for argument in argv:
        if argument.startswith("--"):
            target = data if argument.startswith("--data.") else own
        target.append(argument)
    return own, data


def _check(options: argparse.Namespace) -> None:
    if not any(getattr(options, name) for name in ("shots", *NOISES)):
        raise ValueError("there is nothing to sweep; give numbers behind --shots or a kind of noise")
    for name, least in (("windows", 1), ("seed", 0), ("max_executions", 1), ("noise_shots", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if options.repetitions < 2:
        raise ValueError(f"repetitions must be at least 2, as they give the error bars; got {options.repetitions}")
    for shots in options.shots:
        if shots < 1:
            raise ValueError(f"shots must be at least 1; got {shots}")
    for kind in NOISES:
        for strength in getattr(options, kind):
            Noise(**{kind: strength})
            if not strength:
                raise ValueError(f"{kind} must be more than 0, which is the exact evaluation; leave the 0 out")
    check_writable(Path(options.output), "output")


# --- what is evaluated ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """How the circuits are run in one evaluation.

    Attributes:
        kind: `"shots"`, or a kind of noise.
        strength: of the noise.
        shots: of every setting; `None`: exact expectation values.
        repetition: counted from 1; `None` where nothing is random.
        seed: of the shots.
    """

    kind: str
    strength: float | None = None
    shots: int | None = None
    repetition: int | None = None
    seed: int | None = None

    def execution(self, options: argparse.Namespace) -> Execution:
        """The description of such a run."""
        return Execution(
            device=options.device if self.kind == "shots" else options.noise_device,
            shots=self.shots,
            noise=Noise() if self.kind == "shots" else Noise(**{self.kind: self.strength}),
            seed=self.seed or 0,
            max_executions=options.max_executions,
        )

    def __str__(self) -> str:
        parts = [] if self.kind == "shots" else [f"{self.kind} {self.strength:g}"]
        parts += [] if self.shots is None else [f"{self.shots:,} shots", f"repetition {self.repetition}"]
        return ", ".join(parts)


def conditions(options: argparse.Namespace) -> Iterable[Condition]:
    """All evaluations of a sweep, in order."""
    points = [Condition("shots", shots=shots) for shots in options.shots]
    points += [Condition(kind, p, options.noise_shots) for kind in NOISES for p in getattr(options, kind)]
    for point in points:
        if point.shots is None:
            yield point
        else:
            for repetition in range(1, options.repetitions + 1):
                yield replace(point, repetition=repetition, seed=_seed(options.seed, point, repetition))


def _seed(seed: int, point: Condition, repetition: int) -> int:
    """A seed of its own for every repetition of everything, whatever else is in the sweep."""
    kind = ("shots", *NOISES).index(point.kind)
    entropy = (seed, kind, round((point.strength or 0) * 1e12), point.shots, repetition)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


class Subject:
    """A model, the windows that it is evaluated on, and its exact values there.

    Args:
        model: a trained model; it computes in float64 from then on.
        batches: inputs and targets of the windows.

    Attributes:
        exact: cross-entropy without shots and noise, nats per token.
        windows, tokens: how many there are.

    Raises:
        ValueError: if the model has no circuits.
    """

    def __init__(self, model: LanguageModel, batches: Iterable[Batch]):
        self.model, self.batches = model.double().eval(), list(batches)
        self.windows = sum(len(targets) for _, targets in self.batches)
        self.tokens = sum(targets.numel() for _, targets in self.batches)
        first = attentions_of(model.gpt)[0]
        #: their inputs are the embeddings, which are exact however the circuits are run
        self.first_maps = [part for part in first.modules() if isinstance(part, CircuitFeatureMap)]
        if not self.first_maps:
            name = model.attention.name
            raise ValueError(f"{name} attention has no circuits to sample; give a checkpoint of qisa, for example")
        self._losses, self._words = self._run(Execution())
        self.exact = float(self._losses.mean())

    def needs(self, execution: Execution) -> int:
        """Executions of one evaluation, at most."""
        self.model.set_execution(execution)
        return needed(self.model, self.tokens, training=False)

    def evaluate(self, condition: Condition, options: argparse.Namespace) -> Row:
        """One evaluation."""
        begun = time.perf_counter()
        losses, words = self._run(condition.execution(options))
        change = losses - self._losses
        row = Row(
            **asdict(condition),
            cross_entropy=float(losses.mean()),
            change=float(change.mean()),
            change_error=float(change.std() / math.sqrt(len(change))) if len(change) > 1 else math.nan,
            executions=executed(self.model),
            seconds=round(time.perf_counter() - begun, 3),
        )
        if condition.kind != "shots":
            return row
        error, expected = words - self._words, ((1 - self._words**2).clamp(min=0) / condition.shots).sqrt()
        return replace(
            row,
            word_error=float(error.square().mean().sqrt()),
            word_error_expected=float(expected.square().mean().sqrt()),
            words_inside=float((error.abs() <= 2 * expected + 1e-9).double().mean()),
        )

    @torch.no_grad()
    def _run(self, execution: Execution) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each window, and all expectation values of the first layer."""
        self.model.set_execution(execution)
        words: list[Tensor] = []
        hooks = [part.register_forward_hook(lambda _, __, out: words.append(out.flatten())) for part in self.first_maps]
        try:
            batches = shown(self.batches, "evaluating")
            found = [cross_entropy(self.model(inputs), targets, "none").mean(-1) for inputs, targets in batches]
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(found), torch.cat(words)


def _subject(options: argparse.Namespace, data_options: Sequence[str]) -> Subject:
    """The model of the checkpoint and its windows of the test text."""
    own = {"ckpt_path": resolve(options.checkpoint), "data.eval_windows": options.windows}
    own |= {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.enable_progress_bar": "false"}
    setup = TrainingCLI("test", [*data_options, *(f"--{name}={value}" for name, value in own.items())])
    return Subject(setup.model, setup.datamodule.test_dataloader())


def _announce(
    plan: Sequence[Condition], left: Sequence[Condition], needs: dict[str, int], options: argparse.Namespace
) -> None:
    """Says what is to come; ValueError if that is more than may be."""
    lines = []
    if len(left) < len(plan):
        lines.append(f"{len(plan) - len(left)} of {len(plan)} evaluations are there already, {len(left)} are left")
    for device in dict.fromkeys(condition.execution(options).device for condition in left):
        chosen = [condition for condition in left if condition.execution(options).device == device]
        wanted = sum(needs[condition.kind] for condition in chosen)
        lines.append(f"{len(chosen)} evaluations on {device}, {wanted:,} executions at most")
        limit = make_meter(Execution(device=device, max_executions=options.max_executions)).limit
        if limit is not None and wanted > limit:
            raise ValueError(
                f"the sweep needs {wanted:,} executions on {device} and max_executions is {limit:,}; lower "
                "repetitions or windows, or raise --max_executions"
            )
    for line in lines:
        say(line)


# --- files ------------------------------------------------------------------------------------------------------


class Rows:
    """The rows of a sweep as a CSV file, each of them on the disk before the next is computed.

    Args:
        path: the file.
        label: stands in a column of its own in every row, where there is one.
    """

    columns = [field.name for field in fields(Row)]

    def __init__(self, path: Path, label: str = ""):
        self.path = path
        self.label = {LABEL: label} if label else {}
        self.columns = [*type(self).columns, *self.label]

    def begin(self) -> None:
        """A new file without rows."""
        self._rewrite([])

    def add(self, row: Row) -> None:
        """One row more."""
        with whole_rows(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row.to_csv() | self.label)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Row]:
        """The rows so far; half a row at the end, where a process was killed, is cut off.

        Raises:
            ValueError: if the file is another one.
        """
        try:
            text = self.path.read_bytes().decode()
            complete = text[: text.rfind("\n") + 1]
            reader = csv.DictReader(complete.splitlines())
            if reader.fieldnames != self.columns:
                raise ValueError("other columns")
            rows = [Row.from_csv({name: row[name] for name in type(self).columns}) for row in reader]
        except (ValueError, TypeError):
            raise ValueError(
                f"{str(self.path)!r} holds no rows of a sweep; give another --output, or --overwrite"
            ) from None
        if complete != text:
            self._rewrite(rows)
        return rows

    def _rewrite(self, rows: Sequence[Row]) -> None:
        with atomic_write(self.path, "w") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(row.to_csv() | self.label for row in rows)


def _settings(options: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """What all rows of a sweep have in common. The exact cross-entropy stands for weights and text."""
    names = ("checkpoint", "windows", "device", "noise_device", "seed")
    return {**{name: getattr(options, name) for name in names}, "tokens": subject.tokens, "exact": subject.exact}


def _begun(folder: Path, table: Rows, settings: dict[str, Any]) -> dict[Condition, Row]:
    """The rows of a sweep that was stopped; ValueError if it was another one."""
    if not table.path.exists():
        return {}
    try:
        then = dict(json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{str(table.path)!r} is there without the settings of its sweep; give another --output, or --overwrite"
        ) from None
    now = dict(settings)
    if math.isclose(then.get("exact", math.nan), now["exact"], rel_tol=1e-9):
        then["exact"] = now["exact"]
    then["checkpoint"] = now["checkpoint"]  # the same model may have moved
    if found := first_difference(then, now):
        found = found.replace("in the checkpoint", "there")
        raise ValueError(f"{str(folder)!r} holds another sweep: {found}; give another --output, or --overwrite")
    return {row.condition(Condition): row for row in table.read() if row.kind != "exact"}


def _write_json(folder: Path, content: dict[str, Any]) -> None:
    with atomic_write(folder / f"{NAME}.json", "w") as file:
        file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


# --- what is said at the end ------------------------------------------------------------------------------------


def _facts(
    subject: Subject, plan: Sequence[Condition], needs: dict[str, int], done: dict[Condition, Row]
) -> dict[str, Any]:
    circuits = [circuit for executor in executors(subject.model) for circuit in executor.circuits]
    rows = [done[condition] for condition in plan]
    of_sampling = next((needs[c.kind] for c in plan if c.shots is not None), None)
    of_exact = next((needs[c.kind] for c in plan if c.shots is None), None)
    return {
        "circuits": len(circuits),
        "settings_per_circuit": [len(group_words(circuit.words)) for circuit in circuits],
        "executions_per_token_sampling": of_sampling and of_sampling // subject.tokens,
        "executions_per_token_exact": of_exact and of_exact // subject.tokens,
        "executions": sum(row.executions for row in rows),
        "seconds": round(sum(row.seconds for row in rows), 3),
    }


def _print(console: Console, subject: Subject, facts: dict[str, Any], summary: Summary) -> None:
    settings = facts["settings_per_circuit"]
    low, high = min(settings), max(settings)
    span = str(low) if low == high else f"{low} to {high}, {sum(settings) / len(settings):.1f} on average"
    sampling, exact = facts["executions_per_token_sampling"], facts["executions_per_token_exact"]
    each = [f"{sampling:,} when sampling"] if sampling else []
    each += [f"{exact:,} with exact values"] if exact else []
    line = f"windows: {subject.windows}, tokens: {subject.tokens:,}, exact: {subject.exact:.5f} nats/token"
    console.print(with_label(line, summary.label))
    console.print(f"circuits: {facts['circuits']}, measurement settings per circuit: {span}")
    console.print(f"executions per token: {', '.join(each)}")
    console.print(f"executions: {facts['executions']:,} in {facts['seconds']:.1f} s")
    print_summary(summary, console)
