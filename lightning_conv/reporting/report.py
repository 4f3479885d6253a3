"""The report of a run: its criteria as a Markdown page with a legend, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from lightning_conv.reporting.json_values import json_values
from lightning_conv.reporting.markdown import markdown_table
from lightning_conv.theory.criterion import Criterion, Verdict

VERDICTS = (
    "*certified*: proven, rounding included. *consistent*: true where it was measured, which proves nothing beyond. *refuted*: false. "
    "*undecided*: not measured, or the error of the measurement covers the bound. *not applicable*: the run violates an assumption of "
    "the theorem. No verdict says that a theorem is satisfied, because the constants in its O(.) are unspecified."
)
"""Legend of the verdicts."""

TERMS = (
    "*probe*: the fixed training samples on which the kernel is computed. *kernel*: the empirical neural tangent kernel on the probe, "
    "the Gram matrix of the gradients of the outputs by the weights. *lambda_min*, *lambda_max*: its smallest and largest eigenvalue. "
    "*h*: the last hidden features, the input of the last linear layer; *[h, 1]*: the same with a column of ones for the bias. "
    "*gap*: loss minus its infimum over all outputs. *L_H*: Lipschitz constant of the gradient by the last layer. "
    "All terms: `docs/glossary.md` of lightning_conv."
)
"""Legend of the terms, for a page that is read without the documentation."""

EXPLANATION = f"{VERDICTS}\n\n{TERMS}"
"""Both legends, for a text below a table of criteria."""

LONG_REASON = 60
"""Length in characters from which a reason that several criteria share is printed only once."""


def criteria_table(criteria: Sequence[Criterion]) -> str:
    """Format the criteria as a Markdown table, one row per criterion; an empty string for no criteria.

    A long reason that several criteria share is printed once, below the table.

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


def criteria_text(criteria: Sequence[Criterion]) -> str:
    """Return the criteria for the text of a logger: a table of three columns, and one line per reason for those that do not apply.

    TensorBoard breaks the words of a narrow column, so a verdict stands before its criterion.

    Args:
        criteria: The criteria.

    Example:
        >>> from lightning_conv.theory import at_least
        >>> print(criteria_text([at_least("ratio", "Somebody 2020", "a >= 1", 2.0, 1.0)]).splitlines()[2])
        | consistent: ratio (Somebody 2020) | a >= 1; measured 2, bound 1 | 2 is at least 1 where it was measured |
    """
    rows = []
    for each in criteria:
        if each.verdict == "not applicable":
            continue
        numbers = [f"{name} {_number(value)}" for name, value in _numbers(each) if not math.isnan(value)]
        asks = "; ".join([each.asks, ", ".join(numbers)]) if numbers else each.asks
        verdict = f"**{each.verdict}**" if each.verdict == "refuted" else each.verdict
        rows.append((f"{verdict}: {each.name} ({each.source})", asks, each.reason))
    table = [markdown_table(("criterion", "asks", "why"), rows)] if rows else []
    return "\n\n".join([*table, "\n".join(not_applicable(criteria))]).strip()


def _numbers(criterion: Criterion) -> tuple[tuple[str, float], tuple[str, float]]:
    return ("measured", criterion.measured), ("bound", criterion.bound)


def verdict_counts(criteria: Iterable[Criterion]) -> dict[Verdict, int]:
    """Count the criteria by verdict, without verdicts that do not occur."""
    verdicts = [each.verdict for each in criteria]
    return {verdict: verdicts.count(verdict) for verdict in get_args(Verdict) if verdict in verdicts}


def report_markdown(
    title: str,
    facts: Mapping[str, object],
    criteria: Sequence[Criterion],
    metrics: Mapping[str, float],
    *,
    steps: Mapping[str, int] | None = None,
    words: str = "",
    labels: str = "",
) -> str:
    """Write the page of a run: what is known in plain words, facts, criteria, the last measured quantities and a legend.

    Args:
        title: heading of the page.
        facts: values by name, one line each.
        criteria: the criteria with their verdicts; those that do not apply are folded into one line per reason.
        metrics: last values by tag; those that are not finite are left out.
        steps: the optimizer steps at which they were measured, by tag, as far as they are known.
        words: the section with the findings (``plain_words_markdown``); empty: there is none.
        labels: the section with the audit of the labels; empty: there is none.
    """
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(criteria).items()) or "none"
    lines = [f"# {title}", "", *([words, ""] if words else [])]
    lines += [*(f"- {name}: {value}" for name, value in facts.items()), f"- verdicts: {counts}", ""]
    lines += [labels, ""] if labels else []
    if criteria:
        applied = [each for each in criteria if each.verdict != "not applicable"]
        lines += ["## Criteria", ""]
        lines += [criteria_table(applied), ""] if applied else []
        lines += [*not_applicable(criteria), "", VERDICTS, ""]
    finite = {name: value for name, value in sorted(metrics.items()) if math.isfinite(value)}
    if finite:
        known = steps or {}
        rows = [(name, _number(value), str(known.get(name, ""))) for name, value in finite.items()]
        lines += ["## Last measured", "", markdown_table(("quantity", "value", "step"), rows), ""]
    if criteria or finite:
        lines += ["## Terms", "", TERMS]
    return "\n".join(lines).rstrip() + "\n"


def not_applicable(criteria: Sequence[Criterion]) -> list[str]:
    """Return a line for each reason for which criteria do not apply, with their names.

    Args:
        criteria: all criteria.
    """
    by_reason: dict[str, list[str]] = {}
    for each in criteria:
        if each.verdict == "not applicable":
            by_reason.setdefault(each.reason, []).append(f"`{each.name}`")
    return [f"- Not applicable: {', '.join(names)} ({why})" for why, names in by_reason.items()]


def report_json(
    facts: Mapping[str, object],
    criteria: Sequence[Criterion],
    metrics: Mapping[str, float],
    health: Sequence[Mapping[str, Any]] = (),
    steps: Mapping[str, int] | None = None,
    more: Mapping[str, Any] | None = None,
    series: Mapping[str, Any] | None = None,
) -> str:
    """Return facts, criteria, metrics with their steps, findings and series as JSON, in which NaN and infinity become null.

    Args:
        facts: See ``report_markdown``.
        criteria: See there.
        metrics: See there.
        health: The findings.
        steps: See ``report_markdown``.
        more: Further parts by name.
        series: Steps and values by tag, a line of the file for each.
    """
    content: dict[str, Any] = {
        "facts": dict(facts),
        "health": [dict(each) for each in health],
        "criteria": [asdict(each) for each in criteria],
        "metrics": metrics,
        "steps": dict(steps or {}),
        **(more or {}),
    }
    text = json.dumps(json_values(content), indent=1, allow_nan=False)
    lines = [
        f"  {json.dumps(tag)}: {json.dumps(each, allow_nan=False, separators=(',', ':'))}"
        for tag, each in json_values(series or {}).items()
    ]
    end = ',\n "series": {' + "".join(f"\n{line}," for line in lines).rstrip(",") + "\n }\n}\n"
    return text.removesuffix("\n}") + end


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
