"""``plot_layer_gradients``: the gradient and the update of every layer in one figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from lightning_conv.health.layers.layer_gradients import LayerGradient
from lightning_conv.reporting.figures.bars import MOST_BARS, draw_bars, draw_names, rows_of
from lightning_conv.reporting.figures.names import CARD_LETTERS, name_inches, short_names
from lightning_conv.reporting.figures.style import CARD, COLORS, Style, margins, new_figure, set_heading, style_axes

__all__ = ["extreme_layers", "plot_layer_gradients", "short_names"]

ENDS = 3
"""Layers that are kept for each end of each quantity, where not all are drawn."""

WORTH_SAYING = 0.005
"""Share of zeros in a layer's gradient from which on it is written on its bar."""

UNDER_TEXT = 0.4
"""Opacity of a bar with text on it, which has a contrast of 4.5 and more on it."""


def plot_layer_gradients(layers: Sequence[LayerGradient], style: Style = CARD) -> Figure:
    """Plot one bar per layer on logarithmic axes: the norm of its gradient, and its update over its weights.

    The share of zeros in a gradient is written on its bar where it is ``WORTH_SAYING`` or more. Of more than ``MOST_BARS`` layers those
    with the largest and the smallest norms and updates are drawn, and the title says how many are left out.

    Args:
        layers: The layers, in the network's order.
        style: Of what is drawn.

    Returns:
        A figure with two panels; with one, if no update is known.

    Raises:
        ValueError: There is no layer.
    """
    if not layers:
        raise ValueError("layers: empty; need at least one")
    kept = extreme_layers(layers)
    figure = new_figure(style=style)
    moved = any(_is_positive(each.update) for each in kept)
    panels = figure.subplots(1, 2 if moved else 1, sharey=True, squeeze=False)[0]
    for axes in panels:
        style_axes(axes, style)
    draw_bars(panels[0], [each.norm for each in kept], "|gradient|", style)
    written = draw_names(panels[0], [each.name for each in kept], style, CARD_LETTERS)
    margins(figure, left=name_inches(written, style.label), wspace=0.12)
    for row, each, bar in zip(rows_of(len(kept)), kept, panels[0].patches, strict=True):
        if each.zeros >= WORTH_SAYING:
            bar.set_alpha(UNDER_TEXT)
            panels[0].text(
                0.03,
                row,
                f"{100 * each.zeros:.0f} % zeros",
                fontsize=style.legend,
                color=style.ink,
                va="center",
                transform=panels[0].get_yaxis_transform(),
            )
    left_out = len(layers) - len(kept)
    set_heading(figure, "Gradient" + (" and update" if moved else "") + _of(left_out, len(layers)), style)
    if moved:
        draw_bars(panels[1], [each.update for each in kept], "|update| / |weights|", style, color=COLORS[1])
        panels[1].tick_params(axis="y", length=0)
    return figure


def _of(left_out: int, layers: int) -> str:
    return f" ({left_out} of {layers} left out)" if left_out else " of the layers"


def extreme_layers(layers: Sequence[LayerGradient]) -> list[LayerGradient]:
    """Return at most ``MOST_BARS`` layers, in their order: those with the smallest and the largest norms and updates.

    Args:
        layers: The layers.
    """
    if len(layers) <= MOST_BARS:
        return list(layers)
    quantities: tuple[Callable[[LayerGradient], float], ...] = (lambda each: each.update, lambda each: each.norm)
    ranked = []
    for quantity in quantities:
        known = sorted(
            (k for k in range(len(layers)) if math.isfinite(quantity(layers[k]))), key=lambda k: quantity(layers[k])
        )
        ranked.append(
            [end for pair in zip(known, reversed(known), strict=True) for end in pair]
        )  # smallest, largest, ...
    chosen = dict.fromkeys(k for order in ranked for k in order[: 2 * ENDS])
    for order in ranked:
        chosen |= dict.fromkeys(order)
    return [layers[k] for k in sorted(list(chosen)[:MOST_BARS])]


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
