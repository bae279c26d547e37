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

ROWS, TABLE, MARKDOWN, PAGE = "rows.csv", "table.csv", "table.md", "comparison.html"
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


class Column(NamedTuple):
    """A column of a table of variants: heading, unit, heading in the terminal (empty: left out there), and cells."""

    heading: str
    unit: str
    narrow: str
    cell: Callable[[Entry], Cell]


def _spread(key: str, digits: int) -> Callable[[Entry], Cell]:
    return lambda entry: _spread_cell(entry.spread(key), digits)


def _spread_cell(spread: Spread, digits: int) -> Cell:
    if not spread.count:
        return Cell(NOTHING, f"(0 of {spread.runs})" if spread.runs else "")
    deviation = f"± {spread.deviation:.{digits}f} " if spread.count > 1 else ""
    of = "" if spread.count == spread.runs else f" of {spread.runs}"
    return Cell(_minus(f"{spread.mean:.{digits}f}"), f"{deviation}({spread.count}{of})")


def _gain(reference: Callable[[Entry], str]) -> Callable[[Entry], Cell]:
    return lambda entry: _gain_cell(entry.gain(reference(entry)), entry.leaks)


def _gain_cell(gain: Difference | None, leaks: bool) -> Cell:
    if gain is None or not math.isfinite(gain.percent.mean):
        return Cell(NOTHING)
    percent, ends = gain.percent, NOTHING
    if percent.has_interval:
        ends = f"{signed(percent.low)}, {signed(percent.high)}"
    tone = ("better" if percent.mean > 0 else "worse") if percent.excludes_zero and not leaks else ""
    return Cell(signed(percent.mean), f"[{ends}] ({percent.count})", tone)


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _own_mechanism(entry: Entry) -> str:
    return entry.of[0] if entry.role == "ablation" and entry.of else ""


def _parameters(entry: Entry) -> Cell:
    return Cell(", ".join(f"{number:,}" for number in entry.distinct("parameters")) or NOTHING)


def _twin(entry: Entry) -> Cell:
    mismatches = entry.distinct("twin_mismatch")
    other = entry.group.entries.get(entry.twin)
    if not entry.twin:
        return Cell(NOTHING)
    mismatch = ", ".join(f"{signed(100 * mismatch)} %" for mismatch in mismatches)
    return Cell(other.title if other else entry.twin, f"({mismatch})" if mismatch else "")


def _mismatch(entry: Entry) -> Cell:
    return Cell(_twin(entry).more.strip("()") or NOTHING)


def _rate(entry: Entry) -> Cell:
    return Cell(", ".join(f"{rate:g}" for rate in entry.distinct("learning_rate")) or NOTHING)


def _time(kind: str) -> Callable[[Entry], Cell]:
    return lambda entry: _time_cell(entry.time(kind))


def _time_cell(ratio: Ratio | None) -> Cell:
    if ratio is None:
        return Cell(NOTHING)
    return Cell(f"{ratio.median:.2f}", "" if ratio.low == ratio.high else f"({ratio.low:.2f}–{ratio.high:.2f})")


def _memory(entry: Entry) -> Cell:
    return Cell(f"{entry.memory:.2f}" if math.isfinite(entry.memory) else NOTHING)


def _verdict(entry: Entry) -> Cell:
    in_part = entry.verdict == "causal" and any(map(is_partial, entry.values("certificate")))
    return Cell(f"{entry.verdict} in part" if in_part else entry.verdict, tone="leaks" if entry.leaks else "")


QUALITY = (
    Column("cross-entropy", "nats per token", "cross-entropy\nnats per token", _spread("cross_entropy", 4)),
    Column("gain over twin", "%", "gain over twin\n%", _gain(lambda entry: entry.twin)),
    Column("gain over classical", "%", "gain over classical\n%", _gain(lambda entry: CLASSICAL)),
    Column("gain over its mechanism", "%", "", _gain(_own_mechanism)),
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
    Column("parameters", "trainable", "parameters", _parameters),
    Column("twin", "and its mismatch", "", _twin),
    Column("", "", "twin\noff by", _mismatch),
    Column("learning rate", "chosen", "learning\nrate", _rate),
    Column("inference", "time", "inference\ntime", _time("inference")),
    Column("training step", "time", "training step\ntime", _time("training")),
    Column("activations", "memory", "activ-\nations", _memory),
)
TABLES = {"Cross-entropy": QUALITY, "Text": TEXT, "Without the future": BEYOND, "Cost": COST}


def _columns(columns: Sequence[Column], entries: Sequence[Entry], in_terminal: bool = False) -> list[Column]:
    """Those that are for the terminal, or for a page, and say something about any of the variants."""
    wanted = [column for column in columns if (column.narrow if in_terminal else column.heading)]
    return [column for column in wanted if any(column.cell(entry).text != NOTHING for entry in entries)]


