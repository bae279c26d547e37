"""Pictures of results: ratios as bars with their spread and their targets, and times as lines against sizes."""

import math
import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from lightning_modules.benchmarks.result import Column, Result, median
from lightning_modules.report import FONT, INK, SERIES, _axes, _png, _shortened

#: Medians that differ by a larger factor are drawn on a logarithmic scale.
LINEAR_UP_TO = 20
MARKERS = ("o", "s", "^", "v", "D", "P", "X")
TARGET, TARGET_DASHES = SERIES[1], (0, (3, 1.5))
PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")


def picture(result: Result) -> bytes | None:
    """The picture of a result as PNG; `None` if nothing of it can be drawn."""
    figure = {"bars": bars, "lines": lines}[result.picture](result)
    return None if figure is None else _png(figure)


# --- ratios -----------------------------------------------------------------------------------------------------


@matplotlib.rc_context(FONT)
def bars(result: Result) -> Figure | None:
    """A panel for each column that is to be drawn: a bar up to the median, a line from lowest to highest."""
    columns = [c for c in result.columns if c.drawn and any(median(row.get(c.key)) is not None for row in result.rows)]
    if not columns:
        return None
    labels = [_shortened(result.label(row), 64) for row in result.rows]
    room = 0.075 * max(map(len, labels))
    figure = Figure(figsize=(room + 3.1 * len(columns), 1.3 + 0.3 * len(labels)), layout="constrained")
    for place, column in enumerate(columns, 1):
        axes = _axes(figure, textwrap.fill(column.heading, 36), "", (1, len(columns), place))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=INK, alpha=0.12, linewidth=0.8)
        _draw_bars(axes, column, result)
        axes.set_yticks(range(len(labels)))
        axes.set_yticklabels(labels if place == 1 else [], parse_math=False)
        axes.set_ylim(len(labels) - 0.4, -0.6)
    if any(column.targets for column in columns):
        handle = Line2D([], [], color=TARGET, linestyle=TARGET_DASHES, linewidth=1.6)
        figure.legend([handle], ["target"], loc="outside lower center", frameon=False, labelcolor=INK)
    return figure


def _draw_bars(axes, column: Column, result: Result) -> None:
    cells = [row.get(column.key) for row in result.rows]
    medians = {at: value for at, cell in enumerate(cells) if (value := median(cell)) is not None}
    spreads = {at: (min(cell), max(cell)) for at, cell in enumerate(cells) if isinstance(cell, list)}
    labels = [result.label(row) for row in result.rows]
    targets = [(at, t.bound) for at, label in enumerate(labels) for t in column.targets if t.is_for(label)]
    shown = [
        1.0,
        *medians.values(),
        *(bound for _, bound in targets),
        *(end for ends in spreads.values() for end in ends),
    ]
    start = 0.0
    if min(shown) > 0 and max(shown) > LINEAR_UP_TO * min(shown):
        start = min(shown) / 2
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(PLAIN)
        axes.minorticks_off()
        axes.set_xlim(start, 1.5 * max(shown))
    for at, value in medians.items():
        axes.barh(at, value - start, left=start, height=0.62, color=SERIES[0], alpha=0.85)
    for at, ends in spreads.items():
        axes.hlines(at, *ends, color=INK, linewidth=1.4)
    axes.axvline(1, color=INK, linewidth=1, alpha=0.7)
    for at, bound in targets:
        axes.vlines(bound, at - 0.5, at + 0.5, color=TARGET, linestyle=TARGET_DASHES, linewidth=1.6)


# --- times against sizes ----------------------------------------------------------------------------------------


@matplotlib.rc_context(FONT)
def lines(result: Result) -> Figure | None:
    """A panel for each sweep, both scales logarithmic: rows have `sweep`, `sizes` and `seconds` of each size."""
    sweeps = list(dict.fromkeys(row["sweep"] for row in result.rows if row["sizes"]))
    if not sweeps:
        return None
    names = list(dict.fromkeys(row["mechanism"] for row in result.rows))
    across = min(2, len(sweeps))
    down = math.ceil(len(sweeps) / across)
    figure = Figure(figsize=(4.4 * across, 3.2 * down + 0.5), layout="constrained")
    for place, sweep in enumerate(sweeps, 1):
        axes = _axes(figure, sweep, "milliseconds", (down, across, place))
        of_sweep = [row for row in result.rows if row["sweep"] == sweep]
        for row in of_sweep:
            style = _style(names.index(row["mechanism"]))
            axes.plot(row["sizes"], [1000 * min(seconds) for seconds in row["seconds"]], markersize=4, **style)
        axes.set(xscale="log", yscale="log")
        _plain_ticks(axes, sorted({size for row in of_sweep for size in row["sizes"]}))
    handles = [Line2D([], [], markersize=4, **_style(index)) for index in range(len(names))]
    figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=4, labelcolor=INK)
    return figure


def _style(index: int) -> dict[str, str]:
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)], "linestyle": "-"}


def _plain_ticks(axes, sizes: Sequence[int]) -> None:
    axes.minorticks_off()
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_formatter(PLAIN)
