"""Code in a sentence that is a public name links to the reference, so that the pages need not say where a name is described."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from _site.names import unique

NAME = re.compile(r"([A-Za-z_]\w+)(?:\(.*\))?$", re.DOTALL)


def target(text: str) -> str | None:
    """Return the full name that code such as `LambdaMin` or `ntk_gram(...)` refers to."""
    found = NAME.match(text)
    return unique().get(found[1]) if found else None


def link_literals(app: Sphinx, doctree: nodes.document) -> None:
    """Wrap every literal that is a public name in a reference; those in links and headings stay as they are."""
    for literal in list(doctree.findall(nodes.literal)):
        name = target(literal.astext())
        parent = literal.parent
        if name is None or isinstance(parent, nodes.reference | nodes.title | addnodes.pending_xref):
            continue
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=name, refexplicit=True, refwarn=True, refdoc=app.env.docname
        )
        literal.replace_self(link)
        link += literal


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the step with Sphinx."""
    app.connect("doctree-read", link_literals)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
