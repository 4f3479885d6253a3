"""The figure of `lightning-conv lab du --depth`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.du.depth_findings import Depth
from lightning_conv.recipes.lab.panel import dress
from lightning_conv.reporting.plots import new_figure

COLOURS = {"softplus": "tab:blue", "tanh": "tab:red", "relu": "tab:green"}


def draw(found: Sequence[Depth]) -> Figure:
    """Sensitivity, lambda_0, the distance to the limit and the cost, against depth."""
    figure = new_figure()
    figure.set_size_inches(11, 8)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.07, top=0.955, hspace=0.28, wspace=0.22)
    sensitivity, smallest, gap, cost = figure.subplots(2, 2).flat
    for act, colour in COLOURS.items():
        for net, style in (("FC", "o-"), ("ResNet", "s--")):
            each = _chosen(found, net, act)
            depths = [d.depth for d in each]
            sensitivity.plot(
                depths, [d.sensitivity for d in each], style, color=colour, label=f"{net}, {act}", markersize=4
            )
            gap.plot(depths, [d.gap for d in each], style, color=colour, markersize=4)
            clear = [d for d in each if d.resolved]
            smallest.plot(
                [d.depth for d in clear],
                [d.limit.lambda_0.value / d.diagonal for d in clear],
                style,
                color=colour,
                markersize=4,
            )
            unclear = [d for d in each if not d.resolved]
            smallest.plot(
                [d.depth for d in unclear],
                [d.limit.lambda_0.upper / d.diagonal for d in unclear],
                "v",
                color=colour,
                mfc="none",
            )
            cost.plot([d.depth for d in clear], [d.cost for d in clear], style, color=colour, markersize=4)
            cost.plot([d.depth for d in unclear], [d.cost for d in unclear], "^", color=colour, mfc="none")
    bounds = _chosen(found, "FC", "tanh")
    limits = sensitivity.get_ylim()
    sensitivity.plot(
        [d.depth for d in bounds], [d.bound for d in bounds], ":", color="black", label="Lemma B.3 (FC, tanh)"
    )
    sensitivity.set_ylim(0.7, 30 * limits[1])
    for axes in (sensitivity, smallest, gap, cost):
        _logarithmic(axes, sorted({d.depth for d in found}))
    handles, _ = sensitivity.get_legend_handles_labels()
    sensitivity.legend(handles=handles[-1:], frameon=False, fontsize=9, loc="upper right")
    smallest.legend(handles=handles[:-1], frameon=False, fontsize=8, loc="lower left")
    gap.set_yscale("linear")
    gap.set_ylim(0, None)
    dress(sensitivity, "movement of the last features per R", "depth H", "sqrt(m) |d x^(H) / d W|_2")
    dress(smallest, "lambda_0 of the limit kernel (hollow: at most)", "depth H", "lambda_0 / mean of K_ii")
    dress(gap, "finite width at the start", "depth H", "|G(0) - K|_2 / |K|_2")
    dress(
        cost,
        "cost: sensitivity over relative lambda_0 (hollow: at least)",
        "depth H",
        "sensitivity * mean K_ii / lambda_0",
    )
    return figure


def _chosen(found: Sequence[Depth], network: str, activation: str) -> list[Depth]:
    return [each for each in found if (each.network, each.activation) == (network, activation)]


def _logarithmic(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(np.array(depths), [str(h) for h in depths])
