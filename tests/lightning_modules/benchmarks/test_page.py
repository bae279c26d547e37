"""The page: made of the files alone, with every number of theirs and none of its own."""

import dataclasses
import re
from pathlib import Path

import pytest

from lightning_modules.benchmarks.command import main
from lightning_modules.benchmarks.page import read, text_of


def words(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,.]*\d|\d", text))


@pytest.fixture
def written(result, tmp_path):
    """Two results in a folder: `sample`, and `grover-x`, which comes first."""
    folder = tmp_path / "results"
    result.write(folder)
    dataclasses.replace(result, name="grover-x", title="Grover").write(folder)
    return folder


def test_a_page_from_files(written, tmp_path, capsys):
    page = tmp_path / "docs" / "benchmark.md"
    assert main(["page", "--results", str(written), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"written: {page}\n"
    text = page.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Machine",
        "## Grover",
        "## Time over nothing",
    ]
    assert "| processor | an \\*abacus\\* |" in text and text.count("abacus") == 1
    assert "```bash\npython x\n```" in text
    assert "| mechanism | parameters | time | target | memory |\n| --- | ---: | ---: | --- | ---: |\n" in text
    assert "| a | 12,345 | 1.25 (1.00 to 1.75) | at most 1.5: reached | 0.50 |" in text
    assert "| b\\|c | 7 | 3.00 (2.00 to 250) | at most 1.5: not reached; at least 2.5: reached | – |" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / target).is_file(), target
    assert {path.name for path in (page.parent / "benchmark").iterdir()} == {
        f"{name}.{end}" for name in ("sample", "grover-x") for end in ("json", "png")
    }


def test_no_number_comes_from_elsewhere(result):
    """What the page has beyond a page without results stands in the texts of the results."""
    headings, rows = result.table()
    machine = " ".join(map(str, result.machine.values()))
    told = words(" ".join([machine, *result.notes, result.setting, *headings, *sum(rows, [])]))
    assert words(text_of([result], "x")) <= told


def test_each_has_its_machine_where_they_differ(result):
    other = dataclasses.replace(result, name="other", machine={"processor": "an adding machine"})
    text = text_of([result, other], "x")
    assert "## Machine" not in text
    assert "an \\*abacus\\*" in text and "an adding machine" in text


def test_results_of_one_title_are_told_apart_by_their_setting(result):
    first = dataclasses.replace(result, title="Time", setting="2 layers, 16 tokens, float32")
    second = dataclasses.replace(first, name="second", setting="2 layers, 4,096 tokens, batch 1, float32")
    on_another = dataclasses.replace(second, name="third", machine={"device": "GPU"})
    headings = [line for line in text_of([first, second, on_another], "x").splitlines() if line[:3] == "## "]
    assert headings == ["## Time", "## Time: 4,096 tokens, batch 1", "## Time, on GPU"]


def test_the_page_of_the_documentation_is_made_of_the_results_beside_it(tmp_path):
    page = Path(__file__).parents[3] / "docs" / "benchmark.md"
    again = tmp_path / page.name
    assert main(["page", "--results", str(page.with_suffix("")), "--output", str(again)]) == 0
    text = page.read_text(encoding="utf-8")
    assert again.read_text(encoding="utf-8") == text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings) == len(read(page.with_suffix("")))


def test_the_page_can_be_made_again_from_what_lies_beside_it(written, tmp_path):
    first, second = tmp_path / "a" / "benchmark.md", tmp_path / "b" / "benchmark.md"
    main(["page", "--results", str(written), "--output", str(first)])
    main(["page", "--results", str(first.with_suffix("")), "--output", str(second)])
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_a_page(written, tmp_path, capsys):
    assert main(["page", "--results", str(tmp_path / "nothing")]) == 2
    assert "there are no results in" in capsys.readouterr().err
    assert main(["page", "--results", str(written), "--output", str(tmp_path / "page.html")]) == 2
    assert "its name ends in .md; got" in capsys.readouterr().err
    (written / "other.json").write_text("{}")
    page = tmp_path / "page.md"
    assert main(["page", "--results", str(written), "--output", str(page)]) == 2
    assert "other.json': not the result of a benchmark" in capsys.readouterr().err
    assert not page.exists()
