"""The figure of `lightning-conv lab frei`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_conv.recipes.lab.frei.findings import Run
from lightning_conv.recipes.lab.panel import dress, sheet


def draw(runs: Sequence[Run]) -> Figure:
    """Draw stable ranks and margins along the runs, one row per slope."""
    slopes = sorted({r.slope for r in runs}, reverse=True)
    figure, panels = sheet(10.5, 3.6 * len(slopes), len(slopes), 2, squeeze=False)
    names = list(dict.fromkeys(r.data.name for r in runs))
    for row, slope in zip(panels, slopes, strict=True):
        for r in (r for r in runs if r.slope == slope):
            style = {"color": f"C{names.index(r.data.name)}", "linestyle": "-" if r.covered else "--", "linewidth": 1.4}
            steps = [max(step, 0.5) for step in r.steps]
            row[0].plot(steps, r.stable_ranks, label=r.data.name + ("" if r.covered else " (not applicable)"), **style)
            row[1].plot(steps, r.spreads, **style)
        kind = f"leaky ReLU, gamma = {slope:g}" if slope else "ReLU"
        step = "step (0.5 stands for the start)"
        dress(row[0], kind, step, r"stable rank $|W|_F^2 / |W|_2^2$", log="xy")
        dress(row[1], kind, step, "smallest / largest margin", log="x")
        row[1].set_ylim(-0.05, 1.05)
    return figure
