"""Verdicts for people and for programs: a list of criteria as a Markdown table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from lightning_conv.reporting.markdown import markdown_table
from lightning_conv.theory.criterion import Criterion, Verdict

EXPLANATION = (
    "*certified*: proven, rounding included. *consistent*: holds where it was measured, which proves nothing beyond. *refuted*: does not "
    "hold. *undecided*: not measured, or the error of the measurement covers the bound. *not applicable*: a hypothesis of the theorem "
    "does not hold in this run. None of them says that a theorem is satisfied: the constants in their O(.) are unspecified."
)


LONG_REASON = 60
"""Characters from which on a reason that several criteria share is told once."""


def criteria_table(criteria: Sequence[Criterion]) -> str:
    """A Markdown table, a row a criterion; empty for none. A long reason that several share stands once, below the table.

    Example:
        >>> from lightning_conv.theory import at_least
        >>> print(criteria_table([at_least("ratio", "Somebody 2020", "a >= 1", 2.0, 1.0)]))
        | verdict | criterion | asks | measured | bound | why | source |
        |---|---|---|---|---|---|---|
        | consistent | ratio | a >= 1 | 2 | 1 | 2 is at least 1 where it was measured | Somebody 2020 |
    """
    if not criteria:
        return ""
    reasons = [each.reason for each in criteria]
    shared = [why for why in dict.fromkeys(reasons) if len(why) > LONG_REASON and reasons.count(why) > 1]
    notes = {why: f"({chr(ord('a') + i)})" for i, why in enumerate(shared[:26])}
    rows = []
    for each in criteria:
        verdict = f"**{each.verdict}**" if each.verdict == "refuted" else each.verdict
        why = notes.get(each.reason, each.reason)
        rows.append((verdict, each.name, each.asks, _number(each.measured), _number(each.bound), why, each.source))
    below = [f"{mark} {why}" for why, mark in notes.items()]
    columns = ("verdict", "criterion", "asks", "measured", "bound", "why", "source")
    return "\n\n".join([markdown_table(columns, rows), *below])


def verdict_counts(criteria: Iterable[Criterion]) -> dict[Verdict, int]:
    """How many criteria have each verdict, those that occur."""
    verdicts = [each.verdict for each in criteria]
    return {verdict: verdicts.count(verdict) for verdict in get_args(Verdict) if verdict in verdicts}


def report_markdown(
    title: str, facts: Mapping[str, object], criteria: Sequence[Criterion], metrics: Mapping[str, float]
) -> str:
    """The page of a run: facts, verdicts, the last raw quantities.

    Args:
        title: heading.
        facts: name -> value, a line each.
        criteria: the verdicts.
        metrics: tag -> last value.
    """
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(criteria).items()) or "none"
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), f"- verdicts: {counts}", ""]
    if criteria:
        lines += ["## Criteria", "", criteria_table(criteria), "", EXPLANATION, ""]
    if metrics:
        rows = [(name, _number(value)) for name, value in sorted(metrics.items())]
        lines += ["## Last measured", "", markdown_table(("quantity", "value"), rows)]
    return "\n".join(lines).rstrip() + "\n"


def report_json(facts: Mapping[str, object], criteria: Sequence[Criterion], metrics: Mapping[str, float]) -> str:
    """The same as JSON; what is not a finite number becomes null."""
    content: dict[str, Any] = {
        "facts": dict(facts),
        "criteria": [_finite(asdict(each)) for each in criteria],
        "metrics": _finite(metrics),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
