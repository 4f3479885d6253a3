"""``draw_lines``: the quantities of a run by step, with their bounds; the panels of the status figure are drawn by it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from lightning_conv.reporting.figures.style import COLORS, Style, finish, legend, plain, say, set_title
from lightning_conv.reporting.page.panels import Drawn, Panel, needs_log

FEW = 40
"""Up to so many points each of them has a dot."""


def draw_lines(axes: Axes, panel: Panel, lines: Sequence[Drawn], style: Style, why: str = "") -> None:
    """Draw a panel, or say why there is nothing in it.

    Args:
        axes: Where.
        panel: The panel.
        lines: Its lines, of which something was logged.
        style: Of what is drawn.
        why: Why nothing was measured; empty: the panel says it.
    """
    set_title(axes, panel.title, style)
    if not lines:
        say(axes, f"Not measured: {why}." if why else panel.empty, style)
        return
    log = needs_log(panel.scale, [number for line in lines for number in line.numbers])
    for line, color in zip(lines, COLORS, strict=False):
        draw_line(axes, line, color, log=log)
    if panel.edge is not None:
        axes.axhline(panel.edge, color=style.ink, linestyle="--", linewidth=0.9)
    finish(axes, style, log=log)
    legend(axes, style)


def draw_line(axes: Axes, line: Drawn, color: str, *, log: bool) -> None:
    """Draw one line with its band. On a logarithmic axis values of 0 and below are gaps, and such a lower bound is the lower edge.

    Args:
        axes: Where.
        line: The line.
        color: Its colour.
        log: Whether the vertical axis is logarithmic.
    """
    values = np.array(line.values)
    values = np.where(values > 0, values, np.nan) if log else values
    few = np.isfinite(values).sum() <= FEW
    (drawn,) = axes.plot(line.steps, values, color=color, linewidth=1.3, marker="o" if few else "", markersize=3)
    drawn.set_label(plain(line.label))
    if line.lower is None or line.upper is None:
        return
    lower, upper = np.array(line.lower), np.array(line.upper)
    if log:
        known = [each for each in line.numbers if each > 0]
        floor = min(known, default=1.0) / 2
        lower, upper = (
            np.where(lower > 0, lower, np.where(np.isnan(lower), np.nan, floor)),
            np.where(upper > 0, upper, np.nan),
        )
    axes.fill_between(line.steps, lower, upper, color=color, alpha=0.25, linewidth=0)
