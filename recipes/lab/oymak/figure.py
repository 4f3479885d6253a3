"""The figure of `lightning-conv lab oymak`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.oymak.findings import Case
from lightning_conv.recipes.lab.panel import dress
from lightning_conv.reporting.plots import new_figure
from lightning_conv.theory.papers.oymak import misfits


def draw(cases: Sequence[Case]) -> Figure:
    figure = new_figure()
    figure.set_size_inches(11, 4.4)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.13, top=0.92, wspace=0.2)
    panels = figure.subplots(1, 2)
    for axes, chosen, title in zip(
        panels, (cases[:1], cases[1:]), ("constants proven", "constants of the first Jacobian"), strict=True
    ):
        claimed = chosen[0].claimed
        farthest = max(
            1.3 * float(case.path.lengths[-1]) if case is cases[0] else 1.3 * float(case.path.distances.max())
            for case in chosen
        )
        reach = np.linspace(0, farthest, 50)
        axes.plot(
            reach, claimed.misfit - claimed.alpha * reach / 4, color="black", label="the line: |r_0| - alpha d / 4"
        )
        axes.plot(
            reach,
            claimed.misfit - claimed.alpha * reach / 2,
            color="black",
            linestyle=":",
            label="halved constants: |r_0| - alpha d / 2",
        )
        for case, colour in zip(chosen, ("tab:blue",) if len(chosen) == 1 else ("tab:orange", "tab:red"), strict=True):
            r = misfits(case.path, 1.0).numpy()
            axes.plot(case.path.distances.numpy(), r, color=colour, label=f"{case.name}: distance")
            if len(chosen) == 1:
                axes.plot(case.path.lengths.numpy(), r, color=colour, linestyle="--", label="path length")
        axes.set_ylim(0, 1.75 * claimed.misfit)
        axes.set_xlim(0, farthest)
        along = "d: distance |theta_k - theta_0|" + (" or path length" if len(chosen) == 1 else "")
        dress(axes, title, along, "misfit |r_k|")
        axes.legend(fontsize=8, loc="upper right")
    return figure
