"""Matplotlib figures of the measured numbers, 4 x 3.2 inches at 100 dpi, which is readable in a TensorBoard card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.linalg.spectrum import Bounded, Spectrum
from lightning_conv.reporting.log_axis import use_log_scale
from lightning_conv.theory.tools.observation import Observation

SIZE_INCHES = (4.0, 3.2)
DPI = 100

MOST_BARS = 12
LONGEST_NAME = 16
"""Number of characters of a layer's name that fit next to the bars."""


def new_figure() -> Figure:
    """Create an empty figure of the common size, outside pyplot's global state.

    Returns:
        The figure, without axes.
    """
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI)
    # Fixed margins, because a layout engine draws every figure twice.
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.15, top=0.96)
    FigureCanvasAgg(figure)
    return figure


def plot_spectra(spectra: Mapping[str, Spectrum]) -> Figure:
    """Plot eigenvalues in descending order on a logarithmic axis, one line per spectrum.

    An error bar shows the bounds of the smallest eigenvalue. Computed eigenvalues at or below zero, which are rounding
    errors, are left out.

    Args:
        spectra: the spectra by label.

    Returns:
        A figure with one panel.

    Raises:
        ValueError: a spectrum does not have all of its eigenvalues.
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
    use_log_scale(axes, "y")
    axes.set_xlabel("index")
    axes.set_ylabel("eigenvalue of the kernel")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_observations(history: Sequence[Observation]) -> Figure:
    """Plot the loss, the PL ratio and its running infimum over the measured steps, on a logarithmic axis.

    Args:
        history: observations of one run, in the order of the steps; losses in the units of the run's loss.

    Returns:
        A figure with one panel.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    steps = [seen.step for seen in history]
    ratios = np.array([seen.ratio for seen in history])
    axes.plot(steps, [seen.loss for seen in history], marker=".", linewidth=1.2, label="loss f")
    axes.plot(steps, ratios, marker=".", linewidth=1.2, label="PL ratio |grad f|\u00b2 / f")
    axes.plot(steps, np.fmin.accumulate(ratios), linestyle=":", color="black", linewidth=1, label="its infimum so far")
    use_log_scale(axes, "y")
    axes.set_xlabel("step")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    return figure


def plot_label_projection(shares: Mapping[str, Tensor], curve: Sequence[tuple[int, float, float]]) -> Figure:
    """Plot the labels' projection onto the initial kernel's eigenvectors, and the error that this kernel predicts.

    Args:
        shares: for each named vector y its shares |v_i . y|^2 / |y|^2 on the eigenvectors v_i, by descending eigenvalue. The
            plot shows the sums over the leading eigenvectors.
        curve: tuples of the step, the measured |u - y|, and the |u - y| predicted by the initial kernel (NaN: no prediction).

    Returns:
        A figure with two panels: cumulative shares above, errors by step below.
    """
    figure = new_figure()
    figure.subplots_adjust(left=0.14, bottom=0.14, top=0.97, hspace=0.55)
    above, below = figure.subplots(2, 1)
    for (name, share), style in zip(shares.items(), cycle(("-", "--", ":", "-.")), strict=False):
        above.plot(range(1, len(share) + 1), share.cumsum(0).cpu().numpy(), linestyle=style, linewidth=1.2, label=name)
    use_log_scale(above, "x")
    above.set_ylim(0, 1.05)
    above.set_xlabel("leading eigenvectors of the first kernel", fontsize=7)
    above.set_ylabel("share", fontsize=7)
    steps = [step for step, _, _ in curve]
    below.plot(steps, [measured for _, measured, _ in curve], marker=".", linewidth=1.2, label="|u - y|")
    below.plot(steps, [predicted for _, _, predicted in curve], "--", color="black", linewidth=1, label="predicted")
    use_log_scale(below, "y")
    below.set_xlabel("step", fontsize=7)
    for axes in (above, below):
        axes.tick_params(which="both", labelsize=7)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    return figure


