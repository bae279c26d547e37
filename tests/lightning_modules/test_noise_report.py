"""The statistics of a noise sweep against exact sums, NumPy's polynomials and a bias known by Taylor expansion."""

import math

import numpy as np
import pytest

from lightning_modules.noise_report import (
    Point,
    Row,
    Summary,
    describe_fit,
    fit_bias,
    mean_and_error,
    sweep_figure,
    sweep_picture,
)

SHOTS = (101, 307, 1009, 3001, 10007)
K, P = 1.7, 0.3  # cross-entropy log(1 + exp(-K v)) of a softmax over (K v, 0), where v has the exact value P


def cross_entropy(v):
    return np.log1p(np.exp(-K * v))


def row(shots, repetition, value, exact):
    words = dict(word_error=0.1, word_error_expected=0.1, words_inside=0.9)
    how = dict(kind="shots", shots=shots, repetition=repetition, seed=repetition)
    return Row(**how, cross_entropy=value, change=value - exact, executions=3, seconds=0.5, **words)


def point(shots, bias, error, repetitions=5):
    return Point("shots", None, shots, repetitions, 2 + bias, bias, error, None, None, None, 1, 1.0)


def sampled(rng, shots, repetitions):
    """Cross-entropies with v measured: the share of binomial draws that are +1, minus those that are -1."""
    plus = rng.binomial(shots, (1 + P) / 2, size=repetitions)
    return cross_entropy(2 * plus / shots - 1)


def exact_bias(shots):
    """The bias as the sum over all outcomes of the binomial distribution."""
    plus, q = np.arange(shots + 1), (1 + P) / 2
    logs = np.array([math.lgamma(shots + 1) - math.lgamma(k + 1) - math.lgamma(shots - k + 1) for k in plus])
    odds = np.exp(logs + plus * math.log(q) + (shots - plus) * math.log(1 - q))
    return odds @ cross_entropy(2 * plus / shots - 1) - cross_entropy(P)


def test_mean_and_standard_error():
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3 and error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))


def test_the_fit_is_that_of_numpy():
    rng = np.random.default_rng(5)
    bias, repetitions = rng.normal(size=5), 7
    # errors that all follow from one variance, so that weights are known beforehand
    errors = 0.3 / np.sqrt(np.array(SHOTS) * repetitions)
    fit = fit_bias([point(n, b, e, repetitions) for n, b, e in zip(SHOTS, bias, errors, strict=True)])
    x = 1 / np.array(SHOTS)
    coefficients, covariance = np.polyfit(x, bias, 2, w=1 / errors, cov="unscaled")
    np.testing.assert_allclose((fit.curvature, fit.slope, fit.intercept), coefficients, rtol=1e-6)
    found = (fit.curvature_error, fit.slope_error, fit.intercept_error)
    np.testing.assert_allclose(found, np.sqrt(np.diag(covariance)), rtol=1e-6)
    residuals = (np.polyval(coefficients, x) - bias) / errors
    assert fit.degrees == 2 and fit.chi_squared == pytest.approx(residuals @ residuals)
    np.testing.assert_allclose(fit(np.array(SHOTS)), np.polyval(coefficients, x))


def test_a_straight_line_below_four_points():
    fit = fit_bias([point(n, 0.25 + 3 / n - 7 / n**2, 1 / math.sqrt(n)) for n in SHOTS[:4]])
    assert fit.curvature == pytest.approx(-7, rel=1e-4) and fit.degrees == 1 and "curvature" in describe_fit(fit)[0]
    fit = fit_bias([point(n, 0.25 + 3 / n, 1 / math.sqrt(n)) for n in SHOTS[:3]])
    assert fit.intercept == pytest.approx(0.25) and fit.slope == pytest.approx(3) and fit.degrees == 1
    assert fit.curvature == fit.curvature_error == 0 and "curvature" not in describe_fit(fit)[0]
    assert fit_bias([point(7, 1.0, 1.0)]) is None
    assert fit_bias([point(7, 0.0, 0.0), point(11, 0.0, 0.0)]) is None
    assert "no fit" in describe_fit(None)[0]


def test_errors_of_unequal_repetitions_are_pooled():
    """Variances of 4/N and 1/N, from 2 and 4 degrees of freedom, make 2/N."""
    fit = fit_bias([point(101, 1.0, math.sqrt(4 / 101 / 3), 3), point(307, 0.5, math.sqrt(1 / 307 / 5), 5)])
    x = 1 / np.array([101, 307])
    errors = np.sqrt(2 * x / (3, 5))
    _, covariance = np.polyfit(x, [1.0, 0.5], 1, w=1 / errors, cov="unscaled")
    np.testing.assert_allclose((fit.slope_error, fit.intercept_error), np.sqrt(np.diag(covariance)))


