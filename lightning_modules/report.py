"""Finished runs side by side: a table for the terminal, a self-contained web page, plain numbers.

`write_report` needs no network and no display. The plots are matplotlib figures of their own (no pyplot) and stand in
the page as SVG, in the page's own colours, light or dark. The page has no JavaScript, or, where maps are to be read
with the pointer, some lines of its own without which it shows the same.
"""

import base64
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import matplotlib.image
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .files import atomic_write
from .labels import LEAKS, with_label
from .metrics import describe_bleu


@dataclass(eq=False)
class RunResult:
    """What is known about one run. Only the name is needed; whatever is missing is left out of the report.

    Attributes:
        name: short and unique among the results reported together; part of file names.
        title: how the run is called in tables and plots; the name by default. Where `causal` is False, it has LEAKS.
        parameters: number of trainable parameters.
        metrics: scalars, named as by `lightning_modules.metrics.TextMetrics`; others are listed apart.
        per_position: cross-entropy in nats at each position of the window, the first one first.
        train_characters_per_second, generation_characters_per_second: throughput.
        causal: whether the model was found causal; None if not examined.
        sample: generated text.
        history: losses in the course of training: ``{"step", "train_loss", "val_loss"}``, either may lack.
        attention_maps: weights (H, T, T) by layer name, [head, query, key].
        attention_labels: the T tokens as text.
        circuit: a drawing of the attention circuit.
        settings: how the run was made; may be nested.
    """

    name: str
    title: str = ""
    parameters: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    per_position: list[float] = field(default_factory=list)
    train_characters_per_second: float = math.nan
    generation_characters_per_second: float = math.nan
    causal: bool | None = None
    sample: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    attention_maps: dict[str, Any] = field(default_factory=dict)
    attention_labels: list[str] = field(default_factory=list)
    circuit: Figure | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.title = self.title or self.name
        if self.causal is False and LEAKS not in self.title:
            self.title = with_label(self.title, LEAKS)

    def to_plain(self) -> dict[str, Any]:
        """Numbers and text for JSON, what is not finite as None; without attention maps and drawings."""
        left_out = {"attention_maps", "attention_labels", "circuit"}
        return {key: _plain(value) for key, value in vars(self).items() if key not in left_out}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    try:
        value = value.tolist() if hasattr(value, "tolist") else float(value)
    except (TypeError, ValueError):
        return str(value)
    if isinstance(value, list):
        return _plain(value)
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


# --- table ---


class Column(NamedTuple):
    """A column of the comparison: headings, the value of a result and its text, which extreme is the best."""

    narrow: str
    heading: str
    unit: str
    value: Callable[[RunResult], float | None]
    text: Callable[[float], str]
    best: Callable[..., float] | None = None

    def cell(self, result: RunResult) -> str:
        value = _number(self.value(result))
        return "–" if math.isnan(value) else self.text(value)


def _metric(name: str) -> Callable[[RunResult], float | None]:
    return lambda result: result.metrics.get(name)


def _decimals(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def _count(value: float) -> str:
    return f"{value:,.1f}" if 0 < value < 100 and value % 1 else f"{value:,.0f}"


TRAIN, GENERATE = "train_characters_per_second", "generation_characters_per_second"
COLUMNS = (
    Column("params", "parameters", "", attrgetter("parameters"), _count),
    Column("cross-\nentropy", "cross-entropy", "nats per token", _metric("cross_entropy"), _decimals(3), min),
    Column("bits/\nchar", "bits", "per character", _metric("bits_per_character"), _decimals(3), min),
    Column("per-\nplexity", "perplexity", "per token", _metric("perplexity"), _decimals(2), min),
    Column("CER", "CER", "", _metric("cer"), _decimals(3), min),
    Column("WER", "WER", "", _metric("wer"), _decimals(3), min),
    Column("BLEU", "BLEU", "", _metric("bleu"), _decimals(3), max),
    Column("train\nchar/s", "training", "characters/s", attrgetter(TRAIN), _count, max),
    Column("gener.\nchar/s", "generation", "characters/s", attrgetter(GENERATE), _count, max),
)
HEADLINE_METRICS = {"cross_entropy", "bits_per_character", "perplexity", "cer", "wer", "bleu"}
CAUSAL = {True: "yes", False: LEAKS, None: "–"}


def comparison_table(results: Sequence[RunResult]) -> Table:
    """One row per run with the columns of `COLUMNS` and whether it is causal; 100 characters wide at most.

    A console that is no terminal is 80 wide unless told otherwise, too narrow for it: see `print_comparison`.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=describe_bleu(), caption_justify="left")
    table.add_column("run", overflow="fold")
    for column in COLUMNS:
        table.add_column(column.narrow, justify="right", no_wrap=True)
    table.add_column("causal", no_wrap=True)
    for result in results:
        cells = (column.cell(result) for column in COLUMNS)
        table.add_row(Text(result.title), *cells, CAUSAL[result.causal])
    return table


def print_comparison(results: Sequence[RunResult], console: Console | None = None) -> None:
    """Print `comparison_table`; a console that is no terminal is made 100 wide at least."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
    console.print(comparison_table(results))


# --- plots ---

# Drawn in these colours; where a figure stands in the page, they become variables of its style sheet.
INK = "#20242b"
SERIES = ("#2a6fdb", "#e2662d", "#12996f", "#8b5cd6", "#c7386f", "#a8780a", "#0f8ea8", "#6b7280")
FONT = {"font.family": "sans-serif", "font.size": 9.5, "svg.fonttype": "none", "axes.unicode_minus": False}


def _axes(figure: Figure, x: str, y: str, place: tuple[int, int, int] = (1, 1, 1)):
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=INK, alpha=0.35)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=INK, labelcolor=INK, length=0, pad=5)
    axes.set_xlabel(x, color=INK, labelpad=6)
    axes.set_ylabel(y, color=INK, labelpad=6)
    return axes


