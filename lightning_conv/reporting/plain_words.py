"""Findings as Markdown, as a block for the terminal, as one text for loggers, and as scalars."""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TextIO

from lightning_conv.health.finding import LEVELS, Finding, Level, in_order, worst_level

TITLE = "In plain words"

NOTHING = "Nothing could be judged."
"""What is said without a finding."""

COLORS: Mapping[Level, str] = {"ok": "32", "notice": "36", "warning": "33", "alert": "31;1"}
"""Select Graphic Rendition of ECMA-48: green, cyan, yellow, bold red."""

WIDTH = 100
"""Columns of the block in the terminal."""

LEVEL = "health/level"
"""Tag of the worst level."""


def plain_words_markdown(findings: Sequence[Finding], reasons: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return the section "In plain words": one item for each finding, the most severe ones first.

    Args:
        findings: The findings.
        reasons: What could not be judged, by the reason: one line for each.

    Example:
        >>> print(plain_words_markdown([Finding(name="width", level="ok", sentence="The last layer has 8 features.")]))
        ## In plain words
        <BLANKLINE>
        - The last layer has 8 features. ([width](docs/health.md#width))
    """
    items = []
    for each in in_order(findings):
        level = "" if each.level == "ok" else f"**{each.level}** "
        items.append(f"- {level}{_escaped(_text(each))} ([{each.name}]({each.page}))")
    items += [f"- {_escaped(line)}" for line in _folded(reasons)]
    return "\n".join([f"## {TITLE}", "", *(items or [NOTHING])])


def plain_words_terminal(
    findings: Sequence[Finding],
    reasons: Mapping[str, Sequence[str]] | None = None,
    *,
    stream: TextIO | None = None,
    width: int = WIDTH,
) -> str:
    """Return the findings as a block for a terminal.

    It is coloured if the stream is a terminal and the environment does not set ``NO_COLOR`` (to anything but the empty string).

    Args:
        findings: The findings.
        reasons: See ``plain_words_markdown``.
        stream: Where it will be written; None: the standard output.
        width: Columns.
    """
    color = _has_color(sys.stdout if stream is None else stream)
    rows: list[tuple[Level | None, str]] = [(each.level, _text(each)) for each in in_order(findings)]
    rows += [(None, line) for line in _folded(reasons)]
    lines = [TITLE]
    for level, text in rows or [(None, NOTHING)]:
        mark = f"{level or '':<8}"
        body = textwrap.wrap(text, max(width - 10, 20), break_long_words=False, break_on_hyphens=False)
        shown = f"\x1b[{COLORS[level]}m{mark}\x1b[0m" if color and level is not None else mark
        lines += [f"  {shown}{body[0]}".rstrip(), *(f"{'':10}{line}" for line in body[1:])]
    return "\n".join(lines)


def plain_words_text(findings: Sequence[Finding]) -> str:
    """Return the findings as lines without markup, for the text of a logger."""
    return "\n".join(f"{each.level}: {_text(each)}" for each in in_order(findings)) or NOTHING


def plain_words_list(findings: Sequence[Finding]) -> str:
    """Return the findings as a Markdown list, the most severe ones first, for the text of a logger that shows Markdown.

    It is no table: TensorBoard breaks the words of a narrow column.

    Args:
        findings: The findings.

    Example:
        >>> print(plain_words_list([Finding(name="width", level="ok", sentence="The last layer has 8 features.")]))
        - ok: The last layer has 8 features.
    """
    items = []
    for each in in_order(findings):
        level = each.level if each.level == "ok" else f"**{each.level}**"
        items.append(f"- {level}: {_escaped(_text(each))}")
    return "\n".join(items) or NOTHING


def health_scalars(findings: Sequence[Finding]) -> dict[str, float]:
    """Return the values by tag ``health/<name>`` and the worst level as ``health/level``, 0 for ``ok`` up to 3 for ``alert``.

    Values that are not finite are left out. Of several findings with one name the most severe one counts.
    """
    values: dict[str, float] = {}
    for each in in_order(findings):
        if math.isfinite(each.value):
            values.setdefault(tag_of(each), float(each.value))
    return values | {LEVEL: float(LEVELS.index(worst_level(findings)))}


def tag_of(finding: Finding) -> str:
    """Return the tag under which the value of a finding is logged."""
    return f"health/{finding.name}"


def _text(finding: Finding) -> str:
    return f"{finding.sentence} {finding.advice}".rstrip()


def _folded(reasons: Mapping[str, Sequence[str]] | None) -> list[str]:
    """Return one line for each reason."""
    return [f"Not judged: {', '.join(names)} ({reason})." for reason, names in (reasons or {}).items() if names]


def _escaped(text: str) -> str:
    """Escape what Markdown would take for emphasis, code or a tag."""
    for character in "\\`*_<[":
        text = text.replace(character, f"\\{character}")
    return text


def _has_color(stream: TextIO) -> bool:
    return not os.environ.get("NO_COLOR") and bool(getattr(stream, "isatty", lambda: False)())
