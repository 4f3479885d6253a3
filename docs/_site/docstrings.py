"""Docstrings as reStructuredText: in prose the letters of formulas, such as those of `|u - y|^2`, are no markup."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

LITERAL = re.compile(r"(``.+?``|:\w+:`[^`]+`|`[^`]+`)")
MARKUP = re.compile(r"(?<!\\)([*|])|(?<=\w)_(?!\w)")
PROMPT, DIRECTIVE = ">>>", ".. "


def escaped(text: str) -> str:
    """Return a line of prose whose asterisks, bars and final underscores are escaped; code between backticks is kept."""
    parts = LITERAL.split(text)
    parts[::2] = [MARKUP.sub(lambda found: "\\" + found[0], part) for part in parts[::2]]
    parts[1::2] = [part if part.startswith(("``", ":")) else f"`{part}`" for part in parts[1::2]]
    for place in range(1, len(parts), 2):  # a plural s or a hyphenated word right behind code ends the literal only so
        parts[place] += "\\ " if parts[place + 1][:1].isalnum() else ""
    return "".join(parts)


def indentation(line: str) -> int:
    """Return the number of blanks before the first letter."""
    return len(line) - len(line.lstrip())


def escape_prose(lines: list[str]) -> list[str]:
    """Return the docstring with its prose escaped; directives, literal blocks and examples are kept as they are."""
    result, block, example = [], None, False
    for line in lines:
        if block is not None and line.strip() and indentation(line) <= block:
            block = None
        if block is None and line.lstrip().startswith(DIRECTIVE):
            block = indentation(line)
        example = bool(line.strip()) and (example or line.lstrip().startswith(PROMPT))
        result.append(line if example or block is not None else escaped(line))
        if block is None and not example and line.rstrip().endswith("::"):
            block = indentation(line)
    return result


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escape a docstring in place."""
    lines[:] = escape_prose(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the step with Sphinx, before napoleon reads the sections (priority 500)."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
