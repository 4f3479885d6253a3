"""The figure of `lightning-conv lab random_labels`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.panel import dress
from lightning_conv.recipes.lab.random_labels.findings import Fit
from lightning_conv.reporting.plots import new_figure

COLOURS = {"true": "tab:blue", "random": "tab:red"}


def draw(fits: dict[str, Fit], eigenvalues: Tensor) -> Figure:
    figure = new_figure()
    figure.set_size_inches(12, 4.2)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.13, top=0.92, wspace=0.24)
    error, wrong, energy = figure.subplots(1, 3)
    for name, fit in fits.items():
        colour, scale = COLOURS[name], float(fit.labels.norm())
        k = np.arange(len(fit.track.residuals)) + 1
        error.plot(
            k,
            np.array(fit.track.residuals) / scale,
            color=colour,
            linewidth=3,
            alpha=0.45,
            label=f"{name} labels, measured",
        )
        error.plot(
            k,
            fit.predicted.numpy() / scale,
            color=colour,
            linestyle="--",
            linewidth=1.3,
            label=f"{name} labels, predicted",
        )
        wrong.plot(k, np.array(fit.track.wrong) / len(fit.labels), color=colour, label=f"{name} labels")
        energy.plot(
            np.arange(1, len(fit.shares) + 1), fit.shares.cumsum(0).numpy(), color=colour, label=f"{name} labels"
        )
    energy.plot(
        np.arange(1, len(eigenvalues) + 1),
        (eigenvalues.cumsum(0) / eigenvalues.sum()).numpy(),
        ":k",
        label="eigenvalues",
    )
    for axes in (error, wrong):
        axes.set_xscale("log")
        axes.set_ylim(0, None)
    error.legend(frameon=False, fontsize=8, loc="lower left")
    for axes in (wrong, energy):
        axes.legend(frameon=False, fontsize=9)
    dress(error, "the error, measured and predicted", "step k + 1", "|u(k) - y| / |y|")
    dress(wrong, "training error", "step k + 1", "share of wrong signs")
    dress(energy, "labels on the eigenvectors of H_inf", "eigenvector, by eigenvalue", "cumulative share of |y|^2")
    energy.set_xscale("log")
    energy.set_ylim(0, 1.05)
    return figure
