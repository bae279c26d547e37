"""The command `qattn devices`: which device runs and differentiates which circuits, by the planner's own word.

Simulators of this machine are asked by running a circuit of a wire or two; other devices run nothing here.
"""

import itertools
import json
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pennylane as qml
from pennylane.tape import QuantumScript
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_modules.circuit_commands import add_source, command_parser, source_of
from lightning_modules.progress import shown
from pennylane_qattn import Circuit, Execution
from pennylane_qattn.devices import LOCAL_SIMULATORS, PACKAGES, Runner, installed_devices
from pennylane_qattn.execution import make_executor
from pennylane_qattn.planning import METHODS, make_plan
from pennylane_qattn.resources import circuit_groups
from pennylane_qattn.testing import COMPARED, Comparison, compare_gradients, device_precision

#: Width of the tables where the output is no terminal.
WIDTH = 100
#: What is asked where no model is given: 3 numbers, the amplitudes padded to 2 qubits, or an angle each on 3 qubits.
EXAMPLES = {"amplitude": ("XI", "IZ", "YX"), "angle": ("XII", "IZI", "YXZ")}


@dataclass(frozen=True)
class Kind:
    """A kind of circuit: what it is called, one of it, and whether its final states are wanted."""

    label: str
    circuit: Circuit
    for_states: bool = False


@dataclass(frozen=True)
class Answer:
    """What the planner says of a method on a device for a kind of circuit.

    Attributes:
        works: whether it can be used.
        why_not: why it cannot, and what to use instead.
        input_gradient: how gradients by inputs are taken.
        executions: circuits run for a token in training, at most.
    """

    works: bool
    why_not: str | None = None
    input_gradient: str | None = None
    executions: int | None = None


@dataclass(frozen=True)
class DeviceReport:
    """What a device can do; `None` where it was not asked, as that might cost money.

    Attributes:
        name: PennyLane's.
        problem: why it cannot be used here at all.
        simulator: whether it is a simulator of this machine.
        exact: the precision of its exact values, `"float64"` or `"float32"`, or `"no"`.
        shots, noise, states: whether it samples, simulates noise channels, and gives pure states.
        auto: what `auto` picks on it, by kind of circuit, in one line; `picked` is the method alone.
        answers: by kind of circuit and method.
    """

    name: str
    problem: str | None = None
    simulator: bool = False
    exact: str | None = None
    shots: bool | None = None
    noise: bool | None = None
    states: bool | None = None
    auto: Mapping[str, str] = field(default_factory=dict)
    picked: Mapping[str, str | None] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, Answer]] = field(default_factory=dict)


