"""``plot_layer_gradients``: the gradient and the update of every layer in one figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_conv.health.layers.layer_gradients import LayerGradient
from lightning_conv.reporting.plots import MOST_BARS, new_figure, style_bar_axis

ENDS = 3
"""Layers that are kept for each end of each quantity, where not all are drawn."""

LONGEST = 22
"""Characters of a layer's name that fit next to the bars."""

WORTH_SAYING = 0.005
"""Share of zeros in a layer's gradient from which on it is written beside its bar."""


def plot_layer_gradients(layers: Sequence[LayerGradient]) -> Figure:
    """Plot one bar per layer on logarithmic axes: the norm of its gradient, and its update over its weights.

    The share of zeros in a gradient is written beside its bar where it is ``WORTH_SAYING`` or more. Of more than ``MOST_BARS`` layers those
    with the largest and the smallest norms and updates are drawn, and the title says how many are left out.

    Args:
        layers: The layers, in the network's order.

    Returns:
        A figure with two panels; with one, if no update is known.

    Raises:
        ValueError: There is no layer.
    """
    if not layers:
        raise ValueError("layers: empty; need at least one")
    kept = extreme_layers(layers)
    rows = np.arange(len(kept))[::-1]
    figure = new_figure()
    figure.subplots_adjust(left=0.34)
    moved = any(_is_positive(each.update) for each in kept)
    panels = figure.subplots(1, 2 if moved else 1, sharey=True, squeeze=False)[0]
    norms = [each.norm for each in kept]
    panels[0].barh(rows, norms, height=0.7)
    panels[0].set_yticks(rows, short_names([each.name for each in kept]))
    style_bar_axis(panels[0], norms, "norm of the gradient")
    for row, each in zip(rows, kept, strict=True):
        if each.zeros >= WORTH_SAYING:
            panels[0].text(
                0.03,
                row,
                f"{100 * each.zeros:.0f} % zeros",
                fontsize=6,
                va="center",
                transform=panels[0].get_yaxis_transform(),
            )
    if len(kept) < len(layers):
        title = f"{len(layers) - len(kept)} of {len(layers)} layers left out"
        panels[0].set_title(title, fontsize=7, loc="left", pad=2)
    if moved:
        known = [(row, each.update) for row, each in zip(rows, kept, strict=True) if _is_positive(each.update)]
        panels[1].barh([row for row, _ in known], [update for _, update in known], height=0.7, color="tab:orange")
        style_bar_axis(panels[1], [update for _, update in known], "|update| / |weights|")
    return figure


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


def short_names(names: Sequence[str]) -> list[str]:
    """Return names as they fit next to the bars: without the modules that all of them are in, and with both ends of what is long.

    Args:
        names: Names of layers; an empty one is the model itself.

    Example:
        >>> short_names(["net.blocks.0.attention.projection", "net.blocks.11.attention.projection", "net.head"])
        ['blocks.0.a..projection', 'blocks.11...projection', 'head']
    """
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    found = []
    for each in parts:
        name = ".".join(each[common:]) or "(the model)"
        half = LONGEST // 2
        found.append(name if len(name) <= LONGEST else f"{name[: half - 1]}..{name[1 - half :]}")
    return found


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
