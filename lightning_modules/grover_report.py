"""Tables and pictures of what Grover search would do for attention, from the rows that `grover_study.py` makes."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_modules.files import atomic_write
from lightning_modules.report import FONT, SERIES, _axes, _png
from pennylane_qattn.grover.estimate import WITHOUT_QRAM

JSON, MARKDOWN = "grover.json", "grover.md"
NOTHING = "–"
#: The name of the index in tables.
BALL_TREE = "ball tree"
#: What every table of calls needs beside it.
UNIT = (
    "Calls are inner products: one for each coherent oracle call of a search and for each key that it verifies, one "
    "for each key of a scan, one for each distance or score of the index. They are counted, not timed; loading keys "
    "into superposition (QRAM) and error correction are left out, in favour of the search."
)


@dataclass(frozen=True)
class Column:
    """A heading, the name of its number in a row, and how that is written."""

    heading: str
    name: str
    form: str | Callable[[Any], str] = ",.0f"

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.name)
        if value is None or isinstance(value, float) and math.isnan(value):
            return NOTHING
        return self.form(value) if callable(self.form) else format(value, self.form)


@dataclass(frozen=True)
class Section:
    """A table with its heading and what is to be said of it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()


def short(value: float) -> str:
    """Three digits, with a power of ten where that is shorter."""
    return f"{value:,.0f}" if 100 <= abs(value) < 100_000 else f"{value:.3g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


TEXT = str
QUERIES = (
    Column("n", "n"),
    Column("k", "k"),
    Column("search", "quantum", short),
    Column("exact mean", "quantum_expected", short),
    Column("to the last key", "to_last_key", short),
    Column("number known", "number_known", short),
    Column("√(nk)", "root", short),
    Column("scan", "scan"),
    Column("fewer calls than a scan", "wins", _yes),
)
FINDERS = (
    Column("n", "n"),
    Column("k", "k"),
    Column("by", "finder", TEXT),
    Column("calls per row", "per_row", short),
    Column("building, once", "building", short),
    Column("found", "found", ".1%"),
    Column("exact", "exact", _yes),
)
CAUSAL = (
    Column("n", "n"),
    Column("marked", "share", ".0%"),
    Column("by", "finder", TEXT),
    Column("calls, all rows", "calls"),
    Column("keys found", "keys"),
)
ERRORS = (
    Column("n", "n"),
    Column("k", "k"),
    Column("η", "eta", ".2f"),
    Column("background", "order", lambda order: {1: "1", 2: "1 + x"}[order]),
    Column("largest row error", "error", ".2g"),
    Column("bound", "bound", ".2g"),
    Column("by", "theorems", ", ".join),
    Column("with a background of 0", "error_of_zeros", ".2g"),
)
RESOURCES = (
    Column("n", "num_keys"),
    Column("lookup", "lookup", TEXT),
    Column("logical qubits", "logical_qubits", short),
    Column("oracle T", "oracle_t", short),
    Column("oracle depth", "oracle_depth", short),
    Column("calls", "calls", short),
    Column("T in all", "total_t", short),
    Column("depth in all", "total_depth", short),
    Column("Toffolis per classical product", "toffolis_per_multiplication", short),
    Column("break-even clock", "break_even_clock", short),
)
GOODNESS = (
    Column("layer", "layer"),
    Column("head", "head"),
    Column("τ", "tau", ".3g"),
    Column("k, most", "k_max"),
    Column("k, mean", "k_mean", ".2f"),
    Column("η, most", "eta_max", ".3g"),
    Column("η, mean", "eta_mean", ".3g"),
    Column("rows with η < 1", "flat", ".0%"),
    Column("row error, mean", "error_mean", ".2g"),
    Column("bound, mean", "bound_mean", ".2g"),
)
MODEL_COSTS = (
    Column("layer", "layer"),
    Column("by", "finder", TEXT),
    Column("calls, all rows", "calls"),
    Column("per row", "per_row", ".1f"),
)
SPARSITY = (
    Column("k", "k"),
    Column("background", "order", lambda order: {1: "1", 2: "1 + x"}[order]),
    Column("cross-entropy, nats", "cross_entropy", ".4f"),
    Column("minus exact", "change", "+.4f"),
    Column("standard error", "change_error", ".4f"),
    Column("η, mean", "eta_mean", ".3g"),
    Column("row error, mean", "error_mean", ".2g"),
    Column("bound, mean", "bound_mean", ".2g"),
)
THRESHOLDS = (
    Column("τ", "tau", ".3g"),
    Column("keys kept, mean", "k_mean", ".2f"),
    *SPARSITY[1:],
)
AMPLIFICATION = (
    Column("layer", "layer"),
    Column("head", "head"),
    Column("chance before", "mean_mark", ".3f"),
    Column("after", "success", ".3f"),
    Column("iterations", "iterations", ".2f"),
    Column("rows not amplified", "not_amplified", ".0%"),
    Column("of them turned back", "reversed_order", ".0%"),
    Column("oracle calls per sample", "calls", ".1f"),
    Column("conditional", "conditional_calls", ".1f"),
    Column("scan", "scan", ".1f"),
)