def explanations(groups: Sequence[Group]) -> list[str]:
    """What the tables need to be understood, one paragraph for each matter."""
    entries = [entry for group in groups for entry in group.entries.values()]
    texts = [
        "±: standard deviation over seeds. In parentheses: how many seeds a cell has (and of how many, where some "
        "gave no number).",
        "Gain: by how much less cross-entropy than another variant, in percent of the other's mean, so above zero is "
        "better. Runs are paired by seed, which gives them the same batches. In brackets: 95 % interval of the mean "
        f"over pairs, by the studentised bootstrap; [{NOTHING}]: {FEWEST_PAIRS} seeds needed. Intervals are not "
        "corrected for their number: of twenty, one may miss the truth.",
    ]
    if any(entry.twin for entry in entries):
        texts.append(
            "Twin: classical attention in a model of about as many parameters, which differ by the percentage."
        )
    if any(entry.leaks for entry in entries):
        texts.append(
            f"{LEAKS}: an output depends on a later token, or the model is better than the best there can be. What it "
            "scores with the window before it says nothing of what it can predict; from the past alone does."
        )
    if any(entry.verdict == "undecided" for entry in entries):
        texts.append("undecided: the certificate was not finished, or found neither a leak nor its absence.")
    if any(_verdict(entry).text.endswith(" in part") for entry in entries):
        texts.append("causal in part: no leak was found, in less than all that there is to look at.")
    texts.append(
        "From the past alone: each token is predicted from the tokens before it and nothing else, as in generation. "
        "Written freely: generated continuations against the text itself; rates near 1 are usual."
    )
    if any(entry.spread("excess").count for entry in entries):
        texts.append("Excess: cross-entropy minus the least there can be on the same windows, as the source is known.")
    if timed := dict.fromkeys(group.baseline for group in groups if group.timing):
        texts.append(f"Time: ratio to {' and '.join(timed)}, measured by turns.")
    if any(math.isfinite(entry.memory) for entry in entries):
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
        entries = list(group.entries.values())
        for columns in TABLES.values():
            if chosen := _columns(columns, entries, in_terminal=True):
                console.print(_rich_table(entries, chosen))
                console.print()
        if group.timed():
            console.print(f"Time: {escape(group.timed())}.\n", highlight=False)
    for text in explanations(groups):
        console.print(escape(text), highlight=False)


def _rich_table(entries: Sequence[Entry], columns: Sequence[Column]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("variant", overflow="fold")
    for column in columns:
        table.add_column(column.narrow, justify="right", no_wrap=True)
    tones = {"better": "bold", "worse": "", "leaks": "bold red", "": ""}
    for entry in entries:
        title = Text("  " * (entry.name != entry.mechanism) + entry.short_title)
        if entry.leaks:
            title.append(f" {LEAKS}", "bold red")
        cells = (column.cell(entry) for column in columns)
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
    - `table.md`: the tables to read, in Markdown;
    - `differences.png`, `positions.png`, `cost.png`: each if there is something to draw; one that there is nothing
      for any more is removed;
    - `comparison.html`: everything on one page that needs no other file.

    Args:
        folder: made if missing.
        rows: of all runs that are done, in the order wanted.
        timings: as in `timing.json`, by corpus and size.
        title: heading of the page.
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
    files[MARKDOWN] = _markdown(groups).encode()
    files[PAGE] = _page(groups, title, notes).encode()
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    for name in set(PICTURES) - set(files):
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


def _markdown(groups: Sequence[Group]) -> str:
    lines = []
    for group in groups:
        entries = list(group.entries.values())
        if group.title:
            lines += [f"## {_inert(group.title)}", ""]
        lines += [f"{_inert(group.settings())}.", ""]
        for heading, columns in TABLES.items():
            chosen = _columns(columns, entries)
            if not chosen:
                continue
            names = [f"{column.heading}{f', {column.unit}' * bool(column.unit)}" for column in chosen]
            lines += [f"### {heading}", "", f"| variant | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
            for entry in entries:
                title = _inert(entry.short_title) if entry.name != entry.mechanism else f"**{_inert(entry.title)}**"
                title = f"{title} **{LEAKS}**" if entry.leaks else title
                above = "" if entry.name == entry.mechanism else "↳ "
                cells = (_inert(str(column.cell(entry))) for column in chosen)
                lines.append(f"| {above}{title} | {' | '.join(cells)} |")
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
        tables = [(heading, _columns(columns, entries)) for heading, columns in TABLES.items()]
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
                "entries": entries,
                "tables": [(heading, chosen) for heading, chosen in tables if chosen],
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
