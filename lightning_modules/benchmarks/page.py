"""A page of documentation made of results: machine, tables, targets and pictures, and no number from elsewhere."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_modules.benchmarks.figures import picture
from lightning_modules.benchmarks.result import Result
from lightning_modules.benchmarks.table import markdown, markdown_table
from lightning_modules.files import atomic_write

OPENING = """\
# Benchmarks

Measured by `scripts/benchmark.py`, each table by the line above it. The contestants take turns; a ratio compares times
of one round, and its median over the rounds stands before the lowest and the highest. Before anything is timed, a check
makes sure that what is compared computes the same kind of result. This page is made from the files that the program
wrote, which lie beside its pictures; they hold the ratios of every round.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py page`."""
    add = parser.add_argument
    add("--results", default="runs/benchmark", metavar="DIR", help="where the others wrote (default: %(default)s)")
    add("--output", default="docs/benchmark.md", metavar="F", help="the page (default: %(default)s)")


def write_page(options: argparse.Namespace, order: Sequence[str]) -> Path:
    """Writes the page, and beside it a folder of its name with pictures and results; returns the page's path.

    Args:
        options: `results` and `output`.
        order: benchmarks, in the order of the page.
    """
    folder, page = Path(options.results), Path(options.output)
    if page.suffix != ".md":
        raise ValueError(f"the page is Markdown, so its name ends in .md; got {options.output!r}")
    results = sorted(read(folder), key=lambda result: (_place(result, order), result.name))
    beside = page.with_suffix("")
    for result in results:
        result.write(beside)
        if (content := picture(result)) is not None:
            with atomic_write(beside / f"{result.name}.png") as file:
                file.write(content)
    with atomic_write(page, "w") as file:
        file.write(text_of(results, beside.name))
    return page


def read(folder: Path) -> list[Result]:
    """The results in a folder.

    Raises:
        ValueError: if there are none, or a file is something else.
    """
    results = [Result.read(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise ValueError(f"there are no results in {str(folder)!r}; measure something first, or name another --results")
    return results


def _place(result: Result, order: Sequence[str]) -> int:
    benchmark = result.name.partition("-")[0]
    return order.index(benchmark) if benchmark in order else len(order)


def text_of(results: Sequence[Result], beside: str) -> str:
    """The page; `beside` is the folder of the pictures."""
    machines = [dict(result.machine) for result in results]
    shared = machines[0] if all(machine == machines[0] for machine in machines) else None
    lines, settings = [OPENING], {}
    if shared:
        lines += ["## Machine", "", *_machine(shared), ""]
    for result in results:
        device = result.machine.get("device", "CPU")
        where = "" if device == "CPU" else f", on {device}"
        heading = _told_apart(result, settings.setdefault(result.title + where, result.setting)) + where
        lines += [f"## {markdown(heading)}", "", f"{markdown(result.setting)}", ""]
        lines += ["```bash", result.command, "```", ""]
        if not shared:
            lines += [*_machine(result.machine), ""]
        lines += [*markdown_table(result), ""]
        lines += [line for note in result.notes for line in (markdown(note), "")]
        if picture(result) is not None:
            lines += [f"![{markdown(heading)}]({beside}/{result.name}.png)", ""]
        lines += [f"All numbers: [{result.name}.json]({beside}/{result.name}.json)", ""]
    return "\n".join(lines).rstrip() + "\n"


def _told_apart(result: Result, first: str) -> str:
    """The title; with what is set otherwise than in the first result of that title, whose setting is `first`."""
    other = [part for part in result.setting.split(", ") if part not in first.split(", ")]
    return f"{result.title}: {', '.join(other)}" if other else result.title


def _machine(machine: Mapping[str, str | int]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        *(f"| {markdown(what)} | {markdown(str(value))} |" for what, value in machine.items()),
    ]
