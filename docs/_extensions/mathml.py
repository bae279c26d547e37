"""Formulas as MathML, which browsers draw by themselves: no script, no fonts, no network.

Docutils translates them. A formula that it cannot translate is a warning, which fails the build.
"""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

#: Where TeX takes one digit, Docutils takes the whole number: such arguments need braces.
UNBRACED = re.compile(r"\\(?:[dt]?frac|sqrt)\s*\d|[\^_]\s*\d\d")
#: Fences that Docutils lets grow, each to the height of its own surroundings.
FENCES = re.compile(r'<mo( class="\w+")?>([⟨⟩‖⌈⌉])</mo>')


def mathml(node: nodes.Element, is_block: bool) -> str:
    """The formula of a node; its source, and a warning, where it cannot be translated."""
    tex = node.astext().strip()
    if is_block and ("\\\\" in tex or "&" in tex) and "\\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    try:
        if found := UNBRACED.search(tex):
            raise MathError(f"put braces round the argument in {found[0]}")
        return FENCES.sub(r'<mo\1 stretchy="false">\2</mo>', tex2mathml(tex, as_block=is_block))
    except MathError as error:
        logger.warning("formula cannot be translated: %s: %s", error, tex, location=node, type="mathml")
        return f"<code>{nodes.unescape(tex)}</code>"


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node, is_block=False))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math notranslate"))
    self.body.append(mathml(node, is_block=True) + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
