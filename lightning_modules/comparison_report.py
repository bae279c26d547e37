"""The report of a comparison, made from its rows alone: tables for the terminal, CSV, Markdown, pictures and a page.

Every cell says from how many seeds it comes, so that the report of a sweep that is still going on is an honest one.
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_modules.comparison import (
    CLASSICAL,
    Entry,
    Group,
    Ratio,
    Row,
    Spread,
    Timings,
    flat_ablation,
    flat_entry,
    flat_row,
    groups_of,
    signed,
)
from lightning_modules.comparison_figures import WARN, cost_figure, gain_figure, position_figure
from lightning_modules.files import atomic_write
from lightning_modules.labels import LEAKS, is_partial
from lightning_modules.metrics import describe_bleu
from lightning_modules.report import _InlineFigures, _png, render_page
from lightning_modules.statistics import FEWEST_PAIRS, Difference
from pennylane_qattn.certificate import Leak

ROWS, TABLE, ABLATIONS = "rows.csv", "table.csv", "ablations.csv"
MARKDOWN, PAGE = "table.md", "comparison.html"
PICTURES = {"differences.png": gain_figure, "positions.png": position_figure, "cost.png": cost_figure}
NOTHING = "–"

# --- cells ------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A cell in two parts, the second one less important, and what a difference is: "better", "worse" or neither."""

    text: str
    more: str = ""
    tone: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.more}".strip()


NONE = Cell(NOTHING)


class Line(NamedTuple):
    """A line of a table: a variant, and the mechanism under which it stands; `None` for one that stands by itself."""

    entry: Entry
    above: Entry | None = None

    @property
    def is_head(self) -> bool:
        """It begins a mechanism's lines."""
        return self.above is None and self.entry.name == self.entry.mechanism

    @property
    def title(self) -> str:
        return self.entry.title if self.is_head else self.entry.title_under(self.above)


class Column(NamedTuple):
    """A column of a table of variants: heading, unit, heading in the terminal (empty: left out there), and cells."""

    heading: str
    unit: str
    narrow: str
    cell: Callable[[Line], Cell]


def _seeds(count: int, runs: int) -> str:
    """How many seeds a cell has."""
    return f"({count})" if count == runs else f"({count} of {runs})"


def _seeds_with(entry: Entry, key: str) -> str:
    """Those whose row has something there."""
    return _seeds(sum(value is not None for value in entry.values(key)), len(entry.runs))


def _spread(key: str, digits: int) -> Callable[[Line], Cell]:
    return lambda line: _spread_cell(line.entry.spread(key), digits)


def _spread_cell(spread: Spread, digits: int) -> Cell:
    if not spread.count:
        return Cell(NOTHING, f"(0 of {spread.runs})" if spread.runs else "")
    deviation = f"± {spread.deviation:.{digits}f} " if spread.count > 1 else ""
    return Cell(_minus(f"{spread.mean:.{digits}f}"), f"{deviation}{_seeds(spread.count, spread.runs)}")


def _gain(reference: Callable[[Line], str]) -> Callable[[Line], Cell]:
    return lambda line: _gain_cell(line.entry.gain(reference(line)), line.entry.leaks)


def _gain_cell(gain: Difference | None, leaks: bool) -> Cell:
    if gain is None or not math.isfinite(gain.percent.mean):
        return NONE
    percent, ends = gain.percent, NOTHING
    if percent.has_interval:
        ends = f"{signed(percent.low)}, {signed(percent.high)}"
    tone = ("better" if percent.mean > 0 else "worse") if percent.excludes_zero and not leaks else ""
    return Cell(signed(percent.mean), f"[{ends}] ({percent.count})", tone)


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _above(line: Line) -> str:
    return line.above.name if line.above else ""


def _distinct(key: str, form: str) -> Callable[[Line], Cell]:
    """What the runs have, which should be the same."""

    def cell(line: Line) -> Cell:
        values = line.entry.distinct(key)
        return Cell(", ".join(f"{value:{form}}" for value in values), _seeds_with(line.entry, key)) if values else NONE

    return cell


