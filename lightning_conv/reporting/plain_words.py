"""Findings as Markdown, as a block for the terminal, as one text for loggers, and as scalars."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TextIO

from lightning_conv.health.finding import LEVELS, Finding, Level, in_order, worst_level
from lightning_conv.health.wording import counted, subject_of
from lightning_conv.reporting.terminal import has_color

TITLE = "In plain words"

NOTHING = "Nothing could be judged."
"""What is said without a finding."""

COLORS: Mapping[Level, str] = {"ok": "32", "notice": "36", "warning": "33", "alert": "31;1"}
"""Select Graphic Rendition of ECMA-48: green, cyan, yellow, bold red."""

MEANING: Mapping[Level, str] = {"warning": "it is held back", "alert": "it cannot go on well as it is"}
"""What the levels mean that are no good news."""

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
    color = has_color(sys.stdout if stream is None else stream)
    rows: list[tuple[Level | None, str]] = [(each.level, _at_its_step(each)) for each in in_order(findings)]
    rows += [(None, line) for line in _folded(reasons)]
    lines = [
        line for level, text in rows or [(None, NOTHING)] for line in _lines(level or "", text, level, color, width)
    ]
    return "\n".join([TITLE, *lines])


def run_block(
    how: str,
    steps: int,
    findings: Sequence[Finding],
    reasons: Mapping[str, Sequence[str]] | None = None,
    files: Mapping[str, str] | None = None,
    *,
    stream: TextIO | None = None,
    width: int = WIDTH,
) -> str:
    """Return the block that ends a run in a terminal: the verdict, the findings by severity with their steps, and where the files are.

    Args:
        how: How the run has ended, such as ``"completed"``.
        steps: Optimizer steps that it has made.
        findings: The findings.
        reasons: See ``plain_words_markdown``.
        files: Paths by what they are, such as ``"page"``; they are never broken into lines.
        stream: See ``plain_words_terminal``.
        width: Columns.
    """
    stream = sys.stdout if stream is None else stream
    color, level = has_color(stream), worst_level(findings)
    head = textwrap.wrap(f"{TITLE}: {verdict_of_run(how, steps, findings)}", max(width, 20), break_long_words=False)
    if color:
        head = [f"\x1b[1;{COLORS[level]}m{line}\x1b[0m" for line in head]
    _, *body = plain_words_terminal(findings, reasons, stream=stream, width=width).split("\n")
    paths = [f"  {name:<8}{path}" for name, path in (files or {}).items()]
    return "\n".join([*head, *body, *paths])


def alert_line(finding: Finding, whose: str, *, stream: TextIO | None = None, width: int = WIDTH) -> str:
    """Return an alert as it is shown in a terminal at the moment when it happens.

    Args:
        finding: The alert.
        whose: Name of the callback that gives it.
        stream: See ``plain_words_terminal``.
        width: Columns.
    """
    color = has_color(sys.stderr if stream is None else stream)
    return "\n".join(_lines(finding.level, f"{whose}: {_at_its_step(finding)}", finding.level, color, width, indent=0))


def verdict_of_run(how: str, steps: int, findings: Sequence[Finding]) -> str:
    """Return what the findings come to, in a sentence.

    Args:
        how: How the run has ended.
        steps: Optimizer steps that it has made.
        findings: The findings.

    Example:
        >>> verdict_of_run("completed", 12, [Finding(name="width", level="warning", sentence="The last layer is narrow.")])
        'the run completed after 12 steps; 1 warning: it is held back.'
    """
    level = worst_level(findings)
    count = sum(each.level == level for each in findings)
    said = f"{counted(count, level)}: {MEANING[level]}" if level in MEANING else "nothing that was judged holds it back"
    if level not in MEANING and how.startswith("failed"):
        said = "nothing that was judged says why"
    if level not in MEANING and any(each.name == "loss_rise" for each in findings):
        said = "the loss rose, and nothing that was judged explains it"
    if level not in MEANING and any(each.name == "progress" for each in findings):
        said = "the training loss has not fallen, and nothing that was judged explains it"
    verb = f"was {how}" if how.startswith("interrupted") else how
    return f"the run {verb} after {counted(steps, 'step')}; {said if findings else 'nothing could be judged'}."


def _lines(mark: str, text: str, level: Level | None, color: bool, width: int, indent: int = 2) -> list[str]:
    """Return a sentence behind its mark, broken into lines that begin below one another."""
    margin = indent + 8
    body = textwrap.wrap(text, max(width - margin, 20), break_long_words=False, break_on_hyphens=False)
    shown = f"{mark:<8}"
    if color and level is not None:
        shown = f"\x1b[{COLORS[level]}m{shown}\x1b[0m"
    return [f"{'':{indent}}{shown}{body[0]}".rstrip(), *(f"{'':{margin}}{line}" for line in body[1:])]


def _at_its_step(finding: Finding) -> str:
    """Return sentence and advice, behind the step of the measurement where there is one."""
    return _text(finding) if finding.step is None else f"step {finding.step}: {_text(finding)}"


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
    return [not_judged(reason, names) for reason, names in (reasons or {}).items() if names]


def not_judged(reason: str, names: Sequence[str]) -> str:
    """Say what could not be judged.

    Args:
        reason: Why.
        names: Names of the findings, as in ``Finding.name``, behind the name of an optimizer in a run with several.

    Example:
        >>> not_judged("no time for it", ["stability", "forecast"])
        'Not judged: the stability of the step, where the loss will be (no time for it).'
    """
    return f"Not judged: {', '.join(map(subject_of, names))} ({reason})."


def _escaped(text: str) -> str:
    """Escape what Markdown would take for emphasis, code or a tag."""
    for character in "\\`*_<[":
        text = text.replace(character, f"\\{character}")
    return text
