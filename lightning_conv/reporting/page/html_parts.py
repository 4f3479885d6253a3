"""The parts of a page as HTML. All texts are escaped here: names, messages and settings come from the user's code."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from lightning_conv.health.finding import Finding, in_order, worst_level
from lightning_conv.reporting.page.glossary import glossary, marked
from lightning_conv.reporting.page.html_elements import folded, item_html, number_html, short_html, table_html
from lightning_conv.reporting.page.run_record import RunRecord
from lightning_conv.reporting.page.status_figure import figure_as_svg, status_figure
from lightning_conv.reporting.plain_words import NOTHING, not_judged
from lightning_conv.reporting.report import VERDICTS, verdict_counts
from lightning_conv.theory.criterion import Criterion

BRIEF = 60
"""Characters of a fact that stands in one line with others."""

MANY_LAYERS = 12
"""Layers from which on their table is folded."""


def words_html(run: RunRecord) -> str:
    """Return the findings, the most severe ones first, and what could not be judged.

    Args:
        run: The run.
    """
    seen: set[str] = set()
    items = []
    for each in in_order(run.findings):
        advice = f'<span class="advice">{marked(each.advice, seen)}</span>' if each.advice else ""
        items.append(item_html(each.level, f"{marked(each.sentence, seen)}{_at(each, run)}{advice}", each.level))
    for reason, names in run.not_judged.items():
        if names:
            items.append(item_html("open", marked(not_judged(reason, names), seen)))
    items += [item_html("note", escape(each)) for each in run.missing]
    return f'<ul class="words">{"".join(items) or item_html("open", NOTHING)}</ul>'


def _at(each: Finding, run: RunRecord) -> str:
    """Return the step of a finding, where it is not that of the end of the run, and its sentence names none."""
    is_last = each.step is None or each.step == run.facts.get("optimizer steps")
    return "" if is_last or re.search(r"\bstep \d", each.sentence) else f' <span class="soft">(step {each.step})</span>'


def facts_html(run: RunRecord) -> str:
    """Return what is known of the run in one line.

    Args:
        run: The run.
    """
    brief = [
        f"{escape(name)}: <b>{short_html(value)}</b>" for name, value in _facts(run).items() if len(value) <= BRIEF
    ]
    return f'<p class="facts">{" · ".join(brief)}</p>'


def long_facts_html(run: RunRecord) -> str:
    """Return what takes more than a few words, such as the hypotheses of theorems that do not hold.

    Args:
        run: The run.
    """
    rest = {name: value for name, value in _facts(run).items() if len(value) > BRIEF}
    return "".join(f'<p class="facts">{escape(name)}: {short_html(value)}</p>' for name, value in rest.items())


def _facts(run: RunRecord) -> dict[str, str]:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(run.criteria).items())
    return {str(name): str(value) for name, value in run.facts.items()} | ({"verdicts": counts} if counts else {})


def run_figure(run: RunRecord, optimizer: str = "") -> Figure:
    """Return the figure of a run in six panels (``status_figure``).

    Args:
        run: The run.
        optimizer: Name of the optimizer whose network is meant, in a run with several.
    """
    of = f"{optimizer}: " if optimizer else ""
    why = {
        name.removeprefix(of): reason
        for reason, names in run.not_judged.items()
        for name in names
        if name.startswith(of)
    }
    return status_figure(run.series, run.shares.get(optimizer, {}), optimizer, why=why)


def status_html(run: RunRecord, *, salt: str) -> str:
    """Return the figure of a run, one for the network of each optimizer; those after the first are folded.

    Args:
        run: The run.
        salt: See ``figure_as_svg``.
    """
    parts = []
    for number, optimizer in enumerate(run.optimizers):
        figure = run_figure(run, optimizer)
        title = f"The run {run.name}{f', network of {optimizer}' if optimizer else ''}, in six panels"
        drawn = f'<div class="status">{figure_as_svg(figure, salt=f"{salt}-{number}", title=title)}</div>'
        parts.append(folded(f"The network of {optimizer}", drawn) if number else drawn)
    return "".join(parts)


def charts_html(titles: Sequence[tuple[str, str]], first: int) -> str:
    """Return the places of charts, which the script draws.

    Args:
        titles: Title and explanation of each.
        first: Number of the first one in the data.
    """
    cards = [
        f'<div class="chart" data-chart="{first + k}"><div class="top"><div><h3>{marked(title)}</h3>'
        f'<p>{marked(about)}</p></div><button type="button" hidden>log</button></div><div class="plot"></div></div>'
        for k, (title, about) in enumerate(titles)
    ]
    return f'<div class="charts">{"".join(cards)}</div>'


def criteria_html(criteria: Sequence[Criterion]) -> str:
    """Return the criteria that apply as a table, and the others folded by their reason.

    Args:
        criteria: All of them.
    """
    if not criteria:
        return ""
    applied = [each for each in criteria if each.verdict != "not applicable"]
    rows = [
        [
            _verdict(each.verdict),
            f"<code>{escape(each.name)}</code>",
            escape(each.asks),
            number_html(each.measured),
            number_html(each.bound),
            escape(each.reason),
            escape(each.source),
        ]
        for each in applied
    ]
    columns = ("verdict", "criterion", "asks", "measured", "bound", "why", "source")
    parts = [table_html(columns, rows)] if rows else ["<p>None of the criteria applies to this run.</p>"]
    reasons: dict[str, list[str]] = {}
    for each in criteria:
        if each.verdict == "not applicable":
            reasons.setdefault(each.reason, []).append(each.name)
    if reasons:
        items = [
            f"<li>{marked(why)}: {', '.join(f'<code>{escape(name)}</code>' for name in names)}</li>"
            for why, names in reasons.items()
        ]
        count = len(criteria) - len(applied)
        parts.append(folded(f"{count} not applicable, by reason", f"<ul>{''.join(items)}</ul>"))
    parts.append(f'<p class="soft">{escape(VERDICTS.replace("*", ""))}</p>')
    return "".join(parts)


def layers_html(run: RunRecord) -> str:
    """Return each layer's share of the trace as bars, folded where there are many.

    Args:
        run: The run.
    """
    parts = []
    for optimizer, shares in run.shares.items():
        known = {layer: share for layer, share in shares.items() if math.isfinite(share)}
        largest = max(known.values(), default=0.0)
        rows = [
            [
                f"<code>{short_html(layer or '(the model)')}</code>",
                number_html(share),
                f'<div class="bar" style="width:{100 * share / largest if largest > 0 else 0:.1f}%"></div>',
            ]
            for layer, share in known.items()
        ]
        title = f"Layers{f' of {optimizer}' if optimizer else ''}: share of the trace of the kernel ({len(rows)})"
        if rows:
            parts.append(folded(title, table_html(("layer", "share", ""), rows), is_open=len(rows) <= MANY_LAYERS))
    return "".join(parts)


def measured_html(run: RunRecord) -> str:
    """Return the last values, folded.

    Args:
        run: The run.
    """
    finite = {name: value for name, value in sorted(run.metrics.items()) if math.isfinite(value)}
    rows = [[f"<code>{escape(n)}</code>", number_html(v), str(run.steps.get(n, ""))] for n, v in finite.items()]
    return folded(f"Last measured ({len(rows)})", table_html(("quantity", "value", "step"), rows)) if rows else ""


def settings_html(run: RunRecord) -> str:
    """Return settings and versions, and the time spent measuring, folded.

    Args:
        run: The run.
    """
    parts = []
    for group, settings in run.settings.items():
        rows = [[f"<code>{short_html(name)}</code>", short_html(value)] for name, value in settings.items()]
        if rows:
            parts.append(f"<h3>{escape(group)}</h3>{table_html(('name', 'value'), rows)}")
    return folded("Settings and versions", "".join(parts)) if parts else ""


def seconds_html(run: RunRecord) -> str:
    """Return the time spent measuring.

    Args:
        run: The run.
    """
    rows = [[escape(what), f"{seconds:.3g} s"] for what, seconds in run.seconds.items() if math.isfinite(seconds)]
    return f"<h2>Time spent measuring</h2>{table_html(('what', 'seconds'), rows)}" if rows else ""


def overview_html(runs: Sequence[RunRecord]) -> str:
    """Return the runs side by side: how they ended, their worst level, last values, and the settings in which they differ.

    Args:
        runs: The runs.
    """
    facts = list(dict.fromkeys(name for run in runs for name in run.facts))
    rows = [["<b>health</b>", *(f"{_level(run)} {_foremost(run)}" for run in runs)]]
    rows += [[f"<b>{short_html(name)}</b>", *(short_html(run.facts.get(name, "")) for run in runs)] for name in facts]
    values = sorted({name for run in runs for name, value in run.metrics.items() if math.isfinite(value)})
    last = [
        [f"<code>{escape(name)}</code>", *(number_html(run.metrics.get(name, math.nan)) for run in runs)]
        for name in values
    ]
    flat = [
        {f"{group}: {name}": str(value) for group, all_of in run.settings.items() for name, value in all_of.items()}
        for run in runs
    ]
    names = list(dict.fromkeys(name for each in flat for name in each))
    differ = [name for name in names if len({each.get(name) for each in flat}) > 1]
    others = [
        [f"<code>{short_html(name)}</code>", *(short_html(each.get(name, "")) for each in flat)] for name in differ
    ]
    columns = ("", *(run.name for run in runs))
    parts = [table_html(columns, rows)]
    if last:
        parts.append(folded(f"Last values ({len(last)})", table_html(columns, last)))
    if others:
        parts.append(f"<h2>Settings that differ</h2>{table_html(columns, others)}")
    if verdicts := _verdict_rows(runs):
        parts.append(f"<h2>Criteria</h2>{table_html(columns, verdicts)}")
    return f'<div class="side">{"".join(parts)}</div>'


def _verdict_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Return a row with the verdicts of all runs for each criterion that applies to one of them."""
    by_name = [{each.name: each.verdict for each in run.criteria} for run in runs]
    names = list(dict.fromkeys(name for each in by_name for name in each))
    applied = [name for name in names if any(each.get(name, "not applicable") != "not applicable" for each in by_name)]
    return [
        [f"<code>{escape(name)}</code>", *(_verdict(each[name]) if name in each else "–" for each in by_name)]
        for name in applied
    ]


def _verdict(verdict: str) -> str:
    return f'<b class="v-{verdict.replace(" ", "-")}">{verdict}</b>'


def glossary_html() -> str:
    """Return the glossary, folded."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in glossary().items())
    return folded("Glossary", f'<dl class="terms">{items}</dl>')


def _foremost(run: RunRecord) -> str:
    """Return the most severe findings of a run that are more than ok."""
    return "<br>".join(escape(each.sentence) for each in in_order(run.findings)[:2] if each.level != "ok")


def _level(run: RunRecord) -> str:
    if not run.findings:
        return '<span class="soft">not judged</span>'
    level = worst_level(run.findings)
    return f'<span class="level {level}">{level}</span>'
