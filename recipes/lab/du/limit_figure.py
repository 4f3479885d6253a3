"""The figure of `lightning-conv lab du`."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.du.limit_findings import Case
from lightning_conv.recipes.lab.panel import dress, sheet

COLOURS = {"FC": "tab:blue", "ResNet": "tab:orange", "ConvResNet": "tab:green"}


def draw(cases: list[Case], threshold: float) -> Figure:
    """Draw the z-scores of all entries, and means against limits."""
    figure, (scores, entries) = sheet(11, 4.4, 1, 2)
    generator = np.random.default_rng(0)
    for place, case in enumerate(cases):
        colour, shift = COLOURS[case.network], generator.uniform(-0.25, 0.25, len(case.z(case.limit.matrix)))
        label = case.network if case.depth == cases[0].depth else None
        scores.plot(place + shift, case.z(case.limit.matrix), "o", color=colour, markersize=4, alpha=0.7, label=label)
        upper = torch.triu_indices(*case.limit.matrix.shape)
        size = float(case.limit.matrix.diagonal().mean())
        pairs = [(m / size)[upper[0], upper[1]].numpy() for m in (case.limit.matrix, case.draws.mean(0))]
        error = 2 * (case.standard_errors / size)[upper[0], upper[1]].numpy()
        entries.errorbar(*pairs, yerr=error, fmt="o", color=colour, markersize=3, elinewidth=0.8, label=label)
    for level in (-threshold, threshold):
        scores.axhline(level, color="black", linestyle=":", linewidth=1)
    scores.set_ylim(-1.25 * threshold, 1.45 * threshold)  # room for the legend
    scores.set_xticks(range(len(cases)), [f"H = {case.depth}" for case in cases], fontsize=8)
    scores.legend(frameon=False, fontsize=8, loc="upper center", ncols=3)
    ends = entries.get_xlim()
    entries.plot(ends, ends, color="black", linewidth=0.8, zorder=0)
    entries.legend(frameon=False, fontsize=9, loc="upper left")
    dress(scores, f"z of every entry (dotted: {threshold:.2f})", "", "(mean - K) / standard error")
    dress(entries, "mean of G^(H) (bars: 2 standard errors) against K^(H)", "K_ij / mean K_ii", "mean G_ij / mean K_ii")
    return figure
