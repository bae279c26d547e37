"""The documentation as a site: what it is made of, and, where it has been built, what came of it.

`bash scripts/test.sh --docs` builds it and names its folder in QATTN_SITE.
"""

import ast
import functools
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
SITE = os.environ.get("QATTN_SITE")
built = pytest.mark.skipif(not SITE, reason="the site is not built; bash scripts/test.sh --docs does")

#: Modules that hold nothing to be looked up; nor do those of scripts/benchmark.py.
NO_REFERENCE = {"lightning_modules.__main__"}


# --- what it is made of -----------------------------------------------------------------------------------------


def test_every_module_has_one_place_in_the_reference():
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. automodule:: ([\w.]+)$", text, re.MULTILINE)
    paths = [path for package in ("pennylane_qattn", "lightning_modules") for path in (ROOT / package).rglob("*.py")]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths if p.name != "__init__.py"}
    scripts = {module for module in modules if module.startswith("lightning_modules.benchmarks.")}
    assert sorted(documented) == sorted(modules - NO_REFERENCE - scripts)


def test_there_are_examples():
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_seeded_and_ends_in_a_picture(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert path.name.startswith("plot_")  # others are shown and not run
    title, rule, *_ = ast.get_docstring(tree).splitlines()
    assert len(title) == len(rule) and set(rule) == {"="}
    lines = text.splitlines()[tree.body[0].end_lineno :]
    assert 10 <= len([line for line in lines if line.strip() and not line.lstrip().startswith("#")]) <= 40
    assert "# %%" in text and "manual_seed(0)" in text
    assert lines[-1] == "plt.show()"
    assert "shakespeare" not in text  # which may be downloaded


def test_formulas_become_mathml(monkeypatch):
    pytest.importorskip("sphinx", reason="Sphinx is of the extra docs")
    from docutils import nodes

    monkeypatch.syspath_prepend(str(DOCS / "_extensions"))
    import mathml

    said = []
    monkeypatch.setattr(mathml.logger, "warning", lambda *args, **_: said.append(args))
    assert "<mfrac>" in mathml.mathml(nodes.math("", r"\frac{1}{2}"), is_block=False)
    assert "<mtable" in mathml.mathml(nodes.math_block("", r"a &= 1 \\ b &= 2"), is_block=True)
    assert mathml.mathml(nodes.math("", r"\lVert q\rVert"), is_block=False).count('stretchy="false"') == 2
    assert not said
    for wrong in (r"\nosuchcommand", r"\frac12", "x^10"):
        mathml.mathml(nodes.math("", wrong), is_block=False)
    assert len(said) == 3


# --- what came of it --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page of the site names: its own anchors, its links, and what a browser loads for it."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors.update(value for name in ("id", "name") if (value := given.get(name)))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") == "stylesheet":
            self.loaded.append(given["href"])


def broken_links(site: Path) -> list[str]:
    """Links and loaded files within the site that lead nowhere, `page: link`."""
    page_at = functools.lru_cache(None)(Page)
    broken = []
    for path in sorted(site.rglob("*.html")):
        page = page_at(path)
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            found = target.is_file() and (not anchor or target.suffix != ".html" or anchor in page_at(target).anchors)
            if not found:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top"><a href="b.html#x">b</a><a href="#top">up</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<a href="a.html#top">a</a><a href="https://example.org/none">out</a>')
    assert broken_links(tmp_path) == ["a.html: b.html#x", "a.html: c.png"]


@pytest.fixture(scope="module")
def site() -> Path:
    folder = ROOT / SITE
    assert (folder / "index.html").exists(), f"{folder} holds no site; bash scripts/docs.sh builds it"
    return folder


@built
def test_links_resolve(site):
    assert broken_links(site) == []


@built
def test_pages_load_nothing_from_elsewhere(site):
    loaded = {name for path in site.rglob("*.html") for name in Page(path).loaded}
    assert [name for name in loaded if urlsplit(name).netloc] == []


@built
def test_every_page_became_one(site):
    pages = [path for path in DOCS.rglob("*.md") if not path.is_relative_to(DOCS / "_build")]
    missing = [p for p in pages if not (site / p.relative_to(DOCS)).with_suffix(".html").exists()]
    assert missing == []


@built
def test_shapes_stand_in_signatures_and_formulas_are_drawn(site):
    reference = re.sub(r"<[^>]+>", "", (site / "api" / "attention.html").read_text(encoding="utf-8"))
    assert "x: Float[Tensor, 'batch seq embed']" in reference
    assert "<math " in (site / "mechanisms" / "gaussian.html").read_text(encoding="utf-8")
    assert "reproduction-positions.png" in (site / "index.html").read_text(encoding="utf-8")


@built
def test_every_example_has_its_picture(site):
    for path in EXAMPLES:
        page = (site / "gallery" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert f"sphx_glr_{path.stem}_001.png" in page
