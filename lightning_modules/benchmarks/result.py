"""What a benchmark found: rows of numbers with what is needed to read them, as plain data and as cells of a table.

A cell of a row is text, a number, `None` where there is nothing to tell, or a list of numbers, one per round, of which
tables show median, lowest and highest.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_modules.files import atomic_write
from lightning_modules.timing import describe_spread

NOTHING = "–"
#: How a result is drawn: bars of its ratios, or lines of times against sizes.
PICTURES = ("bars", "lines")

Cell = str | int | float | list[float] | None


class CheckFailed(RuntimeError):
    """Two timed things did not compute the same kind of result."""


@dataclass(frozen=True)
class Target:
    """A bound for the median of a column.

    Args:
        bound: the number.
        at_least: the median is to reach it; otherwise it is not to exceed it.
        rows: the labels of the rows that it is for; `None`: every row.
    """

    bound: float
    at_least: bool = False
    rows: tuple[str, ...] | None = None

    def is_for(self, label: str) -> bool:
        return self.rows is None or label in self.rows

    def is_reached(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        key: of its cells in the rows.
        heading: with the unit, if it has one.
        digits: decimals of numbers below 100.
        targets: bounds for its medians.
        drawn: it is in the picture, where 1 is what the others are compared with.
    """

    key: str
    heading: str
    digits: int = 2
    targets: tuple[Target, ...] = ()
    drawn: bool = False

    def text(self, row: Mapping[str, Cell]) -> str:
        """The cell of a row as text."""
        return cell_text(row.get(self.key), self.digits)

    def target_text(self, row: Mapping[str, Cell], label: str) -> str:
        """The targets of a row, and whether they are reached."""
        value = median(row.get(self.key))
        said = []
        for target in self.targets:
            if target.is_for(label):
                verdict = "not measured" if value is None else "reached" if target.is_reached(value) else "not reached"
                said.append(f"{target}: {verdict}")
        return "; ".join(said) or NOTHING


@dataclass(frozen=True)
class Result:
    """What one run of a benchmark found.

    Args:
        name: of its files.
        title: what was measured, in few words.
        setting: of what size, and the like, in a line.
        command: the line that measures it.
        machine: what it was measured on, by what each entry is.
        columns: of the table.
        rows: cells by the keys of the columns, and whatever else is kept.
        notes: what is needed to read the table, a paragraph each.
        labels: the keys that together name a row.
        picture: one of `PICTURES`.
    """

    name: str
    title: str
    setting: str
    command: str
    machine: Mapping[str, str | int]
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ("mechanism",)
    picture: str = "bars"

    def label(self, row: Mapping[str, Cell]) -> str:
        """What a row is called."""
        return ", ".join(str(row[key]) for key in self.labels if row[key])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows as text; a column with targets has another one behind it that tells of them."""
        headings: list[str] = []
        rows: list[list[str]] = [[] for _ in self.rows]
        for column in self.columns:
            headings.append(column.heading)
            for row, texts in zip(self.rows, rows, strict=True):
                texts.append(column.text(row))
            if column.targets:
                headings.append("target")
                for row, texts in zip(self.rows, rows, strict=True):
                    texts.append(column.target_text(row, self.label(row)))
        return headings, rows

    @property
    def text_columns(self) -> set[str]:
        """Headings of columns that hold text rather than numbers."""
        texts = {c.heading for c in self.columns if all(isinstance(row.get(c.key), str) for row in self.rows)}
        return texts | {"target"}

    def to_plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    @classmethod
    def from_plain(cls, data: Any) -> "Result":
        """The result that `to_plain` wrote.

        Raises:
            ValueError: if the data are none.
        """
        try:
            columns = tuple(
                Column(**{**column, "targets": tuple(_target(target) for target in column["targets"])})
                for column in data["columns"]
            )
            tuples = {key: tuple(data[key]) for key in ("rows", "notes", "labels")}
            found = cls(**{**data, **tuples, "columns": columns})
            if found.picture not in PICTURES:
                raise ValueError(f"picture {found.picture!r}")
            found.table()
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"not the result of a benchmark: {' '.join(str(error).split())}") from None
        return found

    def write(self, folder: Path) -> Path:
        """Writes `<name>.json` into the folder, whole or not at all, and returns its path."""
        path = folder / f"{self.name}.json"
        # whatever is not finite would not be JSON, and no measurement is
        text = json.dumps(self.to_plain(), indent=1, ensure_ascii=False, allow_nan=False)
        with atomic_write(path, "w") as file:
            file.write(f"{text}\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Result":
        """What `write` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            return cls.from_plain(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}; measure it again, or move the file away") from None


def _target(data: Mapping[str, Any]) -> Target:
    return Target(**{**data, "rows": None if data["rows"] is None else tuple(data["rows"])})


def median(cell: Cell) -> float | None:
    """The number that stands for a cell; `None` for text and for nothing."""
    if isinstance(cell, list):
        return statistics.median(cell)
    return None if isinstance(cell, str) else cell


def cell_text(cell: Cell, digits: int = 2) -> str:
    """A cell as text."""

    def number(value: float) -> str:
        whole = isinstance(value, int) or abs(value) >= 100
        return f"{value:,.{0 if whole else digits}f}".replace("-", "−")

    if cell is None or isinstance(cell, str):
        return NOTHING if cell is None else cell
    if isinstance(cell, list):
        return describe_spread(cell, number) if len(cell) > 1 else number(cell[0])
    return number(cell)
