"""Pictures of a comparison: gains with their intervals, cross-entropy per position, cross-entropy against time.

Each has one panel for every corpus and size. What leaks is drawn in a colour of its own, and never sets the scale.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lightning_modules.comparison import CLASSICAL, Entry, Group, Ratio, signed
from lightning_modules.labels import LEAKS
from lightning_modules.report import FONT, INK, SERIES, _axes, _shortened
from lightning_modules.statistics import FEWEST_PAIRS, Difference

#: The colour of what leaks.
WARN = "#b3261e"
ABLATION = SERIES[7]
#: Differences of less than this many nats are rounding.
ALIKE = 1e-3
#: Panels side by side at most.
ACROSS = 3
MARKERS = ("o", "s", "^", "v", "D", "P", "X")


@dataclass(frozen=True)
class Look:
    """How a mechanism is drawn in all pictures and panels."""

    colour: str
    marker: str


def looks(groups: Sequence[Group]) -> dict[str, Look]:
    """A look for each mechanism, by name."""
    leaking, names = set(), {}
    for group in groups:
        for entry in group.entries.values():
            if entry.name == entry.mechanism:
                names[entry.name] = None
                leaking |= {entry.name} if entry.leaks else set()
    found, counts = {}, {True: 0, False: 0}
    for name in names:
        leaks = name in leaking
        index = counts[leaks]
        counts[leaks] += 1
        if leaks:
            found[name] = Look(WARN, MARKERS[index % len(MARKERS)])
        elif name == CLASSICAL:
            found[name], counts[leaks] = Look(INK, "o"), index
        else:
            found[name] = Look(SERIES[index % len(SERIES)], MARKERS[index // len(SERIES) % len(MARKERS)])
    return found


def _across(count: int) -> int:
    """Panels side by side, so that the rows are of about one length."""
    return math.ceil(count / math.ceil(count / ACROSS))


def _panels(groups: Sequence[Group], width: float, height: float, x: str, y: str) -> tuple[Figure, list]:
    """Empty axes, one for each group, with their titles if there are several."""
    columns = _across(len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    panels = []
    for number, group in enumerate(groups, 1):
        axes = _axes(figure, x, y if number % columns == 1 or columns == 1 else "", (rows, columns, number))
        if len(groups) > 1:
            axes.set_title(_shortened(group.title, 60), parse_math=False, color=INK, fontsize=10.5, loc="left", pad=8)
        panels.append(axes)
    return figure, panels


def _legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """Below the panels, in as many columns as there is room for."""
    labels = [_shortened(label, 40) for label in labels]

    def width(columns: int) -> float:
        """Inches, about: a legend is filled column by column."""
        tall = math.ceil(len(labels) / columns)
        return sum(0.068 * max(map(len, labels[i : i + tall])) + 0.7 for i in range(0, len(labels), tall))

    columns = max((n for n in range(1, len(labels) + 1) if width(n) <= figure.get_figwidth()), default=1)
    columns = math.ceil(len(labels) / math.ceil(len(labels) / columns))
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.2 * math.ceil(len(labels) / columns))
    place = {"loc": "outside lower center", "frameon": False, "ncols": columns, "labelcolor": INK}
    box = figure.legend(handles, [str(i) for i in range(len(labels))], columnspacing=1.6, handletextpad=0.6, **place)
    for text, label in zip(box.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)


# --- gains --------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(FONT)
def gain_figure(groups: Sequence[Group]) -> Figure | None:
    """Gains over the matched twin, or where nobody has a twin over `classical`, with intervals and single seeds.

    Mechanisms stand above their ablations. `None` without any gain.
    """
    everyone = [entry for group in groups for entry in group.entries.values()]
    over_twin = any(entry.gain(entry.twin) for entry in everyone)
    gains: dict[Group, dict[str, Gain]] = {group: {} for group in groups}
    lines: dict[str, Entry] = {}
    for entry in everyone:
        found = None if entry.role == "twin" else Gain.of(entry, entry.twin if over_twin else CLASSICAL)
        if found is not None:
            gains[entry.group][entry.name] = found
            lines.setdefault(entry.name, entry)
    if not lines:
        return None
    places = _places(list(lines.values()))
    reference = "the matched classical twin" if over_twin else "classical attention"
    columns = _across(len(groups))
    height = 0.26 * (max(places.values()) + 1) + 0.95
    figure, panels = _panels(groups, 2.2 / columns + 3.6, height, f"gain over {reference} (%)", "")
    for number, (axes, group) in enumerate(zip(panels, groups, strict=True)):
        _draw_gains(axes, gains[group], places)
        axes.set_yticks(list(places.values()))
        _name_lines(axes, list(lines.values()) if number % columns == 0 else [])
        axes.set_ylim(max(places.values()) + 0.6, -0.6)
    shown = [gain for of_group in gains.values() for gain in of_group.values()]
    keys: list[tuple[str, dict[str, Any], bool]] = [
        ("mechanism", {"color": SERIES[0], "marker": "o", "markersize": 6.5}, any(g.is_mechanism for g in shown)),
        ("ablation", {"color": ABLATION, "marker": "D", "markersize": 5}, any(not g.is_mechanism for g in shown)),
        ("95 % interval", {"color": INK, "linewidth": 1.8}, any(g.percent.has_interval for g in shown)),
        (
            "one seed",
            {"color": INK, "marker": "|", "markersize": 9, "alpha": 0.6},
            any(g.percent.count > 1 for g in shown),
        ),
        (
            f"fewer than {FEWEST_PAIRS} seeds: no interval",
            {"color": INK, "marker": "o", "markersize": 6.5, "markerfacecolor": "none"},
            any(not g.percent.has_interval for g in shown),
        ),
    ]
    handles = [Line2D([], [], **{"linestyle": "-" if "linewidth" in style else "", **style}) for _, style, _ in keys]
    chosen = [(handle, key[0]) for handle, key in zip(handles, keys, strict=True) if key[2]]
    _legend(figure, *zip(*chosen, strict=True))
    return figure


@dataclass(frozen=True)
class Gain:
    """A line of the picture: the gain in percent, and that of every seed in percent of the same mean."""

    percent: Difference
    singles: list[float]
    is_mechanism: bool
    leaks: bool

    @classmethod
    def of(cls, entry: Entry, reference: str) -> Self | None:
        """`None` where there is none."""
        gain = entry.gain(reference)
        if gain is None or not gain.reference:
            return None
        singles = [100 * (other - own) / gain.reference for other, own in entry.pairs(reference)]
        return cls(gain.percent, singles, entry.role == "mechanism", entry.leaks)


def _places(lines: Sequence[Entry]) -> dict[str, float]:
    """Where each line stands; before a mechanism there is some more room."""
    places, at = {}, -1.0
    for entry in lines:
        at += 1.0 if not places or entry.role != "mechanism" else 1.4
        places[entry.name] = at
    return places


def _name_lines(axes, lines: Sequence[Entry]) -> None:
    texts = [entry.title if entry.role == "mechanism" else entry.short_title for entry in lines]
    axes.set_yticklabels([_shortened(text, 34) for text in texts], parse_math=False)
    for tick, entry in zip(axes.get_yticklabels(), lines, strict=False):
        tick.set_fontweight("bold" if entry.role == "mechanism" else "normal")


def _draw_gains(axes, gains: dict[str, Gain], places: dict[str, float]) -> None:
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=INK, alpha=0.12, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=1.2, alpha=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate("% (seeds)", (1, -0.8), (8, 0), **place, va="center", fontsize=8, color=INK, alpha=0.65)
    low, high = _limits([gain for gain in gains.values() if not gain.leaks] or list(gains.values()))
    axes.set_xlim(low, high)
    for name, gain in gains.items():
        at, percent = places[name], gain.percent
        colour = WARN if gain.leaks else SERIES[0] if gain.is_mechanism else ABLATION
        text = f"{LEAKS}  " * gain.leaks + f"{signed(percent.mean)} ({percent.count})"
        text_style = {"va": "center", "fontsize": 8.5, "color": colour if gain.leaks else INK}
        axes.annotate(text, (1, at), (8, 0), **place, **text_style)
        ends = (percent.low, percent.high) if percent.has_interval else (percent.mean, percent.mean)
        inside = [min(max(end, low), high) for end in ends]
        axes.plot(inside, [at, at], color=colour, linewidth=1.8, solid_capstyle="butt")
        beyond = {"<": ends[0] < low, ">": ends[1] > high}  # where it goes on outside the panel
        for marker, edge in (("<", low), (">", high)):
            if beyond[marker]:
                axes.plot([edge], [at], marker=marker, color=colour, markersize=5.5, clip_on=False, linestyle="")
        singles = [single for single in gain.singles if low <= single <= high and percent.count > 1]
        axes.plot(singles, [at] * len(singles), "|", color=colour, markersize=9, alpha=0.6, markeredgewidth=1)
        if low <= percent.mean <= high:
            shape = {"marker": "o", "markersize": 6.5} if gain.is_mechanism else {"marker": "D", "markersize": 5}
            face = colour if percent.has_interval else "none"
            axes.plot([percent.mean], [at], color=colour, markerfacecolor=face, linestyle="", **shape)


def _limits(gains: Iterable[Gain]) -> tuple[float, float]:
    """Room for all seeds and zero, and for intervals unless they are far wider, as with ends at infinity."""
    points = [0.0, *(single for gain in gains for single in gain.singles)]
    low, high = min(points), max(points)
    reach = 1.0 * (high - low) or 1.0
    ends = [end for g in gains if g.percent.has_interval for end in (g.percent.low, g.percent.high)]
    low, high = max(low - reach, min([low, *ends])), min(high + reach, max([high, *ends]))
    return low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)


# --- positions ----------------------------------------------------------------------------------------------------


@matplotlib.rc_context(FONT)
def position_figure(groups: Sequence[Group]) -> Figure | None:
    """Cross-entropy at each position of the window for each mechanism; `None` if it is not known for any.

    Solid with the window before the model, dashed with the past alone where that differs: what a model that sees the
    future knows at the last position, where there is none, and when it writes.
    """
    styles = looks(groups)
    keys: dict[str, dict[str, Any]] = {}
    dashed = {"linestyle": (0, (3.5, 2)), "linewidth": 1.6, "marker": None}
    figure, panels = _panels(groups, 4.9, 3.4, "position in the window", "cross-entropy (nats per token)")
    for axes, group in zip(panels, groups, strict=True):
        optimum = next(
            (line for entry in group.entries.values() if (line := entry.positions("optimum_per_position"))), []
        )
        if optimum:
            keys["the least there can be"] = {"color": INK, "linewidth": 5, "alpha": 0.22}
            axes.plot(range(len(optimum)), optimum, **keys["the least there can be"])
        for entry in group.entries.values():
            line, alone = entry.positions("per_position"), entry.positions("prefix_per_position")
            if entry.name not in styles or not line:
                continue
            look = styles[entry.name]
            style = {"color": look.colour, "linewidth": 1.8, "solid_capstyle": "round"}
            if len(line) <= 24:
                style |= {"marker": look.marker, "markersize": 4.5}
            above = {"zorder": 3 if entry.leaks else 2}
            axes.plot(range(len(line)), line, **style, **above)
            if alone and (entry.leaks or max(abs(a - b) for a, b in zip(line, alone, strict=False)) > ALIKE):
                axes.plot(range(len(alone)), alone, **style | dashed, **above)
                keys["predicted from the past alone"] = {"color": INK, **dashed}
            keys.setdefault(entry.label, style)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_ylim(bottom=-0.025 * axes.get_ylim()[1])  # a line at zero is to be seen whole
    if not keys:
        return None
    lasts = [key for key in ("predicted from the past alone", "the least there can be") if key in keys]
    labels = [*(key for key in keys if key not in lasts), *lasts]
    _legend(figure, [Line2D([], [], **keys[label]) for label in labels], labels)
    return figure


# --- cost ---------------------------------------------------------------------------------------------------------


@matplotlib.rc_context(FONT)
def cost_figure(groups: Sequence[Group]) -> Figure | None:
    """Cross-entropy against the time of a training step; `None` without times. What leaks stands at the lower edge."""
    styles, keys, kinds = looks(groups), {}, {}
    figure, panels = _panels(
        groups, 4.9, 3.4, "time of a training step over classical", "cross-entropy (nats per token)"
    )
    for axes, group in zip(panels, groups, strict=True):
        axes.set_xscale("log")
        axes.grid(visible=True, axis="x", color=INK, alpha=0.12, linewidth=0.8)
        points = []
        for entry in group.entries.values():
            time, spread = entry.time("training"), entry.spread("cross_entropy")
            if time is not None and math.isfinite(spread.mean) and entry.mechanism in styles:
                points.append((entry, time, spread))
        fair = [point for point in points if not point[0].leaks] or points
        tops = [spread.mean + _or_zero(spread.deviation) for _, _, spread in fair]
        bottoms = [spread.mean - _or_zero(spread.deviation) for _, _, spread in fair]
        if fair:
            room = 0.06 * (max(tops) - min(bottoms)) or 0.05
            axes.set_ylim(min(bottoms) - (2.2 if len(fair) < len(points) else 1) * room, max(tops) + room)
        for entry, time, spread in points:
            colour, (marker, size) = styles[entry.mechanism].colour, _shape(entry)
            style = {"color": WARN if entry.leaks else colour, "marker": marker, "markersize": size, "linestyle": ""}
            style["markerfacecolor"] = "none" if entry.role == "twin" else style["color"]
            bottom = axes.get_ylim()[0]
            if spread.mean < bottom:
                below = {"color": WARN, "marker": "v", "markersize": 7, "linestyle": ""}
                axes.plot([time.median], [bottom], **below, clip_on=False)
                keys.setdefault(f"{LEAKS}: far below", below)
                continue
            bars = {"elinewidth": 1, "alpha": 0.9}
            wide = [[time.median - time.low], [time.high - time.median]]
            axes.errorbar([time.median], [spread.mean], [_or_zero(spread.deviation)], wide, **style, **bars)
            if entry.name == entry.mechanism or entry.leaks:
                keys.setdefault(entry.label, style)
            else:
                face = "none" if entry.role == "twin" else INK
                kinds[f"its {entry.role}"] = style | {"color": INK, "markerfacecolor": face}
        _time_axis(axes, [time for _, time, _ in points])
    if not keys:
        return None
    keys |= dict(sorted(kinds.items(), reverse=True))
    _legend(figure, [Line2D([], [], **style) for style in keys.values()], list(keys))
    return figure


def _shape(entry: Entry) -> tuple[str, float]:
    return {"twin": ("D", 5.5), "ablation": ("^", 5.5)}.get(entry.role, ("o", 7))


def _or_zero(number: float) -> float:
    return number if math.isfinite(number) else 0.0


def _time_axis(axes, times: Sequence[Ratio]) -> None:
    low, high = min((t.low for t in times), default=1), max((t.high for t in times), default=1)
    axes.set_xlim(low / 1.15, high * 1.15)
    steps = (1, 2, 5) if high / low > 3 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
