"""The figure of `lightning-conv lab oymak`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.oymak.findings import Case
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.papers.oymak import misfits


def draw(cases: Sequence[Case]) -> Figure:
    """Draw misfit against distance with the line, for the proven constants and for those of the first Jacobian."""
    figure, panels = sheet(11, 4.4, 1, 2)
    for axes, chosen, title in zip(
        panels, (cases[:1], cases[1:]), ("constants proven", "constants of the first Jacobian"), strict=True
    ):
        claimed = chosen[0].claimed
        farthest = max(
            1.3 * float(case.path.lengths[-1]) if case is cases[0] else 1.3 * float(case.path.distances.max())
            for case in chosen
        )
        reach = np.linspace(0, farthest, 50)
        for share, style, label in ((4, "-", "the line"), (2, ":", "halved constants")):
            line = claimed.misfit - claimed.alpha * reach / share
            axes.plot(reach, line, style, color="black", label=f"{label}: |r_0| - alpha d / {share}")
        for case, colour in zip(chosen, ("tab:blue",) if len(chosen) == 1 else ("tab:orange", "tab:red"), strict=True):
            r = misfits(case.path, 1.0).numpy()
            axes.plot(case.path.distances.numpy(), r, color=colour, label=f"{case.name}: distance")
            if len(chosen) == 1:
                axes.plot(case.path.lengths.numpy(), r, color=colour, linestyle="--", label="path length")
        axes.set_ylim(0, 1.75 * claimed.misfit)
        axes.set_xlim(0, farthest)
        along = "d: distance |theta_k - theta_0|" + (" or path length" if len(chosen) == 1 else "")
        dress(axes, title, along, "misfit |r_k|", legend="upper right")
    return figure