def devices(argv: list[str]) -> int:
    """`qattn devices`."""
    parser = command_parser(
        "devices",
        "Prints which PennyLane devices run and differentiate circuits, by which method, and why not where they do "
        "not: for two small circuits, or for those of a checkpoint or a preset.",
    )
    add_source(parser)
    add = parser.add_argument
    add("--device", action="append", metavar="NAME", help="only this one; may be given several times")
    trying = "run every pair on simulators here, forward and backward, and compare with the folded circuit"
    add("--try", action="store_true", dest="compared", help=trying)
    add("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    title, kinds = _kinds(options)
    names = list(dict.fromkeys(options.device or known_devices()))
    for name in names:
        if name not in known_devices():
            raise ValueError(f"unknown device {name!r}; choose from {', '.join(known_devices())}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what plugins have to say is not the user's matter here
        reports = [ask(name, kinds) for name in shown(names, "asking devices")]
        tried = {kind.label: _try(kind, reports) for kind in kinds} if options.compared else {}
    folded = {kind.label: _folded(kind) for kind in kinds}
    if options.json:
        print(json.dumps(_plain(title, reports, folded, tried), indent=1))
    else:
        _print(title, kinds, reports, folded, tried)
    wrong = [(label, row) for label, rows in tried.items() for row in rows if row.outcome == "differs"]
    for label, row in wrong:
        for reason in row.reasons:
            print(f"qattn: {row.device}, {row.method}, {label}: {reason}", file=sys.stderr)
    return 1 if wrong else 0


def known_devices() -> list[str]:
    """Devices that are installed, and those whose package is known."""
    return sorted({*installed_devices(), *PACKAGES})


def _kinds(options: Any) -> tuple[str, list[Kind]]:
    if (options.checkpoint, options.preset, options.attention) == (None, None, None):
        kinds = [Kind(name, Circuit(3, words, encoding=name)) for name, words in EXAMPLES.items()]
        return "two small circuits of 3 inputs: encoded as amplitudes, and as angles", kinds
    source = source_of(options)
    ((name, attentions),) = source.every_attention()
    groups = circuit_groups(attentions)
    if not groups:
        raise ValueError(f"{name} attention has no circuits; choose one that has, such as qisa")
    labels = [f"{', '.join(group.maps)} ({group.circuits[0].encoding.name})" for group in groups]
    kinds = [Kind(label, g.circuits[0], g.for_states) for label, g in zip(labels, groups, strict=True)]
    return f"{source.title}, {name} attention", kinds


# --- asking -----------------------------------------------------------------------------------------------------


def ask(name: str, kinds: Sequence[Kind]) -> DeviceReport:
    """What a device can do with circuits."""
    simulator = name in LOCAL_SIMULATORS
    try:
        runner = Runner(name, 2, {})
    except ValueError as problem:
        return DeviceReport(name, str(problem), simulator)
    answers = {kind.label: {method: _answer(name, method, kind) for method in METHODS} for kind in kinds}
    auto, picked = {}, {}
    for kind in kinds:
        try:
            plan = make_plan(Execution(executor="qnode", device=name), [kind.circuit], for_states=kind.for_states)
            auto[kind.label], picked[kind.label] = plan.explain(), plan.diff_method
        except ValueError as refusal:
            auto[kind.label], picked[kind.label] = str(refusal), None
    if not simulator:
        return DeviceReport(name, None, simulator, auto=auto, picked=picked, answers=answers)
    precision = device_precision(runner)
    exact = "no" if precision is None else str(precision).removeprefix("torch.")
    can = dict(shots=_samples(name), noise=runner.gives_channels, states=runner.gives_states)
    return DeviceReport(name, None, simulator, exact, **can, auto=auto, picked=picked, answers=answers)


def _answer(device: str, method: str, kind: Kind) -> Answer:
    execution = Execution(executor="qnode", device=device, diff_method=method)
    try:
        executor = make_executor([kind.circuit], execution, for_states=kind.for_states)
    except ValueError as refusal:
        return Answer(False, str(refusal))
    return Answer(True, None, executor.plan.input_gradient, executor.count(1, training=True))


def _folded(kind: Kind) -> str:
    """What `auto` picks where no device is asked for."""
    return make_plan(Execution(), [kind.circuit], for_states=kind.for_states).explain()


def _samples(device: str) -> bool:
    tape = QuantumScript([qml.RX(1.0, 0)], [qml.expval(qml.Z(0))], shots=10)
    try:
        (value,) = Runner(device, 1, {}, shots=10, seed=0).run([tape])[0]
    except Exception:  # whatever a device raises, the answer is no
        return False
    return abs(float(value) * 5 - round(float(value) * 5)) < 1e-6  # ten shots give fifths


def _try(kind: Kind, reports: Sequence[DeviceReport]) -> list[Comparison]:
    names = [report.name for report in reports if report.simulator and report.problem is None]
    pairs = shown(list(itertools.product(names, METHODS)), f"trying {kind.label}")
    found = [row for pair in pairs for row in compare_gradients(kind.circuit, *pair, for_states=kind.for_states)]
    return [row for row in found if row.outcome != "skipped"]


# --- printing ---------------------------------------------------------------------------------------------------


def _plain(
    title: str, reports: Sequence[DeviceReport], folded: Mapping[str, str], tried: Mapping[str, Sequence[Comparison]]
) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "circuits": title,
        "auto": dict(folded),
        "devices": [{**asdict(report), "install": _install(report.name)} for report in reports],
    }
    if tried:
        plain["tried"] = {
            label: [{**asdict(row), "errors": dict(row.errors), "allowed": dict(row.allowed)} for row in rows]
            for label, rows in tried.items()
        }
    return plain


def _install(name: str) -> str | None:
    if name in installed_devices() or name not in PACKAGES:
        return None
    return f"pip install {PACKAGES[name]}"


def _print(
    title: str,
    kinds: Sequence[Kind],
    reports: Sequence[DeviceReport],
    folded: Mapping[str, str],
    tried: Mapping[str, Sequence[Comparison]],
) -> None:
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH

    def line(text: str, indent: str = "") -> None:
        indents: dict[str, Any] = dict(initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False)
        console.print(escape(textwrap.fill(text, console.width, **indents)))

    def head(text: str) -> None:
        console.print(f"\n[bold]{escape(text)}[/bold]")

    usable = [report for report in reports if report.problem is None]
    line(title)
    if usable:
        head("What devices give")
        console.print(_abilities(kinds, usable))
        if not all(report.simulator for report in usable):
            line("?: not asked, since circuits on it may cost money; nothing has been run there")
        notes: dict[str, int] = {}
        head("Methods: works, with executions for a token in training; or no, with the number of a note")
        console.print(_methods(kinds, usable, notes))
        for why, number in notes.items():
            line(f"({number}) {why}")
    unusable = [report for report in reports if report.problem is not None and _install(report.name) is None]
    if unusable:
        head("Cannot be opened")
        for report in unusable:
            line(f"{report.name}: {report.problem}", "  ")
    missing: dict[str, list[str]] = {}
    for report in reports:
        if command := _install(report.name):
            missing.setdefault(command, []).append(report.name)
    if missing:
        head("Not installed")
        for command, names in missing.items():
            line(f"{command}: {', '.join(names)}", "  ")
    head("What auto picks, left to itself, and on a device that it is to run on")
    for kind in kinds:
        line(f"{kind.label}:")
        line(folded[kind.label], "  ")
        alike: dict[str, list[str]] = {}
        for report in usable:
            alike.setdefault(_of_any(report.name, report.auto[kind.label]), []).append(report.name)
        for text, names in alike.items():
            line(f"{', '.join(names)}: {text}", "  ")
    for label, rows in tried.items():
        if rows:
            head(f"{label}: largest errors against folding")
            console.print(_tried(rows))


def _table(columns: Sequence[str], left: int = 1) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    return table


def _abilities(kinds: Sequence[Kind], reports: Sequence[DeviceReport]) -> Table:
    picks = [f"auto: {kind.label}" for kind in kinds]
    table = _table(("device", "exact", "shots", "noise", "states", *picks), left=5 + len(picks))
    for report in reports:
        can = [_yes(report.shots), _yes(report.noise), _yes(report.states)]
        picked = [report.picked[kind.label] or "-" for kind in kinds]
        table.add_row(report.name, report.exact or "?", *can, *picked)
    return table


def _yes(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


def _methods(kinds: Sequence[Kind], reports: Sequence[DeviceReport], notes: dict[str, int]) -> Table:
    table = _table(("", *METHODS))
    for kind in kinds:
        table.add_section()
        table.add_row(f"[bold]{escape(kind.label)}[/bold]", *[""] * len(METHODS))
        for report in reports:
            answers = report.answers[kind.label]
            table.add_row(report.name, *[_cell(report.name, answers[method], notes) for method in METHODS])
    return table


def _cell(device: str, answer: Answer, notes: dict[str, int]) -> str:
    if answer.works:
        return f"works, {answer.executions:,}"
    return f"no ({notes.setdefault(_of_any(device, answer.why_not), len(notes) + 1)})"


def _of_any(device: str, text: str) -> str:
    """The text without the device's name, so that devices share it."""
    return text.replace(device, "the device")


def _tried(rows: Sequence[Comparison]) -> Table:
    titles = ("values", "by inputs", "by angles")
    table = _table(("device", "method", *titles, "", "ms a token"), left=2)
    for row in rows:
        errors = [f"{row.errors[what]:.0e}" if what in row.errors else "-" for what in COMPARED]
        differs = "" if row.outcome == "agrees" else "wrong"
        table.add_row(row.device, row.method, *errors, differs, f"{row.milliseconds:.3g}")
    return table
