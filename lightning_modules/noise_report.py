r"""What the evaluations of a sweep over shots and noise say: means with error bars, the bias of shots, a picture.

Cross-entropy is not linear in the expectation values that a model measures. With N shots an expectation value has the
variance :math:`(1-\langle P\rangle^2)/N` about the exact one, so by Taylor expansion the mean of a smooth function of
it is off by :math:`\tfrac{1}{2} f''(\langle P\rangle)\,(1-\langle P\rangle^2)/N + O(N^{-2})`: a bias that vanishes as
1/N, while the standard deviation falls as :math:`1/\sqrt N` only.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightning_modules.labels import with_label
from lightning_modules.report import FONT, INK, SERIES, _axes, _plain, _png

#: Kinds of noise, named as in `pennylane_qattn.Noise`.
NOISES = ("depolarizing", "amplitude_damping", "readout")
LABELS = {"depolarizing": "depolarizing", "amplitude_damping": "amplitude damping", "readout": "readout"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluation.

    Attributes:
        kind: `"exact"`, `"shots"`, or a kind of noise.
        strength: of the noise.
        shots: of every measurement setting; `None`: exact expectation values.
        repetition: counted from 1; `None` where nothing is random.
        seed: of the shots.
        cross_entropy: nats per token.
        change: cross-entropy minus the exact one.
        change_error: standard error of the change over windows.
        word_error: root mean square error of the expectation values in the first layer.
        word_error_expected: what it should be, from the exact values: of `sqrt((1 - <P>^2) / shots)`.
        words_inside: share of them within two such standard errors of the exact value.
        executions: on the device.
        seconds: that it took.
    """

    kind: str = "exact"
    strength: float | None = None
    shots: int | None = None
    repetition: int | None = None
    seed: int | None = None
    cross_entropy: float
    change: float
    change_error: float | None = None
    word_error: float | None = None
    word_error_expected: float | None = None
    words_inside: float | None = None
    executions: int = 0
    seconds: float = 0.0

    def condition(self, cls: type) -> Any:
        """The fields that a class has in common with this one, as an object of it."""
        return cls(**{field.name: getattr(self, field.name) for field in fields(cls)})

    def to_csv(self) -> dict[str, Any]:
        """Its values as they stand in a file."""
        return {name: "" if value is None else value for name, value in asdict(self).items()}

    @classmethod
    def from_csv(cls, text: dict[str, str]) -> Self:
        """The inverse of `to_csv`, of strings."""
        whole = ("shots", "repetition", "seed", "executions")
        values: dict[str, Any] = {
            name: int(v) if name in whole else float(v) for name, v in text.items() if v and name != "kind"
        }
        return cls(kind=text["kind"], **values)


