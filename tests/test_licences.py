"""The licences of what is installed: the page that lists them, and what is refused."""

import runpy
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LICENCES = runpy.run_path(str(ROOT / "scripts" / "licences.py"))


def metadata(**fields: str | list[str]) -> Message:
    found = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            found[name.replace("_", "-")] = value
    return found


@pytest.fixture(scope="module")
def rows():
    for module in ("numba", "sklearn", "transformers"):
        pytest.importorskip(module, reason=f"{module} is of an extra that the page lists")
    return LICENCES["table"]()


def test_the_page_lists_what_is_installed(rows):
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    assert text == LICENCES["page"](rows), "python scripts/licences.py > docs/licences.md writes it anew"
    listed = {name: by for name, _, by in rows}
    assert listed["torch"] == "the package" and listed["numba"] == "`fast`" and listed["joblib"] == "`index`"


def test_every_licence_is_accepted(rows):
    LICENCES["check"](rows)


@pytest.mark.parametrize("found", ["GPL-3.0-only", "unknown", "MIT AND AGPL-3.0-only", "GNU General Public License"])
def test_a_licence_is_refused_in_one_line(found):
    with pytest.raises(LICENCES["LicenceError"], match=f"^alien, which `hf` needs, has licence '{found}'; [^\n]+$"):
        LICENCES["check"]([("good", "MIT", "the package"), ("alien", found, "`hf`")])


@pytest.mark.parametrize("found", ["MIT", "GPL-2.0-only OR MIT", "MIT AND (GPL-2.0-only OR BSD-3-Clause)"])
def test_one_of_a_choice_is_enough(found):
    assert LICENCES["is_accepted"](found)


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"License_Expression": "MIT", "License": "GPL"}, "MIT"),
        ({"License": "Apache 2.0"}, "Apache-2.0"),
        (
            {"License": "Copyright (c) ...", "Classifier": ["License :: OSI Approved :: BSD License"]},
            "BSD",
        ),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "License :: X :: Theirs"]}, "MIT AND Theirs"),
        ({"Classifier": ["Topic :: Physics"]}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_what_metadata_say(fields, found):
    assert LICENCES["licence"](metadata(**fields)) == found
