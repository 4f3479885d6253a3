"""The figure of `lightning-conv lab du_depth`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.du.depth_findings import Depth, of
from lightning_conv.recipes.lab.panel import dress, sheet

COLOURS = {"softplus": "tab:blue", "tanh": "tab:red", "relu": "tab:green"}


def draw(found: Sequence[Depth]) -> Figure:
    """Draw sensitivity, lambda_0, the distance to the limit and the cost, against depth."""
    figure, ((sensitivity, smallest), (gap, cost)) = sheet(11, 8, 2, 2)
    for act, colour in COLOURS.items():
        for net, style in (("FC", "o-"), ("ResNet", "s--")):
            each = of(found, net, act)
            depths, filled = [d.depth for d in each], {"color": colour, "markersize": 4}
            sensitivity.plot(depths, [d.sensitivity for d in each], style, label=f"{net}, {act}", **filled)
            gap.plot(depths, [d.gap for d in each], style, **filled)
            clear, unclear = ([d for d in each if d.resolved is known] for known in (True, False))
            depths, hollow = [d.depth for d in clear], {"color": colour, "mfc": "none"}
            smallest.plot(depths, [d.limit.lambda_0.value / d.diagonal for d in clear], style, **filled)
            cost.plot(depths, [d.cost for d in clear], style, **filled)
            depths = [d.depth for d in unclear]
            smallest.plot(depths, [d.limit.lambda_0.upper / d.diagonal for d in unclear], "v", **hollow)
            cost.plot(depths, [d.cost for d in unclear], "^", **hollow)
    bounds = of(found, "FC", "tanh")
    limits = sensitivity.get_ylim()
    lemma = [d.bound for d in bounds]
    sensitivity.plot([d.depth for d in bounds], lemma, ":", color="black", label="Lemma B.3 (FC, tanh)")
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
    title = "cost: sensitivity over relative lambda_0 (hollow: at least)"
    dress(cost, title, "depth H", "sensitivity * mean K_ii / lambda_0")
    return figure


def _logarithmic(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(np.array(depths), [str(h) for h in depths])
