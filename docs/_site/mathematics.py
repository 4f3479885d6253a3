"""Formulas as MathML: docutils converts the LaTeX, browsers render it themselves, and no script, font or picture is loaded."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

SHORT_FRACTION = re.compile(r"\\([td]?frac)\s*(\w)\s*(\w)")
"""A fraction of two single letters or digits, which LaTeX takes without braces and docutils does not."""

FENCE = re.compile('<mo(?: class="[a-z]+"| stretchy="false")?>([|‖⟨⟩⌈⌉⌊⌋])</mo>')
"""A bracket outside `\\left` and `\\right`: browsers would stretch it, or set it apart as they do an operator between two terms."""

logger = logging.getLogger(__name__)


def spelled_out(formula: str) -> str:
    """Return the formula without two abbreviations of LaTeX that docutils does not know."""
    return SHORT_FRACTION.sub(r"\\\1{\2}{\3}", formula).replace(r"\dots", r"\ldots")


def mathml(node: nodes.math | nodes.math_block) -> str:
    """Return the formula as MathML; LaTeX that docutils does not know is a warning, hence an error of `make docs`."""
    formula = spelled_out(node.astext())
    try:
        markup = str(tex2mathml(formula, as_block=isinstance(node, nodes.math_block)))
        return (
            markup if r"\left" in formula else FENCE.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', markup)
        )
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return f"<code>{node.astext()}</code>"


def visit(self: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula and skip its content, which is the LaTeX."""
    block = isinstance(node, nodes.math_block)
    self.body.append(f'<div class="math">{mathml(node)}</div>' if block else mathml(node))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer with Sphinx."""
    app.add_html_math_renderer("mathml", (visit, None), (visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
