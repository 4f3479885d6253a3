"""The navigation of the site: it is read from the links of the pages named README, so that it is written once."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from sphinx.application import Sphinx

ENTRY = re.compile(r"^(?:[-*] |\| )\[([^\]]+)\]\(([^)#\s]+)\.md\)", re.MULTILINE)
"""A link to a page, at the beginning of a row of a table or of an item of a list."""

INDEXES = [("All names", "genindex"), ("Modules", "modindex")]
"""Pages that Sphinx makes; they follow the last section of the first page."""

SECTION = re.compile(r"^## (.+)$", re.MULTILINE)


def entries(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the sections of a page, each with the titles and paths of the pages that it lists; "" names what precedes them."""
    parts = SECTION.split(text)
    sections = [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]
    return [(title, [(name.replace("`", ""), path) for name, path in ENTRY.findall(body)]) for title, body in sections]


def tree(caption: str, pages: list[tuple[str, str]]) -> str:
    """Return a hidden table of contents in the syntax of MyST."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "", "```{toctree}", *options, "", *(f"{name} <{path}>" for name, path in pages), "```", ""])


def add_trees(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the tables of contents to a page named README; only those of the first page have captions."""
    if PurePosixPath(docname).name != "README":
        return
    found = [(title, pages) for title, pages in entries(source[0]) if pages]
    if docname != app.config.root_doc:
        found = [("", [page for _, pages in found for page in pages])] if found else []
    else:
        found[-1:] = [(title, pages + INDEXES) for title, pages in found[-1:]]
    source[0] += "".join(tree(title, pages) for title, pages in found)


def copy_index(app: Sphinx, error: Exception | None) -> None:
    """Copy the first page to index.html, which servers and browsers ask for."""
    if error is None and app.builder.format == "html":
        shutil.copyfile(Path(app.outdir) / f"{app.config.root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the two steps with Sphinx."""
    app.connect("source-read", add_trees)
    app.connect("build-finished", copy_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
