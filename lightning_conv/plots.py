"""Matplotlib figures of the numbers, 4 x 3.2 inches at 100 dpi: readable in a TensorBoard card."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_conv.spectrum import Spectrum

SIZE_INCHES = (4.0, 3.2)
DPI = 100


def new_figure() -> Figure:
    """An empty figure of the house's size, outside pyplot's global state."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI)
    # Fixed margins: a layout engine draws every figure twice.
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.15, top=0.96)
    FigureCanvasAgg(figure)
    return figure


def plot_spectra(spectra: Mapping[str, Spectrum]) -> Figure:
    """Eigenvalues in descending order on a logarithmic axis, one line a spectrum, with the error bounds of the smallest one.

    Eigenvalues at or below zero (rounding) are left out; the bar shows where the smallest one lies.

    Raises:
        ValueError: a spectrum without all of its eigenvalues.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for label, spectrum in spectra.items():
        values = spectrum.all_eigenvalues("plot_spectra").flip(0).cpu().numpy()
        index = np.arange(1, len(values) + 1)
        positive = values > 0
        (line,) = axes.plot(index[positive], values[positive], linewidth=1.2, label=label)
        smallest = spectrum.lambda_min
        if smallest.value > 0:
            bars = [[smallest.value - smallest.lower], [smallest.upper - smallest.value]]
            axes.errorbar(
                [len(values)], [smallest.value], yerr=bars, color=line.get_color(), capsize=3, fmt="o", markersize=3
            )
    axes.set_yscale("log")
    axes.set_xlabel("index")
    axes.set_ylabel("eigenvalue of the kernel")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    return figure
