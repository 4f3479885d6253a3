"""The figure of `lightning-conv lab frei`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_conv.recipes.lab.frei.findings import Run


def draw(runs: Sequence[Run]) -> Figure:
    """Stable ranks and margins along the runs, a row a slope."""
    slopes = sorted({r.slope for r in runs}, reverse=True)
    figure = Figure(figsize=(10.5, 3.6 * len(slopes)), layout="constrained")
    panels = figure.subplots(len(slopes), 2, squeeze=False)
    names = list(dict.fromkeys(r.data.name for r in runs))
    for row, slope in zip(panels, slopes, strict=True):
        for r in (r for r in runs if r.slope == slope):
            style = {"color": f"C{names.index(r.data.name)}", "linestyle": "-" if r.covered else "--", "linewidth": 1.4}
            steps = [max(step, 0.5) for step in r.steps]
            row[0].plot(steps, r.stable_ranks, label=r.data.name + ("" if r.covered else " (not applicable)"), **style)
            row[1].plot(steps, r.spreads, **style)
        kind = f"leaky ReLU, gamma = {slope:g}" if slope else "ReLU"
        row[0].set(xscale="log", yscale="log", ylabel=r"stable rank $|W|_F^2 / |W|_2^2$", title=kind)
        row[1].set(xscale="log", ylim=(-0.05, 1.05), ylabel="smallest / largest margin", title=kind)
        row[0].legend(frameon=False, fontsize=8)
        for axes in row:
            axes.set_xlabel("step (0.5 stands for the start)")
            axes.grid(visible=True, alpha=0.3)
            axes.title.set_fontsize(10)
    return figure
