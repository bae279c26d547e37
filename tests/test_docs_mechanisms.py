"""The pages of the mechanisms: one for each, with its sections, all its options, and its formula in code."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from pennylane_qattn import ATTENTION, VALUES

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "mechanisms"
SECTIONS = ("what", "when", "options", "what happens", "theory", "source")


def page_of(name: str) -> Path:
    """The published forms share a page."""
    return FOLDER / ("published.md" if ATTENTION[name].is_published else f"{name}.md")


def sections(text: str) -> dict[str, str]:
    """The text under each heading of the second level."""
    _, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(section: str) -> list[list[str]]:
    """The cells of the table in a section, its head first and its rule left out."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not set(line) <= set("|-")]


def options(text: str, name: str) -> dict[str, object]:
    """The options in a page's table, with the defaults of that mechanism."""
    head, *table = rows(sections(text)["Options"])
    column = head.index(f"`{name}`") if f"`{name}`" in head else head.index("default")
    return {row[0].strip("`"): ast.literal_eval(row[column].strip("`")) for row in table}


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_every_mechanism_has_a_page_with_its_sections(name):
    found = [heading.lower() for heading in sections(page_of(name).read_text(encoding="utf-8"))]
    assert len(found) == len(SECTIONS)
    assert all(heading.startswith(section) for heading, section in zip(found, SECTIONS, strict=True)), found


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_the_options_are_those_of_the_mechanism(name):
    fields = {field.name: field.default for field in dataclasses.fields(ATTENTION[name])}
    assert options(page_of(name).read_text(encoding="utf-8"), name) == fields


def test_a_wrong_default_and_a_missing_option_are_found():
    text = "## Options\n\n| option | default | what |\n|---|---|---|\n| `seed` | `1` | draws |\n\n## Source\n"
    assert options(text, "qisa") == {"seed": 1}
    several = text.replace("| default |", "| `qisa` | `qsann` |").replace("| `1` |", '| `1` | `"a"` |')
    assert options(several, "qsann") == {"seed": "a"}


@pytest.mark.parametrize("page", sorted({page_of(name).name for name in ATTENTION}))
def test_the_formula_is_written_out_and_compared(page):
    """The code itself is run by test_docs."""
    happens = sections((FOLDER / page).read_text(encoding="utf-8"))["What happens"]
    assert re.search(r"^\$\$$", happens, re.MULTILINE)
    assert re.search(r"assert_close\(y, ", happens)


def test_the_overview_links_every_page_and_lists_every_value_map():
    text = (FOLDER / "index.md").read_text(encoding="utf-8")
    pages = {page_of(name).name for name in ATTENTION}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", text))
    assert {path.name for path in FOLDER.glob("*.md")} == pages | {"index.md"}
    assert [row[0].strip("`") for row in rows(sections(text)["Values"])[1:]] == list(VALUES)
