"""The figure of `lightning-conv lab linear_networks`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.linear_networks.findings import Drift, Path
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.tools.power_law import PowerLaw


def draw(drifts: Sequence[Drift], law: PowerLaw, paths: Sequence[Path], modes: Tensor, exact: Tensor) -> Figure:
    """Draw the drift of the balancedness by step size, modes in closed form, and the rank of the product by depth."""
    figure, (balance, mode, rank) = sheet(13.5, 4, 1, 3)
    etas = [d.eta for d in drifts]
    balance.loglog(
        etas, [d.moved for d in drifts], "o-", label=rf"$\max|D(T) - D(0)|_2 \sim \eta^{{{law.exponent:.2f}}}$"
    )
    balance.loglog(etas, [d.bound for d in drifts], "s--", color="0.5", label=r"bound $\sum \eta^2 \max|G|_F^2$")
    dress(balance, "balancedness at a fixed time", r"step size $\eta$")
    balance.set_xticks(etas, [f"{eta:g}" for eta in etas])
    balance.minorticks_off()
    for k in range(exact.shape[1]):
        mode.plot(modes[:, 0], modes[:, k + 1], color=f"C{k}", linewidth=1.4)
        mode.plot(modes[:, 0], exact[:, k], "k:", linewidth=1)
    mode.plot([], [], "k:", label="closed form")
    title = "two layers, aligned start: one mode after the other"
    dress(mode, title, "time", "singular values of the product")
    for path in paths:
        rank.plot([loss / path.loss[0] for loss in path.loss], path.rank, label=f"L = {path.depth}")
    title = "depth: lower rank on the way"
    dress(rank, title, "loss / loss at the start", "effective rank of the product")
    rank.invert_xaxis()
    return figure
