"""The figure: one group of bars a case, one colour a method, logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from peers.methods import Method

from ntk_bench.measure import CaseResult


def draw(results: Sequence[CaseResult], methods: Sequence[Method], path: Path) -> bool:
    """Write the bar chart of the seconds; False if there is nothing to show."""
    shown = [m for m in methods if any(r.outcomes[m.name].median is not None for r in results)]
    if not shown:
        return False
    figure = Figure(figsize=(max(7.0, 1.1 * len(results)), 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(shown)
    for k, method in enumerate(shown):
        # Blue belongs to this library.
        colour = ("#08306b", "#4292c6")[k % 2] if method.ours else f"C{k % 9 + 1}"
        at = [i + (k - (len(shown) - 1) / 2) * width for i in range(len(results))]
        axes.bar(at, [r.outcomes[method.name].median or 0.0 for r in results], width, label=method.label, color=colour)
    axes.set_yscale("log")
    axes.set_ylabel("seconds (median)")
    axes.set_xticks(range(len(results)), [r.case.name for r in results], rotation=35, ha="right")
    axes.grid(axis="y", which="both", alpha=0.25)
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path)
    return True