def plot_layers(
    shares: Mapping[str, float], smallest: Mapping[str, Bounded] | None = None, whole: Bounded | None = None
) -> Figure:
    """Plot one bar per layer on a logarithmic axis: its share of the trace, and the smallest eigenvalue of its kernel.

    A filled bar ends at lambda_min. A hollow bar ends at the upper bound of lambda_min, where rounding leaves the value
    open (a layer with fewer parameters than samples has lambda_min = 0). A dotted line marks lambda_min of the whole
    kernel, which is at least that of every layer.

    Args:
        shares: shares of the trace by layer, in the network's order. Of more than 12 layers, those with the largest shares
            and those with the largest lambda_min are drawn.
        smallest: lambda_min of the layers' kernels; None: one panel only.
        whole: lambda_min of the whole kernel.

    Returns:
        A figure with one panel, or two if ``smallest`` is given.
    """
    smallest = smallest or {}
    kept = _select_layers(shares, smallest)
    rows = np.arange(len(kept))[::-1]
    figure = new_figure()
    figure.subplots_adjust(left=0.31)
    panels = figure.subplots(1, 2 if smallest else 1, sharey=True, squeeze=False)[0]
    panels[0].barh(rows, [shares.get(layer, 0.0) for layer in kept], height=0.7)
    panels[0].set_yticks(rows, [_short(layer) for layer in kept])
    style_bar_axis(panels[0], [shares.get(layer, 0.0) for layer in kept], "share of the trace")
    left_out = len(shares) - len(kept)
    if left_out > 0:
        panels[0].set_title(f"{left_out} of {len(shares)} layers left out", fontsize=7, loc="left", pad=2)
    if smallest:
        drawn = [(row, smallest[layer]) for row, layer in zip(rows, kept, strict=True) if layer in smallest]
        clear = [(row, each.value) for row, each in drawn if each.lower > 0]
        unclear = [(row, each.upper) for row, each in drawn if each.lower <= 0 < each.upper]
        panels[1].barh([row for row, _ in clear], [value for _, value in clear], height=0.7, color="tab:orange")
        panels[1].barh(
            [row for row, _ in unclear],
            [value for _, value in unclear],
            height=0.7,
            facecolor="none",
            edgecolor="tab:orange",
        )
        values = [value for _, value in (*clear, *unclear)]
        if whole is not None and whole.value > 0:
            panels[1].axvline(whole.value, color="black", linestyle=":", linewidth=1)
            values.append(whole.value)
        style_bar_axis(panels[1], values, "lambda_min (hollow: <=)")
    return figure


def _select_layers(shares: Mapping[str, float], smallest: Mapping[str, Bounded]) -> list[str]:
    """Select at most ``MOST_BARS`` layers, by share and a few by lambda_min, in the network's order."""
    by_share = sorted(shares, key=lambda layer: -shares[layer])
    by_value = [layer for layer in sorted(smallest, key=lambda layer: -smallest[layer].lower) if layer in shares]
    chosen = dict.fromkeys([*by_value[: MOST_BARS // 3], *by_share])
    kept = set(list(chosen)[:MOST_BARS])
    return [layer for layer in shares if layer in kept]


def _short(layer: str) -> str:
    name = layer or "(the model)"
    return name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}"


def style_bar_axis(axes: Axes, values: Sequence[float], label: str) -> None:
    """Give horizontal bars a logarithmic axis with a label.

    Args:
        axes: The panel, with its bars.
        values: Their lengths; only those above 0 count.
        label: Of the axis.
    """
    positive = [value for value in values if value > 0]
    if positive:
        # Bars on a logarithmic axis need a left end.
        axes.set_xlim(min(positive) / 3, max(positive) * 2)
        use_log_scale(axes, "x", narrow=True)
    axes.set_xlabel(label, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, axis="x", alpha=0.3)
