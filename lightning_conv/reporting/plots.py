"""Figures of the observations of a run, of the labels' projection, and of the layers' kernels, each of the size of a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.linalg.spectrum import Bounded
from lightning_conv.reporting.figures.bars import MOST_BARS, draw_bars, draw_names
from lightning_conv.reporting.figures.names import CARD_LETTERS, name_inches
from lightning_conv.reporting.figures.spectrum import plot_spectra
from lightning_conv.reporting.figures.style import (
    CARD,
    COLORS,
    Style,
    finish,
    fit_steps,
    legend,
    margins,
    new_figure,
    plain,
    set_heading,
    set_title,
    style_axes,
)
from lightning_conv.reporting.log_axis import use_log_scale
from lightning_conv.theory.tools.observation import Observation

__all__ = ["new_figure", "plot_label_projection", "plot_layers", "plot_observations", "plot_spectra"]


def plot_observations(history: Sequence[Observation], style: Style = CARD) -> Figure:
    """Plot the loss, the PL ratio and its running infimum over the measured steps, on a logarithmic axis.

    Args:
        history: observations of one run, in the order of the steps; losses in the units of the run's loss.
        style: of what is drawn.

    Returns:
        A figure with one panel.
    """
    figure = new_figure(style=style)
    axes = figure.add_subplot()
    style_axes(axes, style)
    set_title(axes, "Loss and PL ratio on the probe", style)
    steps = [seen.step for seen in history]
    ratios = np.array([seen.ratio for seen in history])
    lines = (
        ("loss f", np.array([seen.loss for seen in history]), "-", COLORS[0]),
        ("PL ratio |grad f|\u00b2 / f", ratios, "-", COLORS[1]),
        ("its infimum so far", np.fmin.accumulate(ratios), ":", style.ink),
    )
    for name, values, dashes, color in lines:
        drawn = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        few = "." if len(steps) <= 40 and dashes == "-" else ""
        axes.plot(steps, drawn, marker=few, linestyle=dashes, linewidth=1.2, color=color, label=name)
    fit_steps(axes, steps)
    finish(axes, style, log=True)
    legend(axes, style)
    return figure


def plot_label_projection(
    shares: Mapping[str, Tensor], curve: Sequence[tuple[int, float, float]], style: Style = CARD
) -> Figure:
    """Plot the labels' projection onto the initial kernel's eigenvectors, and the error that this kernel predicts.

    Args:
        shares: for each named vector y its shares |v_i . y|^2 / |y|^2 on the eigenvectors v_i, by descending eigenvalue. The
            plot shows the sums over the leading eigenvectors.
        curve: tuples of the step, the measured |u - y|, and the |u - y| predicted by the initial kernel (NaN: no prediction).
        style: of what is drawn.

    Returns:
        A figure with two panels: cumulative shares at the left, errors by step at the right.
    """
    figure = new_figure(style=style)
    margins(figure, left=0.45, wspace=0.38)
    left, right = figure.subplots(1, 2)
    for axes, title in ((left, "Share in the labels"), (right, "Error |u - y|")):
        style_axes(axes, style)
        set_title(axes, title, style)
    dashes = cycle(("-", "--", ":", "-."))
    for (name, share), style_of_line, color in zip(shares.items(), dashes, cycle(COLORS), strict=False):
        sums = share.cumsum(0).cpu().numpy()
        left.plot(
            range(1, len(share) + 1), sums, linestyle=style_of_line, linewidth=1.2, color=color, label=plain(name)
        )
    use_log_scale(left, "x")
    left.set_ylim(0, 1.05)
    finish(left, style, log=False, x="leading eigenvectors")
    steps = [step for step, _, _ in curve]
    for name, at, line, color in (("measured", 1, "-", COLORS[0]), ("predicted", 2, "--", style.ink)):
        values = np.array([each[at] for each in curve], dtype=float)
        drawn = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        marker = "." if line == "-" and len(steps) <= 40 else ""
        right.plot(steps, drawn, line, marker=marker, linewidth=1.2, color=color, label=name)
    fit_steps(right, steps)
    finish(right, style, log=True)
    for axes in (left, right):
        legend(axes, style)
    return figure


def plot_layers(
    shares: Mapping[str, float],
    smallest: Mapping[str, Bounded] | None = None,
    whole: Bounded | None = None,
    style: Style = CARD,
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
        style: of what is drawn.

    Returns:
        A figure with one panel, or two if ``smallest`` is given.
    """
    smallest = smallest or {}
    kept = _select_layers(shares, smallest)
    figure = new_figure(style=style)
    panels = figure.subplots(1, 2 if smallest else 1, sharey=True, squeeze=False)[0]
    for axes in panels:
        style_axes(axes, style)
    draw_bars(panels[0], [shares[layer] for layer in kept], "share of the trace", style)
    written = draw_names(panels[0], kept, style, CARD_LETTERS)
    margins(figure, left=name_inches(written, style.label), wspace=0.12)
    left_out = len(shares) - len(kept)
    what = f"Layers in the kernel ({left_out} of {len(shares)} left out)" if left_out else "Layers in the kernel"
    set_heading(figure, what, style)
    if smallest:
        bounds = [smallest.get(layer) for layer in kept]
        hollow = [each is not None and each.lower <= 0 < each.upper for each in bounds]
        ends = [
            0.0 if each is None else each.upper if open_ else each.value
            for each, open_ in zip(bounds, hollow, strict=True)
        ]
        also = [whole.value] if whole is not None and whole.value > 0 else []
        for value in also:
            panels[1].axvline(value, color=style.ink, linestyle=":", linewidth=1)
        draw_bars(panels[1], ends, "lambda_min (hollow: \u2264)", style, color=COLORS[1], hollow=hollow, also=also)
        panels[1].tick_params(axis="y", length=0)
    return figure


def _select_layers(shares: Mapping[str, float], smallest: Mapping[str, Bounded]) -> list[str]:
    """Select at most ``MOST_BARS`` layers, by share and a few by lambda_min, in the network's order."""
    by_share = sorted(shares, key=lambda layer: -shares[layer])
    by_value = [layer for layer in sorted(smallest, key=lambda layer: -smallest[layer].lower) if layer in shares]
    chosen = dict.fromkeys([*by_value[: MOST_BARS // 3], *by_share])
    kept = set(list(chosen)[:MOST_BARS])
    return [layer for layer in shares if layer in kept]
