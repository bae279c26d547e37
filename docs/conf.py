"""How Sphinx builds these pages: `bash scripts/docs.sh`."""

import collections
import configparser
import inspect
import sys
import typing
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

# Shapes stand in signatures as Float[Tensor, "batch seq embed"], without the module; read when jaxtyping is imported.
typing.GENERATING_DOCUMENTATION = "sphinx"

setup_cfg = configparser.ConfigParser(interpolation=None)
setup_cfg.read(DOCS.parent / "setup.cfg", encoding="utf-8")

project = setup_cfg["metadata"]["name"]
author = setup_cfg["metadata"]["author"]
version = release = setup_cfg["metadata"]["version"]
project_copyright = f"{author}, {setup_cfg['metadata']['license']}"

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples", "gallery/*.ipynb", "gallery/*.py", "gallery/*.md5"]
default_role = "literal"  # `x` in a docstring is code
viewcode_follow_imported_members = False  # or pages of one module link to anchors of another
nitpicky = True
suppress_warnings = ["ref.python"]  # two classes may have one name in two modules

html_theme = "furo"
html_title = "pennylane-qattn"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style, pygments_dark_style = "default", "monokai"

# --- pages in Markdown ------------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
#: Titles of pages that a command writes without one.
TITLES = {
    "grover/training": "Amplification, trained",
}


def add_title(app, page: str, source: list[str]) -> None:
    """A page needs one heading above all others."""
    if page in TITLES and not source[0].startswith("# "):
        source[0] = f"# {TITLES[page]}\n\n{source[0]}"


# --- the API reference ------------------------------------------------------------------------------------------

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes"]
napoleon_attr_annotations = False

# Names of other projects: their pages are not looked up, so that the build needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torchmetrics|transformers|numpy|np|numba|pennylane|lightning|jsonargparse|matplotlib|rich)\..*"),
    ("py:.*", r"(abc|argparse|collections|contextlib|os|pathlib|typing)\..*"),
    ("py:.*", r"(Tensor|ndarray|Float|Float64|Bool|Int|Int64|Complex|Num|Shaped)"),
    ("py:.*", r"(OpenAIGPTLMHeadModel|PreTrainedTokenizerFast)"),
    ("py:.*", r"(pennylane_qattn\.registry\.Described|lightning_modules\.progress\.Item)"),  # type variables
    ("py:.*", r"(dict|list|tuple)\[.*"),
    ("py:.*", r"'.*'"),  # the axes in a type
    ("py:.*", r".*\._\w+"),  # private bases
]

TUPLE_FIELD = type(collections.namedtuple("Point", "x").x)
#: Characters of a constant's value that the reference shows.
LONGEST_VALUE = 80


def choose_member(app, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Shows methods without a docstring whose signature says what they return; hides attributes that name a class, and
    the fields of a named tuple, which its docstring has."""
    if inspect.isfunction(member) and not name.startswith("_") and "return" in member.__annotations__:
        return False
    hidden = inspect.isclass(member) or isinstance(member, TUPLE_FIELD)
    return True if what == "class" and hidden else None


def keep_colons(app, what: str, name: str, member: object, options: object, lines: list[str]) -> None:
    """An attribute's text has no type before its first colon, which napoleon would look for in the first line."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "\\")  # is dropped on the page


def parse_defaults(app, what: str, name: str, member: object, options: object, signature: str, returned: str):
    """A dataclass's signature shows `<factory>` for a default that is made, which Sphinx cannot parse."""
    return (signature.replace("<factory>", "..."), returned) if signature else None


def drop_long_values(app, domain: str, kind: str, content: nodes.Element) -> None:
    """A constant is shown with its value; a table that fills a paragraph is not."""
    for part in list(content.parent.findall(addnodes.desc_annotation)):
        if part.astext().startswith(" = ") and len(part.astext()) > LONGEST_VALUE:
            part.parent.remove(part)


def setup(app) -> None:
    app.connect("object-description-transform", drop_long_values)
    app.connect("autodoc-process-signature", parse_defaults)
    app.connect("source-read", add_title)
    app.connect("autodoc-skip-member", choose_member)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon


# --- the gallery ------------------------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": ("example_style.set_style",),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "capture_repr": (),
}
