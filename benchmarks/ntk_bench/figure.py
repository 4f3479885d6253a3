"""The figure: one line per case, one mark per method, logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from peers.methods import Method

from ntk_bench.measure import CaseResult

BLUES = ("#08306b", "#2171b5", "#6baed6")  # the colours of this library
COLOURS = ("C1", "C2", "C3", "C4", "C5", "C6", "C8")
MARKS = "s^vDP*X"


def draw(results: Sequence[CaseResult], methods: Sequence[Method], path: Path) -> bool:
    """Write the chart of the seconds; return False if there is nothing to show."""
    shown = [m for m in methods if any(r.outcomes[m.name].median is not None for r in results)]
    if not shown:
        return False
    figure = Figure(figsize=(9.0, 1.6 + 0.36 * len(results)), dpi=110, layout="constrained")
    axes = figure.subplots()
    ours = peers = 0
    for method in shown:
        if method.ours:
            style = {"marker": "o", "color": BLUES[ours % 3], "markersize": 9 - 2 * ours, "zorder": 4}
            ours += 1
        else:
            style = {"marker": MARKS[peers % 7], "color": COLOURS[peers % 7], "markersize": 6, "zorder": 3}
            peers += 1
        points = [(r.outcomes[method.name].median, i) for i, r in enumerate(results)]
        points = [(seconds, i) for seconds, i in points if seconds is not None]
        axes.plot(*zip(*points, strict=True), linestyle="none", label=method.label, alpha=0.9, **style)
    for i, result in enumerate(results):
        times = [o.median for o in result.outcomes.values() if o.median is not None]
        if times:
            axes.plot((min(times), max(times)), (i, i), color="0.8", linewidth=1, zorder=1)
    axes.set_xscale("log")
    axes.set_xlabel("seconds (median)")
    axes.set_yticks(range(len(results)), [r.case.title for r in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.25)
    figure.legend(fontsize=8, ncols=4, loc="outside upper center", frameon=False)
    figure.savefig(path)
    return True