def _parameters_over(line: Line) -> Cell:
    more = math.nan if line.above is None else 100 * line.entry.parameters_over(line.above)
    return Cell(signed(more), _seeds_with(line.entry, "parameters")) if math.isfinite(more) else NONE


def _twin(line: Line) -> Cell:
    entry = line.entry
    other = entry.group.entries.get(entry.twin)
    if not entry.twin:
        return NONE
    mismatch = _mismatch(line)
    seeds = mismatch.more or _seeds(len(entry.runs), len(entry.runs))
    return Cell(other.title if other else entry.twin, f"({mismatch.text}) {seeds}" if mismatch.more else seeds)


def _mismatch(line: Line) -> Cell:
    mismatches = line.entry.distinct("twin_mismatch") if line.entry.twin else []
    text = ", ".join(f"{signed(100 * mismatch)} %" for mismatch in mismatches)
    return Cell(text, _seeds_with(line.entry, "twin_mismatch")) if text else NONE


def _time(kind: str) -> Callable[[Line], Cell]:
    return lambda line: _time_cell(line.entry.time(kind))


def _time_cell(ratio: Ratio | None) -> Cell:
    if ratio is None:
        return NONE
    ends = "" if ratio.low == ratio.high else f"({ratio.low:.2f}–{ratio.high:.2f}) "
    return Cell(f"{ratio.median:.2f}", f"{ends}(1)")  # the models of one seed are timed


def _memory(line: Line) -> Cell:
    memory = line.entry.memory
    return Cell(f"{memory.mean:.2f}", _seeds(memory.count, memory.runs)) if memory.count else NONE


def _verdict(line: Line) -> Cell:
    entry = line.entry
    verdicts = entry.values("causality")
    count = sum((value if value in (LEAKS, "causal") else "undecided") == entry.verdict for value in verdicts)
    text = f"{entry.verdict} in part" if _in_part(entry) else entry.verdict
    return Cell(text, _seeds(count, len(verdicts)), "leaks" if entry.leaks else "")


def _in_part(entry: Entry) -> bool:
    return entry.verdict == "causal" and any(map(is_partial, entry.values("certificate")))


QUALITY = (
    Column("cross-entropy", "nats per token", "cross-entropy\nnats per token", _spread("cross_entropy", 4)),
    Column("gain over twin", "%", "gain over twin\n%", _gain(lambda line: line.entry.twin)),
    Column("gain over classical", "%", "gain over classical\n%", _gain(lambda line: CLASSICAL)),
)
ABLATED = (
    Column("gain over its mechanism", "%", "gain over its\nmechanism, %", _gain(_above)),
    Column("cross-entropy", "nats per token", "cross-entropy\nnats per token", _spread("cross_entropy", 4)),
    Column("parameters", "trainable", "parameters", _distinct("parameters", ",")),
    Column("parameters over its mechanism's", "%", "over its\nmechanism's, %", _parameters_over),
)
TEXT = (
    Column("bits", "per character", "bits per\ncharacter", _spread("bits_per_character", 4)),
    Column("CER", "", "CER", _spread("cer", 3)),
    Column("WER", "", "WER", _spread("wer", 3)),
    Column("BLEU", "", "BLEU", _spread("bleu", 3)),
)
BEYOND = (
    Column("from the past alone", "nats per token", "from the past\nalone, nats", _spread("prefix_cross_entropy", 4)),
    Column("CER", "written freely", "CER,\nwritten freely", _spread("generation.cer", 3)),
    Column("WER", "written freely", "", _spread("generation.wer", 3)),
    Column("BLEU", "written freely", "", _spread("generation.bleu", 3)),
    Column("excess over the optimum", "nats per token", "excess over the\noptimum, nats", _spread("excess", 4)),
    Column("certificate", "", "certificate", _verdict),
)
COST = (
    Column("parameters", "trainable", "parameters", _distinct("parameters", ",")),
    Column("twin", "and its mismatch", "", _twin),
    Column("", "", "twin\noff by", _mismatch),
    Column("learning rate", "chosen", "learning\nrate", _distinct("learning_rate", "g")),
    Column("inference", "time", "inference\ntime", _time("inference")),
    Column("training step", "time", "training step\ntime", _time("training")),
    Column("activations", "memory", "activ-\nations", _memory),
)


