"""The figure of `lightning-conv lab linear_regions`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.linear_regions.findings import Run
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.papers.linear_regions import LinearRegions, most_regions, typical_regions


def draw(runs: Sequence[Run], folded: dict[int, LinearRegions], x: Tensor, y: Tensor) -> Figure:
    """Draw the fits with their kinks, and the number of pieces by depth."""
    figure, (fit, by_depth) = sheet(13.5, 4, 1, 2, width_ratios=(1.6, 1))
    shown = [r for r in runs if r.curve is not None]
    fit.plot(x[:, 0], y[:, 0], color="0.7", linewidth=4, label="target")
    for k, r in enumerate(shown):
        assert r.curve is not None
        label = f"{len(r.widths)} hidden layer" + "s" * (len(r.widths) > 1)
        fit.plot(r.curve[:, 0], r.curve[:, 1], color=f"C{k}", linewidth=1.1, label=label)
        inside = [kink for kink in r.end.kinks if -0.1 < kink < 1.1]
        fit.plot(inside, [-1.35 - 0.14 * k] * len(inside), "|", color=f"C{k}", markersize=8)
    dress(fit, "fits and their kinks", "x (ticks below: kinks of each network)", "f(x)")
    fit.set_ylim(-1.8, 1.9)
    depths = sorted({len(r.widths) for r in runs})
    for r in runs:
        shift = 0.08 * (r.seed % 5 - 2)
        by_depth.plot(len(r.widths) + shift, r.start.pieces, "o", color="C0", markersize=4, mfc="none")
        by_depth.plot(len(r.widths) + shift, r.end.pieces, "o", color="C1", markersize=4)
    width = runs[0].widths[0]
    by_depth.plot(depths, [most_regions([width] * d) for d in depths], "k-", label="most possible")
    by_depth.plot(depths, [typical_regions([width] * d) for d in depths], "k:", label="sum of widths + 1")
    pieces = [f.pieces for f in folded.values()]
    by_depth.plot(list(folded), pieces, "x--", color="C2", label="folding network, width 2")
    by_depth.plot([], [], "o", color="C0", mfc="none", label="start")
    by_depth.plot([], [], "o", color="C1", label="trained")
    dress(by_depth, "pieces by depth", "hidden layers", "linear pieces", log="y")
    return figure
