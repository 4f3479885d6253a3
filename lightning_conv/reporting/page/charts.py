"""The charts of a page as data for its script: lines of one run, or of several runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from lightning_conv.reporting.page.panels import (
    FORECAST,
    LOSSES,
    PANELS,
    Drawn,
    Line,
    Panel,
    drawn_lines,
    is_of_module,
    needs_log,
    other_tags,
)
from lightning_conv.reporting.page.run_record import RunRecord
from lightning_conv.reporting.series import numbers_of, points_each

Chart: TypeAlias = dict[str, Any]

MOST_OTHERS = 120
"""Charts of quantities that no panel shows."""


def charts_of(runs: Sequence[RunRecord]) -> tuple[list[Chart], list[Chart]]:
    """Return the charts of the panels, and those of all that was logged beside them.

    Of several runs a chart has the first line of a panel for each; that of the losses two. With several optimizers each has its own charts.

    Args:
        runs: The runs.
    """
    optimizers = list(dict.fromkeys(of for run in runs for of in run.optimizers)) or [""]
    others = list(dict.fromkeys(tag for run in runs for tag in other_tags(run.series, optimizers)))[:MOST_OTHERS]
    rest = [Panel(tag, (Line(tag, tag),), "Logged by the module." if is_of_module(tag) else "") for tag in others]
    # A forecast says nothing without the loss of its own run, which the chart of the losses has.
    panels = [panel for panel in PANELS if panel is not FORECAST or len(runs) == 1]
    wanted = [(panel, of) for of in optimizers for panel in panels]
    most = points_each(len(runs) * (3 * len(wanted) + len(rest)))
    shown = [_chart(panel, runs, of, most) for panel, of in wanted]
    return [each for each in shown if each], [each for panel in rest if (each := _chart(panel, runs, "", most))]


def charts_json(charts: Sequence[Chart]) -> str:
    """Return charts as JSON that may stand in a ``script`` element: there is no ``<`` in it.

    Args:
        charts: The charts.
    """
    text = json.dumps(charts, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chart(panel: Panel, runs: Sequence[RunRecord], optimizer: str, most: int) -> Chart | None:
    """Return a chart; None: nothing was logged."""
    several = len(runs) > 1
    lines = [drawn_lines(panel, run.series, optimizer, most) for run in runs]
    labels = list(dict.fromkeys(line.label for of_run in lines for line in of_run))
    if several:  # one quantity in a color for each run: the one that most of them have
        common = {label: sum(label in [line.label for line in of_run] for of_run in lines) for label in labels}
        labels = sorted(labels, key=lambda label: -common[label])[: 2 if panel is LOSSES else 1]
    found: list[tuple[int, int, str, Drawn]] = [
        (number, labels.index(line.label), runs[number].name, line)
        for number, of_run in enumerate(lines)
        for line in of_run
        if line.label in labels
    ]
    if not found:
        return None
    title = f"{panel.title} ({optimizer})" if optimizer else panel.title
    shown = f"Shown: {labels[0]}{f', and dashed: {labels[1]}' if len(labels) > 1 else ''}. " if several else ""
    return {
        "title": title,
        "about": f"{shown}{panel.about}",
        "log": needs_log(panel.scale, [value for *_, line in found for value in line.numbers]),
        "edge": panel.edge,
        "lines": [
            {
                "label": (f"{name}: {line.label}" if k else name) if several else line.label,
                "color": number if several else k,
                "dash": bool(several and k),
                "x": line.steps,
                "y": _numbers(line.values),
                "lower": _numbers(line.lower),
                "upper": _numbers(line.upper),
            }
            for number, k, name, line in found
        ],
    }


def _numbers(values: Sequence[float] | None) -> list[float | None] | None:
    return None if values is None else numbers_of(values)
