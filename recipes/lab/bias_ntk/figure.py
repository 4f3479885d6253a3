"""The figure of `lightning-conv lab bias_ntk`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from lightning_conv.recipes.lab.bias_ntk.findings import Run
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.theory.papers.bias_ntk import active_probability


def draw(runs: Sequence[Run]) -> Figure:
    """Draw the loss, the share of active units, and the spectrum of the kernel by threshold."""
    figure, (loss, active, kernel) = sheet(13.5, 4, 1, 3)
    for k, r in enumerate(runs):
        colour = f"C{k}"
        loss.semilogy([value / r.losses[0] for value in r.losses], color=colour, label=f"B = {r.threshold:g}")
        loss.semilogy([value / r.predicted[0] for value in r.predicted], color=colour, linestyle=":")
        active.semilogy(r.probed, r.mean_active, color=colour)
        active.axhline(active_probability(r.threshold), color=colour, linestyle=":", linewidth=1)
    loss.plot([], [], "k:", label="linearised, with H(B)")
    dress(loss, "training loss", "step", "F / F(0)")
    active.plot([], [], "k:", linewidth=1, label=r"$1 - \Phi(B)$")
    dress(active, "activation stays sparse", "step", "share of active units")
    grid = torch.linspace(0, max(r.threshold for r in runs), 61).tolist()
    kernel.semilogy(grid, [active_probability(b) for b in grid], color="k", linestyle=":", label=r"$1 - \Phi(B)$")
    thresholds = [r.threshold for r in runs]
    kernel.semilogy(thresholds, [r.smallest.value for r in runs], "o-", label=r"$\lambda_{\min}(H(B))$")
    kernel.semilogy(thresholds, [r.largest for r in runs], "s-", label=r"$\lambda_{\max}(H(B))$")
    dress(kernel, "the kernel shrinks with the activation", "B")
    return figure
