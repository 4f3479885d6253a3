"""``run_page`` and ``compare_page``: one HTML file about a run, or about several, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files

from lightning_conv.reporting.page.charts import Chart, charts_json, charts_of
from lightning_conv.reporting.page.glossary import glossary
from lightning_conv.reporting.page.html_elements import folded
from lightning_conv.reporting.page.html_parts import (
    charts_html,
    criteria_html,
    facts_html,
    glossary_html,
    layers_html,
    long_facts_html,
    measured_html,
    overview_html,
    seconds_html,
    settings_html,
    status_html,
    words_html,
)
from lightning_conv.reporting.page.run_record import RunRecord

LICENSE = "uPlot 1.6.32, (c) 2022 Leon Sorokin, MIT License: lightning_conv/reporting/page/uplot_license.txt"
"""Of the library that draws the charts, beside its own first line."""


def run_page(run: RunRecord, *, no_figure: str = "") -> str:
    """Return the page of a run.

    It has the findings in plain words, the figure of six panels, the charts, the criteria, the layers, the last values, settings and
    versions, the time spent measuring, and the glossary. It is light or dark as the reader's system is, or as chosen on it. Without a
    script all of it but the charts can be read.

    Args:
        run: The run.
        no_figure: Why the figure is left out, in a sentence; empty: it is drawn.

    Returns:
        HTML, which loads nothing: style, script and data are in it, and its security policy forbids all else.

    Cost: up to half a second for the figure of each network; 20 ms without it.
    """
    charts, others = charts_of([run])
    parts = [
        "<h2>In plain words</h2>",
        words_html(run),
        "<h2>The run in one picture</h2>",
        f'<p class="soft">{escape(no_figure)}</p>' if no_figure else status_html(run, salt="run"),
        _charts(charts, others),
        layers_html(run),
        f"<h2>Criteria</h2>{long_facts_html(run)}{criteria_html(run.criteria)}"
        if run.criteria
        else long_facts_html(run),
        f"<h2>Labels</h2><pre>{escape(run.labels)}</pre>" if run.labels else "",
        seconds_html(run),
        "<h2>Details</h2>",
        measured_html(run),
        settings_html(run),
    ]
    return _document(f"Convergence of {run.name}", facts_html(run), "".join(parts), [*charts, *others])


def compare_page(runs: Sequence[RunRecord]) -> str:
    """Return a page with several runs side by side: an overview, charts with a line for each run, and what is known of each.

    Args:
        runs: The runs, with different names.

    Raises:
        ValueError: There is no run, or two have one name.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ValueError(f"runs: {names}; need one run or more, with different names")
    charts, others = charts_of(runs)
    details = [
        folded(
            run.name,
            "".join(
                [
                    facts_html(run),
                    words_html(run),
                    status_html(run, salt=f"run{number}"),
                    layers_html(run),
                    long_facts_html(run),
                    criteria_html(run.criteria),
                    seconds_html(run),
                    settings_html(run),
                ]
            ),
            is_open=len(runs) == 1,
        )
        for number, run in enumerate(runs)
    ]
    parts = [
        "<h2>Side by side</h2>",
        overview_html(runs),
        _charts(charts, others),
        "<h2>Each run</h2>",
        *details,
    ]
    return _document(f"Convergence of {len(runs)} runs", "", "".join(parts), [*charts, *others])


def _charts(charts: Sequence[Chart], others: Sequence[Chart]) -> str:
    """Return the places of the charts, those of no panel folded."""
    parts = ["<noscript><p>The charts need a script, which is in this file.</p></noscript>"]
    if charts:
        parts = ["<h2>Charts</h2>", *parts, charts_html([(each["title"], each["about"]) for each in charts], 0)]
    if others:
        places = charts_html([(each["title"], each["about"]) for each in others], len(charts))
        parts.append(folded(f"All other quantities ({len(others)})", places))
    return (
        "".join(parts) if charts or others else '<p class="soft">There is nothing to draw: no quantity was logged.</p>'
    )


def _document(title: str, head: str, body: str, charts: Sequence[Chart]) -> str:
    style = f"{_asset('uplot.min.css')}\n{_asset('page.css')}"
    scripts = (f"/*! {LICENSE} */\n{_asset('uplot.min.js')}", _asset("page.js"))
    allowed = " ".join(f"'sha256-{_digest(each)}'" for each in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
    terms = json.dumps(glossary(), ensure_ascii=False).replace("<", "\\u003c")
    page = "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            f'<header><div><h1>{escape(title)}</h1>{head}</div><button type="button" id="theme">Dark</button></header>',
            f"<main>{body}{glossary_html()}</main>",
            "<footer>Written by lightning_conv. Dotted words are explained where the pointer rests on them.</footer>",
            '<div id="tip" role="tooltip"></div>',
            f'<script type="application/json" id="data-charts">{charts_json(charts)}</script>',
            f'<script type="application/json" id="data-terms">{terms}</script>',
            *(f"<script>{each}</script>" for each in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a name may have a character that no file can have


@cache
def _asset(name: str) -> str:
    return (files(__package__) / name).read_text("utf-8")


def _digest(script: str) -> str:
    """Return the hash by which a security policy allows a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
