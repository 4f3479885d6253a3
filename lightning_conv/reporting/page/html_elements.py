"""The elements of a page as HTML: tables, folded parts, items of a list, numbers, texts that are cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

LONGEST = 600
"""Characters of a setting or a fact that are shown."""

MOST_ROWS = 400
"""Rows of a table."""


def folded(title: str, content: str, *, is_open: bool = False) -> str:
    """Return HTML that is folded under a title.

    Args:
        title: A text, which is escaped.
        content: HTML.
        is_open: Whether it is unfolded at first.
    """
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{content}</details>"


def table_html(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; one that is very long is cut, and says so.

    Args:
        columns: Texts, which are escaped.
        rows: HTML.
    """
    known = list(rows)
    head = "".join(f"<th>{escape(each)}</th>" for each in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in known[:MOST_ROWS])
    more = f'<p class="soft">{len(known) - MOST_ROWS} more rows are not shown.</p>' if len(known) > MOST_ROWS else ""
    return f'<div class="scroll"><table class="data"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}'


def number_html(value: float) -> str:
    """Return a number with four digits; a dash for one that is not known.

    Args:
        value: The number.
    """
    return "–" if math.isnan(value) else escape(f"{value:.4g}")


def item_html(level: str, text: str, kind: str = "") -> str:
    """Return an item of the list of findings.

    Args:
        level: Its mark.
        text: HTML.
        kind: Class of its style; empty: that of what is no finding.
    """
    return f'<li class="{kind}"><span class="level {kind or "soft"}">{level}</span><div>{text}</div></li>'


def short_html(value: object) -> str:
    """Return a value as escaped text, cut where it is very long.

    Args:
        value: Of a setting, or a name.
    """
    text = str(value)
    return escape(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")


def _cell(content: str) -> str:
    return f'<td class="bars">{content}</td>' if content.startswith('<div class="bar"') else f"<td>{content}</td>"
