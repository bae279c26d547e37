"""The rows of a comparison on disk: one file per run, times, the joint table, and `qattn merge` for parts of one."""

import csv
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_modules.cli import COMMANDS, Parser
from lightning_modules.comparison_report import print_summary, write_comparison
from lightning_modules.files import atomic_write, locked
from lightning_modules.progress import following

ROW, TUNING, TIMES, DESCRIPTION = "row.json", "tuning.json", "timing.json", "comparison.json"


def read_json(path: Path) -> Any:
    """The content of a file; `None` if there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); remove it") from None


def write_json(path: Path, content: Any) -> None:
    """Writes plain data, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def read_history(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, numbers only."""
    rows = complete_rows(Path(folder) / "metrics.csv")
    return [{k: float(v) for k, v in row.items() if v and _is_number(v)} for row in rows]


def complete_rows(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no file; the row that a run is just writing is left out."""
    if not table.is_file():
        return []  # of a run that logged nothing
    try:
        text = table.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{str(table)!r} is damaged; remove it") from None
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def training_speed(history: Sequence[dict[str, float]]) -> float:
    """Characters a second in training: the median of a run's rows, NaN if none says."""
    speeds = [row["train_characters_per_second"] for row in history if "train_characters_per_second" in row]
    return statistics.median(speeds) if speeds else math.nan


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_description(folder: Path, title: str, notes: Sequence[str], runs: Sequence[str]) -> None:
    """Writes what a comparison is called and which runs it has, as paths of their folders, in order."""
    write_json(folder / DESCRIPTION, {"title": title, "notes": list(notes), "runs": list(runs)})


def merge(argv: list[str]) -> None:
    """`qattn merge`: joins the parts of a comparison that `--shard` made."""
    options = _merge_parser().parse_args(argv)
    output = Path(options.output)
    parts = [Path(part) for part in options.parts]
    descriptions = {part: read_json(part / DESCRIPTION) for part in parts}
    for part, description in descriptions.items():
        if description is None:
            raise ValueError(f"{str(part)!r} holds no {DESCRIPTION}; give folders that qattn compare wrote")
        if description != descriptions[parts[0]]:
            raise ValueError(f"{str(part)!r} is a part of another comparison than {str(parts[0])!r}")
    title, notes, runs = (descriptions[parts[0]][name] for name in ("title", "notes", "runs"))
    found = {}
    for run in runs:
        rows = {part: row for part in (*parts, output) if (row := read_json(part / run / ROW)) is not None}
        if len({row["settings"] for row in rows.values()}) > 1:
            raise ValueError(f"{' and '.join(map(str, rows))} have rows of {run!r} with different settings")
        if rows:
            found[run] = next(iter(rows.values()))
    if not found:
        raise ValueError("there are no rows yet in these folders; let qattn compare finish a run first")
    with locked(output):
        write_description(output, title, notes, runs)
        for run, row in found.items():
            write_json(output / run / ROW, row)
        for part in parts:
            for path in (path for name in (TUNING, TIMES) for path in sorted(part.rglob(name)) if part != output):
                write_json(output / path.relative_to(part), read_json(path))
        found = list(found.values())
        timings = read_timings(output, found)
        print_summary(found, timings, Console(width=None if sys.stdout.isatty() else 100))
        with following("drawing the comparison"):
            path = write_comparison(output, found, timings, title, notes)
    print(f"{len(found)} of {len(runs)} runs: {path}")
    if _are_missing(timings, found):
        print(
            "times: not measured of all variants, as they take turns; qattn compare with the config of the parts, its "
            f"timing_rounds and --output {output} does, and trains nothing that is there"
        )


def _are_missing(timings: Mapping[tuple[str, str], Mapping[str, Any]], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a variant has not been timed."""
    return any(row["variant"] not in timings.get((row["corpus"], row["size"]), {}).get("training", {}) for row in rows)


def _merge_parser() -> Parser:
    parser = Parser(
        prog="qattn merge",
        description="Joins the parts of a comparison that were trained with --shard, and writes the report of all.",
        epilog=f"example: {COMMANDS['merge'].example}",
        allow_abbrev=False,
    )
    parser.add_argument("parts", nargs="+", metavar="PART", help="output folder of a shard")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the rows and the report go")
    return parser


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a comparison that are there, in its order."""
    description = read_json(folder / DESCRIPTION)
    if description is None:
        raise ValueError(f"{str(folder)!r} holds no {DESCRIPTION}; give a folder that qattn compare wrote")
    found = (read_json(folder / run / ROW) for run in description["runs"])
    return [row for row in found if row is not None]


def read_timings(folder: Path, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The times that were measured for these rows, by corpus and size."""
    places = {(row["corpus"], row["size"]): folder / row["cell"] / TIMES for row in rows}
    found = {key: read_json(path) for key, path in places.items()}
    return {key: times for key, times in found.items() if times is not None}