class Shown(NamedTuple):
    """A table that says something: its heading, columns and lines."""

    heading: str
    columns: list[Column]
    lines: list[Line]


def _all(group: Group) -> list[Line]:
    """Every variant once, under its mechanism."""
    entries = group.entries
    return [Line(e, None if e.name == e.mechanism else entries.get(e.mechanism)) for e in entries.values()]


def _ablated(group: Group) -> list[Line]:
    """The mechanisms that have ablations, each with all of these; one of several stands under each."""
    return [
        line
        for entry in group.entries.values()
        if entry.ablations
        for line in (Line(entry), *(Line(ablation, entry) for ablation in entry.ablations))
    ]


TABLES: dict[str, tuple[Sequence[Column], Callable[[Group], list[Line]]]] = {
    "Cross-entropy": (QUALITY, _all),
    "Ablations": (ABLATED, _ablated),
    "Text": (TEXT, _all),
    "Without the future": (BEYOND, _all),
    "Cost": (COST, _all),
}


def _tables(group: Group, in_terminal: bool = False) -> list[Shown]:
    """Those that say something, with the columns that are for the terminal, or for a page, and do so, too."""
    found = []
    for heading, (columns, lines_of) in TABLES.items():
        lines = lines_of(group)
        wanted = [column for column in columns if (column.narrow if in_terminal else column.heading)]
        chosen = [column for column in wanted if any(column.cell(line).text != NOTHING for line in lines)]
        if chosen:
            found.append(Shown(heading, chosen, lines))
    return found


def explanations(groups: Sequence[Group]) -> list[str]:
    """What the tables need to be understood, one paragraph for each matter."""
    entries = [entry for group in groups for entry in group.entries.values()]
    texts = [
        "±: standard deviation over seeds. In the last parentheses: how many seeds a cell has (and of how many, where "
        "some gave no number or another verdict).",
        "Gain: by how much less cross-entropy than another variant, in percent of the other's mean, so above zero is "
        "better. Runs are paired by seed, which gives them the same batches. In brackets: 95 % interval of the mean "
        f"over pairs, by the studentised bootstrap; [{NOTHING}]: {FEWEST_PAIRS} seeds needed. Intervals are not "
        "corrected for their number: of twenty, one may miss the truth.",
    ]
    if any(entry.twin for entry in entries):
        texts.append(
            "Twin: classical attention in a model of about as many parameters, which differ by the percentage."
        )
    if any(entry.ablations for entry in entries):
        texts.append(
            "Ablations stand under the mechanism that they leave something out of. One that equals a variant with "
            "another name is that variant, trained once; its parameters may be more or fewer than the mechanism's."
        )
    if any(entry.leaks for entry in entries):
        texts.append(
            f"{LEAKS}: an output depends on a later token, or the model is better than the best there can be. What it "
            "scores with the window before it says nothing of what it can predict; from the past alone does."
        )
    if any(entry.verdict == "undecided" for entry in entries):
        texts.append("undecided: the certificate was not finished, or found neither a leak nor its absence.")
    if any(map(_in_part, entries)):
        texts.append("causal in part: no leak was found, in less than all that there is to look at.")
    texts.append(
        "From the past alone: each token is predicted from the tokens before it and nothing else, as in generation. "
        "Written freely: generated continuations against the text itself; rates near 1 are usual."
    )
    if any(entry.spread("excess").count for entry in entries):
        texts.append("Excess: cross-entropy minus the least there can be on the same windows, as the source is known.")
    if timed := dict.fromkeys(group.baseline for group in groups if group.timing):
        texts.append(f"Time: ratio to {' and '.join(timed)}, measured by turns on the models of one seed.")
    if any(entry.memory.count for entry in entries):
        texts.append(f"Activations: bytes that a training step keeps for its backward pass, over those of {CLASSICAL}.")
    return texts