def print_sections(sections: Sequence[Section], console: Console) -> None:
    """Prints tables, their notes below."""
    for section in sections:
        console.print(f"[bold]{escape(section.title)}[/]")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in section.columns:
            longest = max((len(column.cell(row)) for row in section.rows), default=0)
            table.add_column(
                column.heading, justify="left" if column.form is TEXT else "right", min_width=min(longest, 30)
            )
        for row in section.rows:
            table.add_row(*(escape(column.cell(row)) for column in section.columns))
        console.print(table)
        for note in section.notes:
            console.print(escape(note), highlight=False)
        console.print()


def write_sections(folder: Path, title: str, sections: Sequence[Section], figures: Mapping[str, Figure | None]) -> Path:
    """Writes `grover.json`, `grover.md` and the pictures; a picture that there is nothing for is removed.

    Returns:
        The path of `grover.md`.
    """
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", f"| {' | '.join(column.heading for column in section.columns)} |"]
        lines.append(f"|{'|'.join('---' if column.form is TEXT else '---:' for column in section.columns)}|")
        lines += [f"| {' | '.join(column.cell(row) for column in section.columns)} |" for row in section.rows]
        lines += ["", *(line for note in section.notes for line in (note, ""))]
    lines += [line for name, figure in figures.items() if figure for line in (f"![{name}]({name})", "")]
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic_write(folder / name) as file:
            file.write(_png(figure))
    plain = [
        {"title": s.title, "notes": list(s.notes), "rows": _plain([dict(row) for row in s.rows])} for s in sections
    ]
    with atomic_write(folder / JSON, "w") as file:
        file.write(json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    with atomic_write(folder / MARKDOWN, "w") as file:
        file.write("\n".join(lines))
    return folder / MARKDOWN


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def random_sections(tables: Mapping[str, Any]) -> list[Section]:
    """The tables of random instances and of resources."""
    fit = tables["scaling"]
    law = [
        f"{what}: calls grow as n^{one['exponent_n']:.3f} (± {one['error_n']:.3f}) and k^{one['exponent_k']:.3f} "
        f"(± {one['error_k']:.3f}); over √n·Σ t^(−1/2) they are {one['constant']:.2f} "
        f"({one['constant_low']:.2f} to {one['constant_high']:.2f})."
        for what, one in (("To the last key", fit["to_last_key"]), ("Number known", fit["number_known"]))
    ]
    return [
        Section("Calls to find all marked keys of a row, simulated", QUERIES, tables["queries"], [*law, UNIT]),
        Section("The same rows by everybody", FINDERS, tables["finders"], [UNIT]),
        Section("All rows of a small causal matrix", CAUSAL, tables["causal"]),
        Section(
            "Row errors of the sparse approximation and their bounds",
            ERRORS,
            tables["errors"],
            ["Errors are sums of moduli over a row, so at most 2; the largest of the rows of one instance."],
        ),
        Section(
            "Logical resources to search one row",
            RESOURCES,
            tables["resources"],
            [
                WITHOUT_QRAM,
                "Break-even clock: by how many times a layer of Toffolis would have to be faster than one "
                "multiplication of a classical scan for the search to win.",
            ],
        ),
    ]


def model_sections(tables: Mapping[str, Any]) -> list[Section]:
    """The tables of a trained model, those that there are."""
    kinds = {
        "goodness": ("How good its score matrices are for a search", GOODNESS, ()),
        "costs": ("Calls to find the keys above the threshold, all windows, rows and heads", MODEL_COSTS, (UNIT,)),
        "sparsity": (
            "Cross-entropy when a row keeps its k largest scores and the rest is background",
            SPARSITY,
            ("Change and standard error are over windows, paired with the exact model.",),
        ),
        "thresholds": (
            "Cross-entropy when a row keeps the keys with scores of τ or more",
            THRESHOLDS,
            ("Change and standard error are over windows, paired with the exact model.",),
        ),
        "amplification": (
            "Amplification: the chance to find the marked outcome, and its price",
            AMPLIFICATION,
            ("Conditional: calls per sample with the marked outcome, those of a sample over its chance.",),
        ),
    }
    return [Section(*kinds[name][:2], tables[name], kinds[name][2]) for name in kinds if tables.get(name)]


# --- pictures ---------------------------------------------------------------------------------------------------


@matplotlib.rc_context(FONT)
def query_figure(tables: Mapping[str, Any]) -> Figure:
    """Calls against n and against k, beside the square root, the scan and the index."""
    rows, finders = tables["queries"], tables["finders"]
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = _axes(figure, "keys of a row, n", "calls to find all marked keys", (1, 2, 1))
    for index, k in enumerate(sorted({row["k"] for row in rows})):
        of_k = [row for row in rows if row["k"] == k]
        ns, colour = [row["n"] for row in of_k], SERIES[index % len(SERIES)]
        axes.plot(ns, [row["quantum"] for row in of_k], "o", color=colour, markersize=4, label=f"search, k = {k}")
        axes.plot(ns, [row["root"] for row in of_k], "--", color=colour, linewidth=1, label=f"√(nk), k = {k}")
    ns = sorted({row["n"] for row in rows})
    axes.plot(ns, ns, color="black", linewidth=1.2, label="scan")
    index_rows = [row for row in finders if row["finder"] == BALL_TREE]
    if index_rows:
        axes.plot(
            [row["n"] for row in index_rows],
            [row["per_row"] for row in index_rows],
            "s",
            color="#6b7280",
            markersize=4,
            label=f"ball tree, k = {index_rows[0]['k']}",
        )
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    axes = _axes(figure, "marked keys, k", "calls over those of a scan", (1, 2, 2))
    for index, n in enumerate(ns[:: math.ceil(len(ns) / 6)]):
        of_n = [row for row in rows if row["n"] == n]
        axes.plot(
            [row["k"] for row in of_n],
            [row["quantum"] / n for row in of_n],
            "o-",
            color=SERIES[index % len(SERIES)],
            markersize=4,
            label=f"n = {n:,}",
        )
    axes.axhline(1, color="black", linewidth=1.2)
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@matplotlib.rc_context(FONT)
def error_figure(tables: Mapping[str, Any]) -> Figure:
    """True row errors beside their bounds, against eta."""
    rows = tables["errors"]
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = _axes(figure, "flatness of the background, η", "row error, ℓ₁")
    names = {1: "background 1", 2: "background 1 + x"}
    for order, name in names.items():
        of_order = [row for row in rows if row["order"] == order]
        if of_order:
            etas, colour = [row["eta"] for row in of_order], SERIES[order - 1]
            axes.plot(etas, [row["error"] for row in of_order], "o", color=colour, markersize=4.5, label=name)
            axes.plot(etas, [row["bound"] for row in of_order], color=colour, linewidth=1.4, label=f"{name}, bound")
    first = [row for row in rows if row["order"] == 1]
    axes.plot(
        [row["eta"] for row in first],
        [row["error_of_zeros"] for row in first],
        "x",
        color="black",
        markersize=5,
        label="background 0",
    )
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    return figure


@matplotlib.rc_context(FONT)
def resource_figure(tables: Mapping[str, Any]) -> Figure:
    """T gates in all, and the break-even clock, against n."""
    rows = tables["resources"]
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    panels = (("total_t", "T gates to search one row"), ("break_even_clock", "break-even clock"))
    for place, (name, label) in enumerate(panels, 1):
        axes = _axes(figure, "keys of a row, n", label, (1, 2, place))
        for index, lookup in enumerate(dict.fromkeys(row["lookup"] for row in rows)):
            of_lookup = [row for row in rows if row["lookup"] == lookup]
            ns = [row["num_keys"] for row in of_lookup]
            axes.plot(ns, [row[name] for row in of_lookup], "o-", color=SERIES[index], markersize=4, label=lookup)
        if name == "break_even_clock":
            axes.axhline(1, color="black", linewidth=1.2)
        axes.set(xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize=8)
    return figure


@matplotlib.rc_context(FONT)
def sparsity_figure(tables: Mapping[str, Any]) -> Figure | None:
    """Cross-entropy against the number of keys that are kept."""
    rows = [row for row in tables.get("sparsity") or [] if row["cross_entropy"] is not None]
    if not rows:
        return None
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = _axes(figure, "keys that a row keeps, k", "cross-entropy, nats per token")
    for order, name in ((1, "background 1"), (2, "background 1 + x")):
        of_order = [row for row in rows if row["order"] == order]
        if of_order:
            ks, losses = [row["k"] for row in of_order], [row["cross_entropy"] for row in of_order]
            axes.plot(ks, losses, "o-", color=SERIES[order - 1], markersize=4.5, label=name)
    axes.axhline(rows[0]["exact"], color="black", linewidth=1.2, label="exact")
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=8)
    return figure


@matplotlib.rc_context(FONT)
def success_figure(tables: Mapping[str, Any]) -> Figure | None:
    """The chance of the marked outcome in every head, before and after amplification."""
    rows = tables.get("amplification")
    if not rows:
        return None
    figure = Figure(figsize=(max(4.2, 1.6 + 0.4 * len(rows)), 3.8), layout="constrained")
    axes = _axes(figure, "layer, head", "chance of the marked outcome")
    places = range(len(rows))
    axes.bar([p - 0.2 for p in places], [row["mean_mark"] for row in rows], 0.4, color=SERIES[7], label="before")
    axes.bar([p + 0.2 for p in places], [row["success"] for row in rows], 0.4, color=SERIES[0], label="amplified")
    axes.set_xticks(list(places), [f"{row['layer']}, {row['head']}" for row in rows])
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    return figure