def test_the_bias_of_a_softmax_is_that_of_its_taylor_expansion():
    """Its slope is f''(P) (1 - P^2) / 2, by hand; 300 sweeps of five repetitions find it, and no bias at the end."""
    right = 1 / (1 + math.exp(-K * P))
    slope = K**2 * right * (1 - right) * (1 - P**2) / 2
    assert exact_bias(SHOTS[2]) * SHOTS[2] == pytest.approx(slope, rel=1e-2)
    exact, rng = float(cross_entropy(P)), np.random.default_rng(7)
    fits = []
    for _ in range(300):
        values = {n: sampled(rng, n, 5) for n in SHOTS}
        rows = [row(n, r, float(v), exact) for n in SHOTS for r, v in enumerate(values[n], 1)]
        fits.append(Summary.of(exact, rows).fit)
    slopes = np.array([fit.slope for fit in fits])
    assert abs(slopes.mean() - slope) < 4 * slopes.std() / math.sqrt(300)
    for name, true in (("intercept", 0), ("slope", slope)):
        pulls = np.array([(getattr(fit, name) - true) / getattr(fit, f"{name}_error") for fit in fits])
        assert abs(pulls.mean()) < 4 / math.sqrt(300) and 0.85 < pulls.std() < 1.2
    assert 0.85 < np.mean([fit.chi_squared for fit in fits]) / 2 < 1.25  # two degrees of freedom, estimated variance


def test_the_mean_of_many_repetitions_has_the_exact_bias():
    rng = np.random.default_rng(3)
    mean, error = mean_and_error(sampled(rng, 101, 40_000))
    bias = mean - cross_entropy(P)
    assert bias > 5 * error and abs(bias - exact_bias(101)) < 4 * error


def test_points_of_a_summary():
    rows = [row(307, 1, 2.25, 2.0), row(101, 1, 2.5, 2.0), row(101, 2, 2.75, 2.0), row(307, 2, 2.0, 2.0)]
    noise = Row(kind="readout", strength=0.1, cross_entropy=2.5, change=0.5, change_error=0.25, executions=7, seconds=2)
    summary = Summary.of(2.0, [noise, *rows])
    assert [(p.kind, p.shots) for p in summary.points] == [("shots", 101), ("shots", 307), ("readout", None)]
    first, _, last = summary.points
    assert (first.mean, first.bias, first.repetitions, first.executions) == (2.625, 0.625, 2, 6)
    assert first.error == pytest.approx(0.125) and (last.bias, last.error) == (0.5, 0.25)


def test_rows_through_csv():
    values = [row(101, 2, 2.0 + 1 / 3, 2.0), Row(kind="readout", strength=0.1, cross_entropy=2.5, change=-0.0)]
    for value in values:
        text = {name: str(v) for name, v in value.to_csv().items()}
        assert Row.from_csv(text) == value


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_what_the_picture_shows():
    rng = np.random.default_rng(1)
    rows = [row(n, r, float(v), 0.5) for n in SHOTS for r, v in enumerate(sampled(rng, n, 3))]
    noise = [
        Row(kind=kind, strength=p, cross_entropy=0.5 + p, change=p, change_error=p / 3)
        for kind in ("readout", "depolarizing")
        for p in (0.1, 0.01)
    ]
    summary = Summary.of(float(cross_entropy(P)), rows + noise)
    found = panels(sweep_figure(summary))
    assert len(found) == 4 and all(
        axes.get_xlabel() and "(nats" in axes.get_ylabel() + "(nats" for axes in found.values()
    )
    points = summary.of_kind("shots")
    (bars,) = found["Finite shots"].containers
    np.testing.assert_allclose(bars[0].get_xydata(), [(p.shots, p.mean) for p in points])
    _, bias = found["The bias of finite shots vanishes"].containers
    np.testing.assert_allclose(bias[0].get_xydata(), [(1 / p.shots, p.bias) for p in points])
    ends = [segment[:, 1] for segment in bias[2][0].get_segments()]
    np.testing.assert_allclose(ends, [(p.bias - p.error, p.bias + p.error) for p in points])
    legend = [text.get_text() for text in found["Noise"].get_legend().get_texts()]
    assert legend == [f"exact, {summary.exact:.4f}", "depolarizing", "readout"]
    assert sweep_picture(summary).startswith(b"\x89PNG")


def test_a_picture_of_a_part():
    noise = [Row(kind="readout", strength=0.1, cross_entropy=2.5, change=0.5, change_error=math.nan)]
    assert list(panels(sweep_figure(Summary.of(2.0, noise)))) == ["Noise"]
    rows = [row(101, r, 2.0 + r, 2.0) for r in (1, 2)]
    assert len(sweep_figure(Summary.of(2.0, rows)).axes) == 3


def test_a_bias_that_stays_is_not_said_to_vanish():
    summary = Summary(2.0, points := [point(n, 0.5 + 3 / n, 0.1 / math.sqrt(n)) for n in SHOTS], fit_bias(points))
    words = dict(word_error=0.1, word_error_expected=0.1, words_inside=0.9)
    summary = Summary(2.0, [Point(**{**vars(p), **words}) for p in points], summary.fit)
    assert "The bias of finite shots" in panels(sweep_figure(summary))
