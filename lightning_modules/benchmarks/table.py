"""A result as a table: in the terminal, and in Markdown."""

import re

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_modules.benchmarks.result import Result

#: Width of lines where the output is no terminal; tables are as wide as they are.
WIDTH = 120


def print_result(result: Result) -> None:
    """Prints the machine, the table and its notes."""
    console = Console(highlight=False)
    width = None
    if not console.is_terminal:
        width, console.width = WIDTH, 1000
    console.print(f"[bold]{escape(result.title)}[/]")
    console.print(escape(result.setting))
    console.print(escape(in_words(result)), width=width)
    headings, rows = result.table()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(
            escape(heading), justify="left" if heading in result.text_columns else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for note in result.notes:
        console.print(escape(note), width=width)
    console.print()


def in_words(result: Result) -> str:
    """The machine in a line."""
    return "; ".join(f"{what} {value}" for what, value in result.machine.items())


def markdown_table(result: Result) -> list[str]:
    """The lines of the table."""
    headings, rows = result.table()
    rules = ["---" if heading in result.text_columns else "---:" for heading in headings]
    lines = [[markdown(cell) for cell in row] for row in (headings, *rows)]
    lines.insert(1, rules)
    return [f"| {' | '.join(line)} |" for line in lines]


def markdown(text: str) -> str:
    """Text as Markdown that shows it as it is, in one line."""
    return re.sub(r"([\\`*<\[\]|])", r"\\\1", " ".join(text.split()))