# --- terminal ---------------------------------------------------------------------------------------------------


def print_summary(rows: Sequence[Row], timings: Timings | None = None, console: Console | None = None) -> None:
    """Prints the tables, 100 columns wide at most; on a console that is no terminal, at least so wide.

    Args:
        rows: of all runs that are done.
        timings: as in `timing.json`, by corpus and size.
        console: where to; standard output by default.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
    groups = groups_of(rows, timings)
    for group in groups:
        heading = f"[bold]{escape(group.title)}[/]: " if group.title else ""
        console.print(f"{heading}{escape(group.settings())}", highlight=False)
        for table in _tables(group, in_terminal=True):
            console.print(_rich_table(table.lines, table.columns))
            console.print()
        if group.timed():
            console.print(f"Time: {escape(group.timed())}.\n", highlight=False)
    for text in explanations(groups):
        console.print(escape(text), highlight=False)


def _rich_table(lines: Sequence[Line], columns: Sequence[Column]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("variant", overflow="fold")
    for column in columns:
        table.add_column(column.narrow, justify="right", no_wrap=True)
    tones = {"better": "bold", "worse": "", "leaks": "bold red", "": ""}
    for line in lines:
        title = Text("  " * (not line.is_head) + line.title)
        if line.entry.leaks:
            title.append(f" {LEAKS}", "bold red")
        cells = (column.cell(line) for column in columns)
        table.add_row(title, *(Text(str(cell), tones[cell.tone]) for cell in cells))
    return table


# --- files ------------------------------------------------------------------------------------------------------


def write_comparison(
    folder: str | Path,
    rows: Sequence[Row],
    timings: Timings | None = None,
    title: str = "Comparison",
    notes: str | Sequence[str] = (),
) -> Path:
    """Writes the whole report, each file whole or not at all, the page last.

    - `rows.csv`: one line per run, without samples and certificates;
    - `table.csv`: one line per variant, corpus and size: means, standard deviations, gains with their intervals;
    - `ablations.csv`, where there are any: one line per ablation and mechanism that it is the ablation of;
    - `table.md`: the tables to read, in Markdown;
    - `differences.png`, `positions.png`, `cost.png`: each if there is something to draw;
    - `comparison.html`: everything on one page that needs no other file.

    One that there is nothing for any more is removed.

    Args:
        folder: made if missing.
        rows: of all runs that are done, in the order wanted.
        timings: as in `timing.json`, by corpus and size.
        title: heading of the page and of `table.md`.
        notes: a paragraph, or some, below the heading.

    Returns:
        The path of the page.

    Raises:
        ValueError: if there are no rows, or they do not say whose they are, or the folder cannot be written to.
    """
    groups, folder = groups_of(rows, timings), Path(folder)
    notes = [notes] if isinstance(notes, str) else [note for note in notes if note]
    figures = {name: draw(groups) for name, draw in PICTURES.items()}
    files = {name: _png(figure) for name, figure in figures.items() if figure}
    entries = [entry for group in groups for entry in group.entries.values()]
    files[ROWS] = _csv([flat_row(row) for row in rows])
    files[TABLE] = _csv([flat_entry(entry) for entry in entries])
    if ablations := [flat_ablation(entry, ablation) for entry in entries for ablation in entry.ablations]:
        files[ABLATIONS] = _csv(ablations)
    files[MARKDOWN] = _markdown(groups, title, notes).encode()
    files[PAGE] = _page(groups, title, notes).encode()
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    for name in {*PICTURES, ABLATIONS} - set(files):
        (folder / name).unlink(missing_ok=True)
    return folder / PAGE


def write_rows(folder: str | Path, rows: Sequence[Row], name: str = ROWS) -> Path:
    """Writes `rows.csv` alone, as `write_comparison` does, or under another name."""
    path = Path(folder) / name
    with atomic_write(path) as file:
        file.write(_csv([flat_row(row) for row in rows]))
    return path


def position_picture(rows: Sequence[Row]) -> bytes:
    """`positions.png`.

    Raises:
        ValueError: if no row has cross-entropies per position.
    """
    figure = position_figure(groups_of(rows))
    if figure is None:
        raise ValueError("there is nothing to draw: no row has its cross-entropy per position")
    return _png(figure)


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _markdown(groups: Sequence[Group], title: str, notes: Sequence[str]) -> str:
    lines = [f"# {_inert(title)}", ""]
    for note in notes:
        lines += [_inert(note), ""]
    for group in groups:
        if group.title:
            lines += [f"## {_inert(group.title)}", ""]
        lines += [f"{_inert(group.settings())}.", ""]
        for table in _tables(group):
            names = [f"{column.heading}{f', {column.unit}' * bool(column.unit)}" for column in table.columns]
            lines += [f"### {table.heading}", "", f"| variant | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
            for line in table.lines:
                name = f"**{_inert(line.title)}**" if line.is_head else f"↳ {_inert(line.title)}"
                name = f"{name} **{LEAKS}**" if line.entry.leaks else name
                cells = (_inert(str(column.cell(line))) for column in table.columns)
                lines.append(f"| {name} | {' | '.join(cells)} |")
            lines.append("")
        if group.timed():
            lines += [f"Time: {_inert(group.timed())}.", ""]
    lines += [f"- {_inert(text)}" for text in (*explanations(groups), describe_bleu())]
    return "\n".join(lines) + "\n"


def _inert(text: str) -> str:
    """Text in which Markdown finds nothing to do."""
    return "".join(f"\\{c}" if c in "\\`*_<>|#$" else " " if c in "\r\n" else c for c in text)


# --- page -------------------------------------------------------------------------------------------------------


def _page(groups: Sequence[Group], title: str, notes: Sequence[str]) -> str:
    figures = _InlineFigures()

    def drawn(heading: str, caption: str, figure: Figure | None, of: str = "") -> dict[str, Any] | None:
        if figure is None:
            return None
        svg = figures.svg(figure, f"{heading}{f', {of}' * bool(of)}").replace(WARN, "var(--warn)")
        return {"heading": heading, "caption": caption, "svg": svg}

    gains = drawn("Gains", "right of zero is better; in parentheses: seeds", gain_figure(groups))
    sections = []
    for group in groups:
        entries = list(group.entries.values())
        positions = "solid: with the window before the model; dashed: from the past alone, where that differs"
        plots = [
            drawn("Where in the window", positions, position_figure([group]), group.title),
            drawn(
                "Quality and time", "bars: standard deviation, and lowest to highest", cost_figure([group]), group.title
            ),
        ]
        samples = [(entry, next((text for text in entry.values("sample") if text), "")) for entry in entries]
        sections.append(
            {
                "group": group,
                "tables": _tables(group),
                "plots": [plot for plot in plots if plot],
                "samples": [(entry, text) for entry, text in samples if text],
                "leaks": [(entry, _leak(entry)) for entry in entries if entry.leaks],
            }
        )
    texts = (*explanations(groups), describe_bleu())
    context = {"title": title, "notes": notes, "gains": gains, "sections": sections, "explanations": texts}
    return render_page("comparison.html", **context, LEAKS=LEAKS)


def _leak(entry: Entry) -> str:
    """What the first certificate that found a leak says of it; without one, the model was too good."""
    for certificate in entry.values("certificate"):
        leak = (certificate or {}).get("leak")
        if leak:
            return str(Leak(**leak))
    return "better than the best there can be"
