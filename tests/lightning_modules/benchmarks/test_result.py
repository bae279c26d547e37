"""Results as text, as plain data and as files."""

import json

import pytest

from lightning_modules.benchmarks.figures import bars, picture
from lightning_modules.benchmarks.result import Column, Result, Target, cell_text


@pytest.mark.parametrize(
    "cell, text",
    [
        (None, "–"),
        ("raises ValueError", "raises ValueError"),
        (12345, "12,345"),
        (1.236, "1.24"),
        (-0.5, "−0.50"),
        (99.996, "100.00"),
        (1234.5, "1,234"),
        ([3.0, 1.0, 2.0], "2.00 (1.00 to 3.00)"),
        ([4.0], "4.00"),
        ([90.0, 1500.0, 120.4], "120 (90.00 to 1,500)"),
    ],
)
def test_cells(cell, text):
    assert cell_text(cell) == text


def test_targets_are_told_by_the_median(result):
    headings, rows = result.table()
    assert headings == ["mechanism", "parameters", "time", "target", "memory"]
    assert rows == [
        ["a", "12,345", "1.25 (1.00 to 1.75)", "at most 1.5: reached", "0.50"],
        ["b|c", "7", "3.00 (2.00 to 250)", "at most 1.5: not reached; at least 2.5: reached", "–"],
    ]
    assert result.text_columns == {"mechanism", "target"}
    assert Column("time", "time", targets=(Target(2),)).target_text({"time": None}, "a") == "at most 2: not measured"
    assert Column("time", "time", targets=(Target(2, rows=("b",)),)).target_text({"time": 1.0}, "a") == "–"


def test_what_is_written_is_read_back(result, tmp_path):
    path = result.write(tmp_path)
    assert path == tmp_path / "sample.json"
    assert Result.read(path) == result
    assert json.loads(path.read_text())["rows"][0]["time"] == [1.25, 1.0, 1.75]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("rows"),
        lambda data: data.update(surplus=1),
        lambda data: data.update(picture="cake"),
        lambda data: data["rows"][0].pop("mechanism") and data.update(labels=["mechanism"]),
        lambda data: data["rows"][0].update(time=[]),
        lambda data: data["columns"][0].update(width=3),
    ],
)
def test_other_data_are_refused(result, tmp_path, change):
    data = result.to_plain()
    data["rows"] = [dict(row) for row in data["rows"]]
    change(data)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"x\.json': not the result of a benchmark: .*; measure it again"):
        Result.read(path)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json'"):
        Result.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="not the result of a benchmark"):
        Result.read(tmp_path / "x.json")


def test_what_is_not_finite_is_not_written(result, tmp_path):
    result.rows[0]["memory"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        result.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bars_end_at_the_medians_and_lines_at_the_extremes(result):
    figure = bars(result)
    time, memory = figure.axes
    assert [bar.get_x() + bar.get_width() for bar in time.patches] == pytest.approx([1.25, 3.0])
    assert time.get_xscale() == "log" and memory.get_xscale() == "linear"  # 250 is far from 1
    segments = [line for collection in time.collections for line in collection.get_segments()]
    ends = sorted({(*line[:, 0],) for line in map(lambda line: line.round(6), segments)})
    assert ends == [(1.0, 1.75), (1.5, 1.5), (2.0, 250.0), (2.5, 2.5)]  # two spreads, and the bounds of the targets
    assert [label.get_text() for label in time.get_yticklabels()] == ["a", "b|c"]
    assert picture(result).startswith(b"\x89PNG")


def test_nothing_to_draw_is_no_picture(result):
    for row in result.rows:
        row["time"] = row["memory"] = None
    assert picture(result) is None
