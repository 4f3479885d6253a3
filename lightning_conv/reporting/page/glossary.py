"""The glossary of the documentation as plain text, for a page that is read without it.

``glossary.json`` is made from ``docs/glossary.md`` by ``python -m lightning_conv.reporting.page.glossary docs/glossary.md``.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

FILE = "glossary.json"

AMBIGUOUS = frozenset({"floor", "precision", "head", "gap", "verdict", "contraction"})
"""Terms that sentences also use as words of everyday English: they are in the list, and not marked in the text."""

ALIASES: Mapping[str, str] = {
    "NTK": "neural tangent kernel",
    "lambda_max": "lambda_min",
    "feature learning": "lazy regime",
}
"""Other names of terms."""

SYMBOLS = (
    (r"\\operatorname\{(\w+)\}", r"\1"),
    (r"\\frac12", "1/2 "),
    (r"\\frac1n", "1/n "),
    (r"\\(lambda|sigma)_\{\\?(\w+)\}", r"\1_\2"),
    (r"\\ell", "l"),
    (r"\\eta", "eta"),
    (r"\\nabla", "grad"),
    (r"\\partial", "d"),
    (r"\\sum", "sum"),
    (r"\\langle\s*", "<"),
    (r"\s*\\rangle", ">"),
    (r"\\inf", "inf"),
    (r"\\top", "T"),
    (r"\\times", "x"),
    (r"\\preceq", "<="),
    (r"\\le\b", "<="),
    (r"\\ge\b", ">="),
    (r"\\\|", "|"),
    (r"\\[,;]", " "),
    (r"_\{(\w+\+\w+)\}", r"_(\1)"),
    (r"[{}]", ""),
)
"""From LaTeX, as far as the glossary uses it, to plain text."""


@cache
def glossary() -> dict[str, str]:
    """Return the explanation of each term, in the order of the page."""
    content: dict[str, str] = json.loads((files(__package__) / FILE).read_text("utf-8"))
    return content


def terms_of(page: str) -> dict[str, str]:
    """Return the terms of the page with the first paragraph of each as plain text.

    Args:
        page: ``docs/glossary.md``.
    """
    sections = re.findall(r"^### (.+?)\n\n(.+?)(?=\n\n|\Z)", page, flags=re.MULTILINE | re.DOTALL)
    return {term.strip(): _plain(text) for term, text in sections}


def marked(text: str, known: set[str] | None = None) -> str:
    """Return a text as HTML, in which each term that occurs for the first time has its explanation.

    Args:
        text: The text; it is escaped.
        known: Terms that have been explained already; those of this text are added. None: none has.
    """
    seen = set() if known is None else known

    def explain(match: re.Match[str]) -> str:
        word = match[0]
        term = _by_name().get(word) or _by_name().get(word.lower(), "")
        if not term or term in seen:
            return html.escape(word)
        seen.add(term)
        return f'<dfn tabindex="0" data-term="{html.escape(term)}">{html.escape(word)}</dfn>'

    parts, end = [], 0
    for match in _pattern().finditer(text):
        parts += [html.escape(text[end : match.start()]), explain(match)]
        end = match.end()
    return "".join([*parts, html.escape(text[end:])])


@cache
def _by_name() -> dict[str, str]:
    names = {term: term for term in glossary() if term not in AMBIGUOUS}
    return names | {alias: term for alias, term in ALIASES.items() if term in glossary()}


@cache
def _pattern() -> re.Pattern[str]:
    # The longest names first: "trace kernel" before "kernel". A tag such as kernel/lambda_min is no term.
    names = sorted(_by_name(), key=len, reverse=True)
    return re.compile(rf"(?<![\w/.])(?:{'|'.join(map(re.escape, names))})(?![\w/(])", re.IGNORECASE)


def _plain(text: str) -> str:
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    text = re.sub(r"\$([^$]+)\$", lambda match: _symbols(match[1]), text)
    text = text.replace("`", "").replace("*", "")
    # "See X and Y." names functions and pages that are not at hand.
    text = " ".join(text.split())
    return re.sub(r"(; see [^.;]+(?=\.$)| See (?:[^.]|\.(?=[\w.)]))*\.(?= |$))", "", text).strip()


def _symbols(formula: str) -> str:
    for pattern, plain in SYMBOLS:
        formula = re.sub(pattern, plain, formula)
    return " ".join(formula.split())


if __name__ == "__main__":
    terms = terms_of(Path(sys.argv[1]).read_text("utf-8"))
    (Path(__file__).parent / FILE).write_text(json.dumps(terms, indent=1, ensure_ascii=False) + "\n", "utf-8")