def _line_style(index: int) -> dict[str, Any]:
    dashes = ("-", "--", ":")[index // len(SERIES) % 3]
    return {"color": SERIES[index % len(SERIES)], "linestyle": dashes, "solid_capstyle": "round"}


def _points(xs: Sequence[Any], ys: Sequence[Any]) -> tuple[list[float], list[float]]:
    pairs = [(_number(x), _number(y)) for x, y in zip(xs, ys, strict=True)]
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return [x for x, _ in finite], [y for _, y in finite]


def _losses(result: RunResult, name: str) -> tuple[list[float], list[float]]:
    return _points([row.get("step") for row in result.history], [row.get(name) for row in result.history])


@matplotlib.rc_context(FONT)
def loss_figure(results: Sequence[RunResult], legend: bool = True) -> Figure | None:
    """Validation loss (strong) and training loss (faint) of all runs over the steps; None without any."""
    figure = Figure(figsize=(4.8, 3.1), layout="constrained")
    axes = _axes(figure, "training step", "cross-entropy (nats per token)")
    for index, result in enumerate(results):
        style = _line_style(index)
        axes.plot(*_losses(result, "train_loss"), **style, alpha=0.4, linewidth=1.1)
        xs, ys = _losses(result, "val_loss")
        axes.plot(xs, ys, **style, linewidth=2, marker="o" if len(xs) < 25 else None, markersize=4)
    return _finished(axes, results, legend)


@matplotlib.rc_context(FONT)
def position_figure(results: Sequence[RunResult], legend: bool = True) -> Figure | None:
    """Cross-entropy at each position of the window, all runs; None without any."""
    figure = Figure(figsize=(4.8, 3.1), layout="constrained")
    axes = _axes(figure, "position in the window", "cross-entropy (nats per token)")
    for index, result in enumerate(results):
        xs, ys = _points(range(len(result.per_position)), result.per_position)
        axes.plot(xs, ys, **_line_style(index), linewidth=2, marker="o" if len(xs) < 25 else None, markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(axes, results, legend)


def _finished(axes, results: Sequence[RunResult], legend: bool) -> Figure | None:
    if not any(len(line.get_xdata()) for line in axes.lines):
        return None
    if legend:
        figure = axes.figure
        figure.set_figheight(figure.get_figheight() + 0.2 * len(results))
        handles = [Line2D([], [], linewidth=2, **_line_style(index)) for index in range(len(results))]
        numbers = [str(index) for index in range(len(results))]
        box = figure.legend(handles, numbers, loc="outside lower left", frameon=False, labelcolor=INK)
        for text, result in zip(box.get_texts(), results, strict=True):
            text.set(text=_shortened(result.title, 48), parse_math=False)  # a "$" in a title is no formula
    return axes.figure


# One hue whose opacity is the weight: it looks right on a light and on a dark page. The square root shows the
# small weights of long windows; every map has the same scale, so that maps compare.
HUE = (0.165, 0.435, 0.859)
WEIGHTS = LinearSegmentedColormap.from_list("weights", [(*HUE, 0.0), (*HUE, 1.0)])
WEIGHTS = WEIGHTS.with_extremes(bad=(0.9, 0.3, 0.2, 0.5))


def _scale() -> PowerNorm:
    return PowerNorm(0.5, 0, 1, clip=True)


def _has_no_future(weights: torch.Tensor) -> bool:
    return not weights.triu(1).any()


def _draw_map(axes, weights: torch.Tensor, labels: Sequence[str]) -> None:
    tokens = len(weights)
    if _has_no_future(weights):  # sets the future, where there is nothing, apart from small weights
        stairs = [(i - 0.5, i + rise - 0.5) for i in range(1, tokens) for rise in (-1, 0)]
        corner = [*stairs, (tokens - 0.5, tokens - 1.5), (tokens - 0.5, -0.5)]
        axes.fill(*zip(*corner, strict=True), color=INK, alpha=0.06, linewidth=0)
    axes.imshow(weights.numpy(), cmap=WEIGHTS, norm=_scale(), interpolation="none")
    axes.spines[:].set(color=INK, alpha=0.35)
    step = math.ceil(tokens / 64)
    ticks = list(range(0, tokens, step))
    shown = [_visible(labels[i]) if i < len(labels) else str(i) for i in ticks]
    upright = all(len(label) < 3 for label in shown)
    size = 8.5 if tokens <= 24 else 7
    axes.tick_params(length=0, pad=3, labelcolor=INK, labelsize=size)
    axes.set_xticks(ticks, shown, parse_math=False, rotation=0 if upright else 90)
    axes.set_yticks(ticks, shown, parse_math=False)


def _visible(token: str) -> str:
    return _shortened(_printable(token), 10)


def _printable(token: str) -> str:
    shown = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")
    return "".join(character if character.isprintable() else "·" for character in shown)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _map_size(tokens: int) -> float:
    """Width in inches that leaves room for the labels of up to 64 tokens."""
    return 0.7 + max(2.6, 0.125 * min(tokens, 64))


def _layers(result: RunResult) -> Iterator[tuple[str, torch.Tensor]]:
    for name, maps in result.attention_maps.items():
        weights = torch.as_tensor(maps).detach().cpu().double()
        if weights.ndim != 3 or weights.shape[1] != weights.shape[2] or not weights.numel():
            shape = tuple(weights.shape)
            raise ValueError(f"the attention map {name!r} must be (heads, tokens, tokens); got {shape}")
        yield name, weights


@matplotlib.rc_context(FONT)
def _map_figure(weights: torch.Tensor, labels: Sequence[str]) -> Figure:
    size = _map_size(len(weights))
    figure = Figure(figsize=(size, size), layout="constrained")
    _draw_map(figure.add_subplot(), weights, labels)
    return figure


@matplotlib.rc_context(FONT)
def attention_figure(result: RunResult) -> Figure | None:
    """The attention maps of a run, one row per layer and one column per head; None without maps."""
    layers = list(_layers(result))
    if not layers:
        return None
    columns = max(len(weights) for _, weights in layers)
    size = max(_map_size(weights.shape[-1]) for _, weights in layers)
    figure = Figure(figsize=(size * columns, (size + 0.3) * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), columns, squeeze=False)
    for row, (name, weights) in zip(grid, layers, strict=True):
        for axes in row[len(weights) :]:
            axes.set_axis_off()
        for head, (axes, one) in enumerate(zip(row, weights, strict=False)):
            _draw_map(axes, one, result.attention_labels)
            title = name if len(weights) == 1 else f"{name}, head {head + 1}"
            axes.set_title(title, parse_math=False, color=INK, fontsize=10)
    return _marked(figure, result)


def _marked(figure: Figure, result: RunResult) -> Figure:
    """The figure, headed by the title of the run if that is not causal: a picture may be shown by itself."""
    if result.causal is False:
        figure.suptitle(_shortened(result.title, 60), parse_math=False, color=INK, fontsize=10)
    return figure


@matplotlib.rc_context(FONT)
def _rendered(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A browser has more scripts than matplotlib's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _png(figure: Figure, **options: Any) -> bytes:
    dpi = min(150, 9000 / max(figure.get_size_inches()))
    return _rendered(figure, format="png", dpi=dpi, facecolor="white", **options)


def _svg(figure: Figure, salt: str, **options: Any) -> str:
    with matplotlib.rc_context({"svg.hashsalt": salt}):  # without one, matplotlib's ids are random
        text = _rendered(figure, format="svg", metadata={"Date": None}, **options).decode()
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)


# --- page ---

PAGE, RESULTS = "report.html", "results.json"


def write_report(
    folder: str | Path,
    results: Sequence[RunResult],
    title: str,
    notes: str | Sequence[str] = (),
    hover: bool = False,
) -> Path:
    """Write ``report.html``, ``results.json`` and the pictures of the runs.

    The page holds everything it shows. ``results.json`` holds the numbers, samples and settings, without the
    attention maps. The pictures are ``loss.png``, ``attention-<name>.png`` and ``circuit-<name>.png``, each
    if there is something to draw. Each file is written whole or not at all, the page last. Of a report that was there
    before, the pictures that this one does not have are removed, as far as they are still as that report wrote them.

    Args:
        folder: made if missing.
        results: in the order wanted.
        title: headline of the page.
        notes: a paragraph, or some, shown below the headline.
        hover: the pointer over an attention map brings up query, key and weight; the page then has a script.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: if there are no results, if their names do not differ, if an attention map has no shape
            (H, T, T), or if the folder cannot be written to.
    """
    if not results:
        raise ValueError("a report needs at least one result; got none")
    names = [re.sub(r"[^\w.-]+", "-", result.name) for result in results]
    if len(set(names)) < len(names):
        raise ValueError(f"results need names that differ, also as file names; got {', '.join(names)}")
    page = _page(results, title, notes, hover)
    pictures = {"loss": (loss_figure(results), {})}
    for name, result in zip(names, results, strict=True):
        pictures[f"attention-{name}"] = (attention_figure(result), {})
        pictures[f"circuit-{name}"] = (result.circuit, {"bbox_inches": "tight"})
    folder = Path(folder)
    files = {f"{name}.png": _png(figure, **options) for name, (figure, options) in pictures.items() if figure}
    for path in _pictures_of(folder):
        if path.name not in files:
            path.unlink()
    plain = {
        "title": title,
        "results": [result.to_plain() for result in results],
        "pictures": {name: _digest(content) for name, content in files.items()},
    }
    files[RESULTS] = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False).encode()
    files[PAGE] = page.encode()
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return folder / PAGE


def write_page(
    folder: str | Path, result: RunResult, title: str, notes: str | Sequence[str] = (), hover: bool = False
) -> Path:
    """Writes ``report.html`` alone, of one run: into its folder, where its numbers are already.

    Args, the path that is returned and what is raised are those of `write_report`.
    """
    page = _page([result], title, notes, hover)
    with atomic_write(Path(folder) / PAGE) as file:
        file.write(page.encode())
    return Path(folder) / PAGE


def _pictures_of(folder: Path) -> Iterator[Path]:
    """The pictures that the report in a folder has made, without those that are others by now."""
    try:
        pictures = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["pictures"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is no report, or it is not ours
        return
    for name, digest in pictures:
        path = folder / name
        is_here = Path(name).name == name and path.suffix == ".png" and path.is_file() and not path.is_symlink()
        if is_here and _digest(path.read_bytes()) == digest:
            yield path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _page(results: Sequence[RunResult], title: str, notes: str | Sequence[str], hover: bool) -> str:
    for result in results:
        if result.circuit:
            _marked(result.circuit, result)
    figures = _InlineFigures()
    plots = [
        (heading, caption, figures.svg(figure, heading))
        for heading, caption, figure in (
            ("Training", "strong: validation, faint: training", loss_figure(results, legend=False)),
            ("Where in the window", "the first position is 0", position_figure(results, legend=False)),
        )
        if figure
    ]
    attention = [
        (
            result,
            [(name, maps.shape[-1] > 24, _heads(figures, result, name, maps)) for name, maps in _layers(result)],
        )
        for result in results
        if result.attention_maps
    ]
    return render_page(
        "report.html",
        title=title,
        notes=[note for note in ([notes] if isinstance(notes, str) else notes) if note],
        columns=COLUMNS,
        rows=_rows(results),
        more=_more_metrics(results),
        plots=plots,
        samples=[result for result in results if result.sample],
        attention=attention,
        circuits=[(result, _data_uri(result.circuit)) for result in results if result.circuit],
        settings=_settings(results),
        results=results,
        bleu=describe_bleu(),
        hover=hover,
        weights_of=_base64_weights,
        tokens_of=_json_tokens,
    )


def render_page(template: str, **context: Any) -> str:
    """A page from one of the templates, which share `style.html`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(series=SERIES, **context)


def _rows(results: Sequence[RunResult]) -> list[tuple[RunResult, str, list[tuple[Column, str, bool]]]]:
    """Cells with whether they are the best; a model that sees the future does not compete."""
    rivals = [result for result in results if result.causal is not False]
    best = {}
    for column in COLUMNS:
        values = [value for value in map(_number, map(column.value, rivals)) if math.isfinite(value)]
        if column.best and len(set(values)) > 1:
            best[column] = column.best(values)
    rows = []
    for result in results:
        competes = result.causal is not False
        cells = [(c, c.cell(result), competes and c in best and c.value(result) == best[c]) for c in COLUMNS]
        rows.append((result, CAUSAL[result.causal], cells))
    return rows


def _more_metrics(results: Sequence[RunResult]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for result in results for name in result.metrics)
    text = _decimals(4)
    rows = []
    for name in names:
        values = [_number(result.metrics.get(name)) for result in results]
        if name not in HEADLINE_METRICS and not all(map(math.isnan, values)):
            rows.append((name.replace("_", " "), ["–" if math.isnan(value) else text(value) for value in values]))
    return rows


def _settings(results: Sequence[RunResult]) -> dict[str, list[tuple[str, list[str]]]]:
    """Settings under which the runs differ, with the value of each run, and those that they share."""
    flat = [dict(_flattened(_plain(result.settings))) for result in results]
    rows = [(key, [run.get(key, "–") for run in flat]) for key in dict.fromkeys(key for run in flat for key in run)]
    different = [row for row in rows if len(set(row[1])) > 1]
    return {"different": different, "shared": [row for row in rows if row not in different]}


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _InlineFigures:
    """Figures as SVG elements in the colours of the page."""

    def __init__(self) -> None:
        self._count = 0
        self._frames: dict[tuple, tuple[str, float]] = {}

    def svg(self, figure: Figure, description: str) -> Markup:
        return self._element(*self._drawn(figure), description)

    def map(self, weights: torch.Tensor, labels: Sequence[str], description: str) -> Markup:
        """A map of attention weights. Maps of the same tokens differ in the pixels alone, so the rest is drawn once."""
        alike = (len(weights), _has_no_future(weights), tuple(labels))
        if alike not in self._frames:
            self._frames[alike] = self._drawn(_map_figure(weights, labels))
        svg, width = self._frames[alike]
        self._count += 1
        svg = re.sub(r'((?: id="|url\(#|href="#)[^")]+)', rf"\1-{self._count}", svg)
        svg, images = re.subn(r"(data:image/png;base64,)[^\"]*", rf"\g<1>{_pixels(weights)}", svg)
        assert images == 1
        return self._element(svg, width, description)

    def _drawn(self, figure: Figure) -> tuple[str, float]:
        """The figure's SVG, without what opens it, and its width in inches."""
        self._count += 1
        # With a salt of its own, no id of the figure is another's in the page.
        svg = _svg(figure, salt=f"figure {self._count}", transparent=True).removeprefix("<svg")
        svg = re.sub(r'<g id="[^"]*"', "<g", re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2))
        svg = svg.replace(INK, "currentColor")
        for index, colour in enumerate(SERIES):
            svg = svg.replace(colour, f"var(--series-{index})")
        return svg, figure.get_size_inches()[0]

    @staticmethod
    def _element(svg: str, width: float, description: str) -> Markup:
        tag = Markup('<svg class="plot" style="width:{:.0f}px" role="img" aria-label="{}"')
        return tag.format(width * 96, description) + Markup(svg)


def _pixels(weights: torch.Tensor) -> str:
    """A map as a PNG in base64, a pixel for each weight, as matplotlib puts it into an SVG."""
    buffer = io.BytesIO()
    colours = WEIGHTS(_scale()(np.ma.masked_invalid(weights.numpy())), bytes=True)
    matplotlib.image.imsave(buffer, colours, format="png", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _heads(
    figures: _InlineFigures, result: RunResult, layer: str, maps: torch.Tensor
) -> list[tuple[str, Markup, torch.Tensor]]:
    captions = [layer if len(maps) == 1 else f"{layer}, head {head + 1}" for head in range(len(maps))]
    return [
        (caption, figures.map(one, result.attention_labels, f"Attention weights of {result.title}, {caption}"), one)
        for caption, one in zip(captions, maps, strict=True)
    ]


def _base64_weights(weights: torch.Tensor) -> str:
    """A map, row by row, as the script of the page reads it: float32, the lowest byte first."""
    return base64.b64encode(weights.numpy().astype("<f4").tobytes()).decode()


def _json_tokens(result: RunResult) -> str:
    """The tokens of a run's maps, whole and with blanks that can be seen."""
    return json.dumps([_printable(label) for label in result.attention_labels], ensure_ascii=False)


def _data_uri(figure: Figure) -> str:
    svg = _svg(figure, salt="circuit", facecolor="white", bbox_inches="tight")
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
