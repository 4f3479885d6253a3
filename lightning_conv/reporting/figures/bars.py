"""``draw_bars``: one bar per layer on a logarithmic axis, with the layers' names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from lightning_conv.reporting.figures.names import LONGEST, short_names
from lightning_conv.reporting.figures.style import COLORS, Style, printable, set_labels
from lightning_conv.reporting.log_axis import use_log_scale

MOST_BARS = 12


def largest_layers(shares: Mapping[str, float]) -> list[str]:
    """Return at most ``MOST_BARS`` layers, those with the largest finite shares, in the network's order.

    Args:
        shares: Of the trace, by layer.
    """
    known = {layer: share for layer, share in shares.items() if math.isfinite(share)}
    kept = set(sorted(known, key=lambda layer: -known[layer])[:MOST_BARS])
    return [layer for layer in known if layer in kept]


def rows_of(count: int) -> np.ndarray:
    """Return the heights of bars, the first one on top.

    Args:
        count: Number of bars.
    """
    return np.arange(count)[::-1]


def draw_names(axes: Axes, names: Sequence[str], style: Style, longest: int = LONGEST) -> list[str]:
    """Write the names of layers at the left of a panel of bars, and return them as they are written.

    Args:
        axes: The panel.
        names: Their names.
        style: Of what is drawn.
        longest: Characters that fit.
    """
    written = [printable(name) for name in short_names(names, longest)]
    axes.set_yticks(rows_of(len(names)), written)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    return written


def draw_bars(
    axes: Axes,
    values: Sequence[float],
    label: str,
    style: Style,
    *,
    color: str = COLORS[0],
    hollow: Sequence[bool] = (),
    also: Sequence[float] = (),
) -> None:
    """Draw horizontal bars, the first one on top, on a logarithmic axis with a label; a value that is not positive has none.

    Args:
        axes: The panel.
        values: Lengths of the bars.
        label: Of the axis, with the unit.
        style: Of what is drawn.
        color: Of the bars.
        hollow: Which of them are outlines; empty: none.
        also: Further values that the axis must reach.
    """
    known = [each if math.isfinite(each) and each > 0 else 0.0 for each in values]
    bars = axes.barh(rows_of(len(values)), known, height=0.7, color=color)
    for bar, is_hollow in zip(bars, hollow, strict=False):
        if is_hollow:
            bar.set(facecolor="none", edgecolor=color)
    axes.set_axisbelow(True)
    axes.set_ylim(-0.6, len(values) - 0.4)
    positive = [each for each in (*known, *also) if each > 0]
    if positive:
        # Bars on a logarithmic axis need a left end.
        axes.set_xlim(min(positive) / 3, max(positive) * 2)
        use_log_scale(axes, "x", narrow=True)
    set_labels(axes, style, x=label)
    axes.grid(visible=True, axis="x", color=style.ink, alpha=0.25, linewidth=0.5)
