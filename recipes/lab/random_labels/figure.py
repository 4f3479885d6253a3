"""The figure of `lightning-conv lab random_labels`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.recipes.lab.random_labels.findings import Fit

COLOURS = {"true": "tab:blue", "random": "tab:red"}


def draw(fits: dict[str, Fit], eigenvalues: Tensor) -> Figure:
    """Draw the errors, measured and predicted, the wrong signs, and the labels on the eigenvectors."""
    figure, (error, wrong, energy) = sheet(12, 4.2, 1, 3)
    for name, fit in fits.items():
        colour, scale = COLOURS[name], float(fit.labels.norm())
        k = np.arange(len(fit.track.residuals)) + 1
        measured, label = np.array(fit.track.residuals) / scale, f"{name} labels"
        error.plot(k, measured, color=colour, linewidth=3, alpha=0.45, label=f"{label}, measured")
        predicted = fit.predicted.numpy() / scale
        error.plot(k, predicted, color=colour, linestyle="--", linewidth=1.3, label=f"{label}, predicted")
        wrong.plot(k, np.array(fit.track.wrong) / len(fit.labels), color=colour, label=label)
        energy.plot(np.arange(1, len(fit.shares) + 1), fit.shares.cumsum(0).numpy(), color=colour, label=label)
    shares = (eigenvalues.cumsum(0) / eigenvalues.sum()).numpy()
    energy.plot(np.arange(1, len(shares) + 1), shares, ":k", label="eigenvalues")
    step, title = "step k + 1", "labels on the eigenvectors of H_inf"
    dress(error, "the error, measured and predicted", step, "|u(k) - y| / |y|", log="x", legend="lower left")
    dress(wrong, "training error", step, "share of wrong signs", log="x")
    dress(energy, title, "eigenvector, by eigenvalue", "cumulative share of |y|^2", log="x")
    error.set_ylim(0, None)
    wrong.set_ylim(0, None)
    energy.set_ylim(0, 1.05)
    return figure
