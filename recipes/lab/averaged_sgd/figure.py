"""The figure of `lightning-conv lab averaged_sgd`."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.averaged_sgd.one_pass import Pass
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.papers.averaged_sgd import Decay


def draw(
    eigenvalues: Tensor, decay: Decay, passes: dict[float, list[Pass]], gaps: dict[int, float], width: int
) -> Figure:
    """Draw the spectrum, the errors of the iterates by samples seen, and the distance to the linearisation by width."""
    figure, ((spectrum, clean), (gap, noisy)) = sheet(10, 7, 2, 2)
    values = eigenvalues.flip(0)
    rank = torch.arange(1, len(values) + 1)
    spectrum.plot(rank, values.clamp(min=1e-300), color="tab:blue", linewidth=1.2, label="NTK Gram / n")
    fitted = torch.tensor([decay.first, decay.last], dtype=torch.float64)
    line = f"$i^{{-{decay.beta:.2f}}}$, fitted"
    spectrum.plot(fitted, decay.constant * fitted**-decay.beta, color="black", linestyle="--", label=line)
    dress(spectrum, "Spectrum of the kernel", "index", "eigenvalue", log="xy")
    spectrum.set_ylim(bottom=float(values[values > 0].min()) / 2)

    for axes, (share, runs) in zip((clean, noisy), passes.items(), strict=False):
        for name, curves, colour, style in (
            ("last iterate", [each.last for each in runs], "tab:gray", "-"),
            ("averaged iterate", [each.averaged for each in runs], "tab:blue", "-"),
            ("averaged, linearised", [each.linear for each in runs], "tab:orange", "--"),
        ):
            table = torch.tensor(curves, dtype=torch.float64)
            centre, error = table.mean(0), table.std(0) / math.sqrt(len(table))
            axes.plot(runs[0].steps, centre, color=colour, linestyle=style, label=name)
            axes.fill_between(runs[0].steps, centre - error, centre + error, color=colour, alpha=0.2, linewidth=0)
        title = f"{width} units, {share:.0%} of labels flipped (band: standard error)"
        dress(axes, title, "samples seen", "test error", log="x")

    gap.plot(list(gaps), list(gaps.values()), marker="o", color="tab:blue", label="measured")
    anchor = next(iter(gaps))
    for power, style in ((-0.5, ":"), (-1.0, "--")):
        law = [gaps[anchor] * (m / anchor) ** power for m in gaps]
        gap.plot(list(gaps), law, color="black", linestyle=style, linewidth=1, label=f"$M^{{{power:g}}}$")
    dress(gap, "Network against its linearisation, averaged", "units M", "distance of the outputs", log="xy")
    return figure