# --- statistics -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The evaluations under one condition.

    Attributes:
        kind, strength, shots: the condition.
        repetitions: how many; 1 where nothing is random.
        mean: mean cross-entropy.
        bias: the mean minus the exact cross-entropy.
        error: of both: standard error over repetitions; without shots, of the bias over windows.
        word_error, word_error_expected, words_inside: as of `Row`, over all repetitions.
        executions, seconds: of all repetitions.
    """

    kind: str
    strength: float | None
    shots: int | None
    repetitions: int
    mean: float
    bias: float
    error: float
    word_error: float | None
    word_error_expected: float | None
    words_inside: float | None
    executions: int
    seconds: float

    @classmethod
    def of(cls, exact: float, rows: Sequence[Row]) -> Self:
        """From the rows of one condition."""
        first = rows[0]
        if first.shots is None:
            mean, error = first.cross_entropy, first.change_error
        else:
            mean, error = mean_and_error([row.cross_entropy for row in rows])
        words = first.word_error is not None
        return cls(
            first.kind,
            first.strength,
            first.shots,
            len(rows),
            mean,
            mean - exact,
            error,
            math.sqrt(sum(row.word_error**2 for row in rows) / len(rows)) if words else None,
            first.word_error_expected,
            sum(row.words_inside for row in rows) / len(rows) if words else None,
            sum(row.executions for row in rows),
            sum(row.seconds for row in rows),
        )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values, and its standard error `s / sqrt(n)`."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Fit:
    r"""Weighted least squares of the bias on powers of 1/shots: :math:`b(N) = b_\infty + s/N \;(+\; c/N^2)`.

    Attributes:
        intercept, slope, curvature: :math:`b_\infty, s, c`; the last one 0 where it is not fitted.
        intercept_error, slope_error, curvature_error: their standard errors.
        chi_squared: sum of squared residuals, in standard errors.
        degrees: points minus coefficients.
    """

    intercept: float
    intercept_error: float
    slope: float
    slope_error: float
    curvature: float
    curvature_error: float
    chi_squared: float
    degrees: int

    def __call__(self, shots: np.ndarray) -> np.ndarray:
        """The fitted bias."""
        return self.intercept + self.slope / shots + self.curvature / shots**2


def fit_bias(points: Sequence[Point]) -> Fit | None:
    """The fit of bias against 1/shots, from two shot numbers on; with the next order from four on.

    A variance from a few repetitions is a poor weight. As the variance of a mean falls as 1/(shots * repetitions), one
    constant of proportionality is estimated from all points together. `None` where there are too few points, or the
    shots change nothing.
    """
    if len(points) < 2:
        return None
    shots, bias, error = (np.array([getattr(p, name) for p in points]) for name in ("shots", "bias", "error"))
    repetitions = np.array([point.repetitions for point in points])
    freedom = repetitions - 1
    variance = np.sum(freedom * error**2 * shots * repetitions) / np.sum(freedom)
    if not variance > 0:
        return None
    errors = np.sqrt(variance / (shots * repetitions))
    order = 2 if len(points) > 3 else 1
    unit = float(shots.min())  # powers of unit/shots are of the same size
    design = (unit / shots[:, None]) ** np.arange(order + 1) / errors[:, None]
    inverse = np.linalg.inv(design.T @ design)
    found = inverse @ design.T @ (bias / errors)
    residuals = design @ found - bias / errors
    scale = unit ** np.arange(3)
    values = np.pad(found, (0, 2 - order)) * scale
    deviations = np.pad(np.sqrt(np.diag(inverse)), (0, 2 - order)) * scale
    (a, b, c), (error_a, error_b, error_c) = values.tolist(), deviations.tolist()
    return Fit(a, error_a, b, error_b, c, error_c, float(residuals @ residuals), len(points) - order - 1)


@dataclass(frozen=True)
class Summary:
    """What a sweep found: the exact cross-entropy, a point for every condition, the fit of the bias, and the label of
    the model, as LEAKS."""

    exact: float
    points: list[Point]
    fit: Fit | None
    label: str = ""

    @classmethod
    def of(cls, exact: float, rows: Sequence[Row]) -> Self:
        """From the exact cross-entropy and the evaluations."""
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            groups.setdefault((row.kind, row.strength, row.shots), []).append(row)
        points = [Point.of(exact, group) for group in groups.values()]
        points.sort(key=lambda p: (("shots", *NOISES).index(p.kind), p.strength or 0, p.shots or 0))
        return cls(exact, points, fit_bias([point for point in points if point.kind == "shots"]))

    def of_kind(self, kind: str) -> list[Point]:
        """The points of one kind, the weakest noise or the fewest shots first."""
        return [point for point in self.points if point.kind == kind]

    def to_plain(self) -> dict[str, Any]:
        """Numbers for JSON."""
        fit = None if self.fit is None else asdict(self.fit)
        label = {"causality": self.label} if self.label else {}
        return _plain({"exact": self.exact, "points": [asdict(point) for point in self.points], "fit": fit, **label})


# --- tables -----------------------------------------------------------------------------------------------------


def print_summary(summary: Summary, console: Console) -> None:
    """Tables of shots and of noise, and the fit."""
    if points := summary.of_kind("shots"):
        table = _table(with_label("Finite shots", summary.label))
        names = ("shots", "nats/token", "bias", "error of <P>", "expected", "inside", "executions", "seconds")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for p in points:
            expected, inside = f"{p.word_error_expected:.5f}", f"{p.words_inside:.1%}"
            words = (f"{p.word_error:.5f}", expected, inside)
            table.add_row(f"{p.shots:,}", *_values(p), *words, f"{p.executions:,}", f"{p.seconds:.1f}")
        console.print(table)
        console.print(
            f"±: standard error over {points[0].repetitions} repetitions, of cross-entropy and bias. <P>: expectation "
            "values of the first layer; root mean square error, expected from (1 - <P>^2) / shots; inside: within two "
            "such errors of the exact value, which is some 95 % of a normal distribution."
        )
        for line in describe_fit(summary.fit):
            console.print(line)
    noisy = [point for kind in NOISES for point in summary.of_kind(kind)]
    if noisy:
        table = _table(with_label("Noise", summary.label))
        for name in ("noise", "strength", "nats/token", "change", "executions", "seconds"):
            table.add_column(name, justify="left" if name == "noise" else "right", no_wrap=True)
        for p in noisy:
            cells = (f"{p.strength:g}", *_values(p), f"{p.executions:,}", f"{p.seconds:.1f}")
            table.add_row(LABELS[p.kind], *cells)
        console.print(table)
        console.print(_about_noise(noisy))


def _table(title: str) -> Table:
    style: dict[str, Any] = dict(title_justify="left", title_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    return Table(box=SIMPLE_HEAD, title=title, **style)


def describe_fit(fit: Fit | None) -> list[str]:
    """The fit in words."""
    if fit is None:
        return ["bias: no fit, which takes two shot numbers and shots that matter"]
    names = ("intercept", "slope", *(["curvature"] if fit.curvature_error else []))
    terms = [f"{name} {_with_error(getattr(fit, name), getattr(fit, f'{name}_error'))}" for name in names]
    away = abs(fit.intercept) / fit.intercept_error
    return [
        f"bias against 1/shots, weighted fit: {', '.join(terms)}; chi squared {fit.chi_squared:.1f} of {fit.degrees}",
        f"so with ever more shots the bias goes to the intercept, {away:.1f} standard errors from 0",
    ]


def _values(point: Point) -> tuple[str, str]:
    error = f" ± {point.error:.5f}" if math.isfinite(point.error) else ""
    return f"{point.mean:.5f}", f"{point.bias:+.5f}{error}"


def _with_error(value: float, error: float) -> str:
    """With two digits of the error."""
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _about_noise(points: Sequence[Point]) -> str:
    if points[0].shots is None:
        return (
            "Exact values of noisy circuits, so nothing is random but the windows: ± is the standard error over them."
        )
    return f"{points[0].shots:,} shots; ± is the standard error over {points[0].repetitions} repetitions."


# --- picture ----------------------------------------------------------------------------------------------------

BARS = {"capsize": 3, "elinewidth": 1.2, "markersize": 5, "linewidth": 1.4}


def sweep_picture(summary: Summary) -> bytes:
    """`sweep_figure` as PNG."""
    return _png(sweep_figure(summary))


@matplotlib.rc_context(FONT)
def sweep_figure(summary: Summary) -> Figure:
    """Cross-entropy, its bias and the error of expectation values against shots, and cross-entropy against noise.

    What was not swept is left out.
    """
    shots = summary.of_kind("shots")
    noisy = any(summary.of_kind(kind) for kind in NOISES)
    panels = [_draw_shots, _draw_bias, _draw_words] if shots else []
    panels += [_draw_noise] if noisy else []
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.7 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    for number, draw in enumerate(panels, 1):
        draw(figure, (rows, columns, number), summary)
    if summary.label:
        figure.suptitle(summary.label, color=INK)
    return figure


def _draw_shots(figure: Figure, place: tuple[int, int, int], summary: Summary) -> None:
    points = summary.of_kind("shots")
    axes = _axes(figure, "shots of every measurement setting", "cross-entropy (nats per token)", place)
    axes.axhline(summary.exact, color=INK, linewidth=1.2, linestyle="--", label=f"exact, {summary.exact:.4f}")
    bars = f"mean of {points[0].repetitions} repetitions ± standard error"
    _bars(axes, points, [p.shots for p in points], [p.mean for p in points], SERIES[0], bars)
    _shots_axis(axes, points)
    _finish(axes, "Finite shots")


def _draw_bias(figure: Figure, place: tuple[int, int, int], summary: Summary) -> None:
    points, fit = summary.of_kind("shots"), summary.fit
    axes = _axes(figure, "1 / shots (square-root scale)", "bias: mean minus exact (nats per token)", place)
    axes.axhline(0, color=INK, linewidth=1.2, linestyle="--")
    most = 1 / points[0].shots
    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
    if fit is not None:
        x = most * np.linspace(1e-3, 1.05, 200) ** 2
        what = "in 1/shots and 1/shots²" if fit.curvature_error else "in 1/shots"
        axes.plot(x, fit(1 / x), color=SERIES[0], alpha=0.45, linewidth=1.6, label=f"weighted fit {what}")
        end = f"its end at 0: {_with_error(fit.intercept, fit.intercept_error)}"
        axes.errorbar([0], [fit.intercept], [fit.intercept_error], fmt="D", color=SERIES[1], label=end, **BARS)
    bars = f"{points[0].repetitions} repetitions ± standard error"
    _bars(axes, points, [1 / p.shots for p in points], [p.bias for p in points], SERIES[0], bars)
    ticks = {0.0: "0"} | {1 / p.shots: f"1/{_short(p.shots)}" for p in points}
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-most * 0.03**2, most * 1.15)
    _finish(axes, "The bias of finite shots vanishes" if _vanishes(fit) else "The bias of finite shots")


def _vanishes(fit: Fit | None) -> bool:
    return fit is not None and abs(fit.intercept) <= 2 * fit.intercept_error


def _draw_words(figure: Figure, place: tuple[int, int, int], summary: Summary) -> None:
    points = summary.of_kind("shots")
    axes = _axes(figure, "shots of every measurement setting", "root mean square error of ⟨P⟩", place)
    expected = [p.word_error_expected for p in points]
    inside = sum(p.words_inside for p in points) / len(points)
    found = f"found; {inside:.1%} of them within two such errors"
    axes.plot(
        [p.shots for p in points], expected, color=INK, linestyle="--", linewidth=1.2, label="√((1 − ⟨P⟩²) / shots)"
    )
    axes.plot(
        [p.shots for p in points], [p.word_error for p in points], "o", color=SERIES[0], markersize=6, label=found
    )
    _shots_axis(axes, points)
    if min(expected) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    _finish(axes, "Expectation values of the first layer")


def _draw_noise(figure: Figure, place: tuple[int, int, int], summary: Summary) -> None:
    axes = _axes(figure, "strength of the noise (probability)", "cross-entropy (nats per token)", place)
    axes.axhline(summary.exact, color=INK, linewidth=1.2, linestyle="--", label=f"exact, {summary.exact:.4f}")
    for colour, kind in enumerate(NOISES):
        if points := summary.of_kind(kind):
            strengths, means = [p.strength for p in points], [p.mean for p in points]
            axes.plot(strengths, means, color=SERIES[colour], alpha=0.45, linewidth=1.4)
            _bars(axes, points, strengths, means, SERIES[colour], LABELS[kind])
            shots, repetitions = points[0].shots, points[0].repetitions
    over = "windows, of the change" if shots is None else f"{repetitions} repetitions of {shots:,} shots"
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    _finish(axes, "Noise", f"bars: standard error over {over}")


def _bars(axes, points: Sequence[Point], x: list[float], y: list[float], colour: str, label: str) -> None:
    errors = [point.error if math.isfinite(point.error) else 0.0 for point in points]
    axes.errorbar(x, y, errors, fmt="o", color=colour, label=label, **BARS)


def _shots_axis(axes, points: Sequence[Point]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if len(points) < 8:
        axes.set_xticks([p.shots for p in points], [_short(p.shots) for p in points])


def _short(shots: int) -> str:
    return f"{shots:,}" if shots < 100_000 else f"{shots:.0e}".replace("e+0", "e")


def _finish(axes, title: str, remark: str | None = None) -> None:
    axes.set_title(title, color=INK, fontsize=10.5, loc="left", pad=8)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8.5, title=remark, title_fontsize=8.5, alignment="left")
