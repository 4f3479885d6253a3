"""``plot_layer_map``: what every layer does over training, as one table of colours with the layers' names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.reporting.figures.names import CARD_LETTERS, name_inches, short_names
from lightning_conv.reporting.figures.style import (
    CARD,
    CARD_INCHES,
    Style,
    margins,
    new_figure,
    printable,
    set_heading,
    style_axes,
)
from lightning_conv.reporting.log_axis import tick_label
from lightning_conv.reporting.log_steps import LogSteps

MOST_ROWS = 60
"""Rows of the table; the layers of larger networks are added up by the modules that they are in."""

ROW_INCHES = 0.105
"""Height of a row whose name can still be read."""

DECADES = 6.0
"""A logarithmic scale of colours reaches down so far from the largest value."""

ABOUT = ("share of trace", "gradient norm", "dead units")
"""The three tables."""


@dataclass(frozen=True)
class LayerValues:
    """What is known of a layer, or of several together, at one step; NaN: it is not known.

    Attributes:
        share: Of the trace of the kernel.
        gradient: Norm of the gradient of the loss of the probe by the layer's weights.
        dead: Number of units behind it, up to the next layer, that let nothing through on the probe.
        units: Number of all of these.
    """

    share: float = math.nan
    gradient: float = math.nan
    dead: float = math.nan
    units: float = math.nan


def group_layers(names: Sequence[str], most: int = MOST_ROWS) -> list[tuple[str, list[str]]]:
    """Return at most ``most`` groups of layers with a name each, in their order.

    While there are too many, those of the deepest level are put into the modules that they are in. What is still too many is put
    together with its neighbours.

    Args:
        names: Dotted names of the layers.
        most: Groups.

    Example:
        >>> group_layers(["a.0.x", "a.0.y", "a.1.x", "b"], most=3)
        [('a.0', ['a.0.x', 'a.0.y']), ('a.1', ['a.1.x']), ('b', ['b'])]
    """
    groups = {name: [name] for name in dict.fromkeys(names)}
    while len(groups) > most and (deepest := max(name.count(".") for name in groups)):
        merged: dict[str, list[str]] = {}
        for name, members in groups.items():
            merged.setdefault(name.rpartition(".")[0] if name.count(".") == deepest else name, []).extend(members)
        if len(merged) < most / 4:  # all in one module: its parts say more than the whole
            break
        groups = merged
    rows = list(groups.items())
    if len(rows) > most:
        width = -(-len(rows) // most)
        parts = [rows[at : at + width] for at in range(0, len(rows), width)]
        rows = [(f"{part[0][0]} +{len(part) - 1}", [each for _, own in part for each in own]) for part in parts]
    return rows


def layer_row(groups: Sequence[tuple[str, Sequence[str]]], values: Mapping[str, LayerValues]) -> Tensor:
    """Return the numbers of one step: shares and units are added up in each group, and norms as roots of sums of squares.

    Args:
        groups: See ``group_layers``.
        values: What is known, by layer.

    Returns:
        (3 * number of groups,), float64: all shares, all norms, and the shares of dead units.
    """
    shares, norms, dead = [], [], []
    for _, members in groups:
        known = [values[name] for name in members if name in values]
        shares.append(_sum([each.share for each in known]))
        norms.append(math.sqrt(_sum([each.gradient**2 for each in known])))
        units = _sum([each.units for each in known])
        dead.append(_sum([each.dead for each in known]) / units if units > 0 else math.nan)
    return torch.tensor([*shares, *norms, *dead], dtype=torch.float64)


def _sum(values: Sequence[float]) -> float:
    """Return the sum of what is known; NaN: nothing is."""
    known = [each for each in values if not math.isnan(each)]
    return math.fsum(known) if known and all(map(math.isfinite, known)) else (math.inf if known else math.nan)


def plot_layer_map(
    seen: LogSteps, names: Sequence[str], title: str = "Layers over training (bright: large)", style: Style = CARD
) -> Figure:
    """Draw a table of colours with a row for each layer and a column for each step, once for each quantity of which something is known.

    Columns are equally wide; the first and the last step are named. Shares and norms have a logarithmic scale of at most six decades, below
    which all is one colour, and dead units one from 0 to 100 %. What is not known, zero or not finite on a logarithmic scale is left empty.

    Args:
        seen: ``layer_row`` by step, at least one.
        names: Names of the rows.
        title: Of the figure.
        style: Of what is drawn.

    Returns:
        A figure of up to three panels, as high as the names need.

    Raises:
        ValueError: There is no row, or another number of them.
    """
    if not len(seen) or seen.rows.shape[1] != 3 * len(names):
        raise ValueError(f"seen: shape {tuple(seen.rows.shape)}; need {3 * len(names)} numbers for each step")
    tables = dict(zip(ABOUT, seen.rows.numpy().reshape(len(seen), 3, len(names)).transpose(1, 2, 0), strict=True))
    shown = {about: table for about, table in tables.items() if np.isfinite(table).any()} or {
        ABOUT[0]: tables[ABOUT[0]]
    }
    top, bottom = 0.42, 0.42
    figure = new_figure(max(CARD_INCHES[1], ROW_INCHES * len(names) + top + bottom), style)
    shown_names = [printable(each) for each in short_names(names, CARD_LETTERS)]
    points = style.label if len(names) <= 16 else 72 * ROW_INCHES * 0.78
    margins(figure, left=name_inches(shown_names, points), right=0.08, top=top, bottom=bottom, wspace=0.1)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    set_heading(figure, title, style)
    for axes, (about, table) in zip(panels, shown.items(), strict=True):
        _draw_table(axes, about, table, seen.steps, style)
    beside = {"transform": panels[0].get_yaxis_transform(), "ha": "right", "va": "center_baseline"}
    for row, name in enumerate(shown_names):  # ticks with labels take twice the time
        panels[0].text(-0.05, row, name, fontsize=points, color=style.ink, parse_math=False, **beside)
    return figure


def _draw_table(axes: Axes, about: str, table: np.ndarray, steps: Sequence[int], style: Style) -> None:
    """Draw one quantity, its name above, and below it its steps and what the ends of its colours are."""
    style_axes(axes, style, frame=())
    axes.tick_params(length=0, pad=2)
    axes.set_title(about, fontsize=style.label, color=style.ink, loc="left", pad=2)
    if about == ABOUT[2]:
        norm: Normalize = Normalize(0.0, 1.0)
        ends = "0\u2013100 %"
        drawn = np.where(np.isfinite(table), table, np.nan)
    else:
        drawn = np.where(np.isfinite(table) & (table > 0), table, np.nan)
        known = drawn[np.isfinite(drawn)]
        high = float(known.max()) if len(known) else 1.0
        least = float(known.min()) if len(known) else high / 10
        low = max(least, high / 10**DECADES)
        norm = LogNorm(low if low < high else high / 10, high)
        at_most = "\u2264 " if least < low else ""
        ends = f"{at_most}{tick_label(_rounded(float(norm.vmin or 0)))}\u2013{tick_label(_rounded(high))}"
    axes.imshow(drawn, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
    axes.set_facecolor("#dcdcd8")
    axes.patch.set_alpha(1.0)
    if len(steps) == 1:
        axes.set_xticks([0], [f"step {steps[0]}"])
    else:
        axes.set_xticks([-0.5, len(steps) - 0.5], [f"step {steps[0]}", str(steps[-1])])
        first, last = axes.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
    axes.set_yticks([])
    axes.set_xlabel(ends, fontsize=style.legend, color=style.ink, labelpad=1)


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")
