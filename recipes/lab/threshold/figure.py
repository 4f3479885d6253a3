"""The figure of `lightning-conv lab threshold`."""

from __future__ import annotations

import statistics

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.recipes.lab.threshold.findings import StraightThrough
from lightning_conv.theory.papers.threshold import Arrangement, ThresholdOptimum


def draw(
    plane: Tensor,
    targets: Tensor,
    arrangement: Arrangement,
    optima: dict[float, ThresholdOptimum],
    trained: dict[float, list[StraightThrough]],
) -> Figure:
    """Draw how far the trained networks stay above the optimum, and the output of one optimal network."""
    figure, (left, right) = sheet(10, 4, 1, 2, width_ratios=(1.3, 1))
    generator = torch.Generator().manual_seed(0)
    ticks, place = [], 0.0
    for beta, widths in trained.items():
        for k, each in enumerate(widths):
            excess = [100 * value for value in each.excess(optima[beta])]
            spread = place + 0.5 * (torch.rand(len(excess), generator=generator) - 0.5)
            label = f"{each.width} units" if beta == next(iter(trained)) else None
            left.scatter(spread, excess, s=14, alpha=0.7, color=f"C{k}", label=label)
            left.hlines(statistics.median(excess), place - 0.35, place + 0.35, color="black", linewidth=1)
            sampled = "convex program, random patterns" if label and each is widths[-1] else None
            above = 100 * each.sampled_excess(optima[beta])
            left.plot(place, above, "kD", markersize=5, fillstyle="none", label=sampled)
            place += 1
        ticks.append((place - (len(widths) + 1) / 2, f"beta = {beta:g}\noptimum: {optima[beta].units} units"))
        place += 1
    left.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
    title = "Straight-through runs (line: median)"
    dress(left, title, "", "objective above the certified optimum, %")
    left.set_yscale("symlog", linthresh=1)
    left.set_ylim(bottom=-0.1)
    left.axhline(0, color="black", linewidth=0.8)

    beta = sorted(optima)[len(optima) // 2]
    axis = torch.linspace(-1.2, 1.2, 400, dtype=torch.float64)
    first, second = torch.meshgrid(axis, axis, indexing="xy")
    grid = torch.stack([first.flatten(), second.flatten(), torch.ones(first.numel(), dtype=torch.float64)], 1)
    used = optima[beta].weights != 0
    values = (grid @ arrangement.directions[:, used] >= 0).double() @ optima[beta].weights[used]
    style = {"cmap": "coolwarm", "vmin": -1.3, "vmax": 1.3, "alpha": 0.8, "rasterized": True}
    shown = right.pcolormesh(axis, axis, values.reshape(first.shape), **style)
    for target, marker, name in ((-1.0, "o", "3"), (1.0, "s", "8")):
        chosen = targets == target
        colour = "tab:blue" if target < 0 else "tab:red"
        right.scatter(*plane[chosen].T, marker=marker, color=colour, edgecolor="white", label=f"digit {name}")
    figure.colorbar(shown, ax=right, label="output of the optimal network")
    dress(right, f"A global optimum, beta = {beta:g}", "first principal component", "second principal component")
    right.legend(frameon=True, fontsize=8, loc="lower left")
    return figure
