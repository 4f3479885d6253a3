"""The figure of `lightning-conv lab linear_regions`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.linear_regions.findings import Run
from lightning_conv.theory.papers.linear_regions import LinearRegions, most_regions, typical_regions


def draw(runs: Sequence[Run], folded: dict[int, LinearRegions], x: Tensor, y: Tensor) -> Figure:
    figure = Figure(figsize=(13.5, 4), layout="constrained")
    fit, by_depth = figure.subplots(1, 2, width_ratios=(1.6, 1))
    shown = [r for r in runs if r.curve is not None]
    fit.plot(x[:, 0], y[:, 0], color="0.7", linewidth=4, label="target")
    for k, r in enumerate(shown):
        assert r.curve is not None
        fit.plot(
            r.curve[:, 0],
            r.curve[:, 1],
            color=f"C{k}",
            linewidth=1.1,
            label=f"{len(r.widths)} hidden layer" + "s" * (len(r.widths) > 1),
        )
        inside = [kink for kink in r.end.kinks if -0.1 < kink < 1.1]
        fit.plot(inside, [-1.35 - 0.14 * k] * len(inside), "|", color=f"C{k}", markersize=8)
    fit.set(
        xlabel="x (ticks below: kinks of each network)", ylabel="f(x)", title="fits and their kinks", ylim=(-1.8, 1.9)
    )
    depths = sorted({len(r.widths) for r in runs})
    for r in runs:
        shift = 0.08 * (r.seed % 5 - 2)
        by_depth.plot(len(r.widths) + shift, r.start.pieces, "o", color="C0", markersize=4, mfc="none")
        by_depth.plot(len(r.widths) + shift, r.end.pieces, "o", color="C1", markersize=4)
    width = runs[0].widths[0]
    by_depth.plot(depths, [most_regions([width] * d) for d in depths], "k-", label="most possible")
    by_depth.plot(depths, [typical_regions([width] * d) for d in depths], "k:", label="sum of widths + 1")
    by_depth.plot(
        list(folded), [f.pieces for f in folded.values()], "x--", color="C2", label="folding network, width 2"
    )
    by_depth.plot([], [], "o", color="C0", mfc="none", label="start")
    by_depth.plot([], [], "o", color="C1", label="trained")
    by_depth.set(yscale="log", xlabel="hidden layers", ylabel="linear pieces", title="pieces by depth")
    for axes in (fit, by_depth):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, fontsize=8, ncols=2 if axes is fit else 1)
        axes.title.set_fontsize(10)
    return figure
