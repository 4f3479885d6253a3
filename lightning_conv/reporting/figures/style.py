"""What all figures have in common: size, colours, title, axes, and the sentence where there is nothing to draw."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_conv.reporting.log_axis import tick_label, use_log_scale

DPI = 100

CARD_INCHES = (3.5, 2.16)
"""350 x 216 pixels: what TensorBoard 2 shows without scaling. "Images" makes every picture 350 pixels wide and "Time series" 216 pixels
high, by repeating or leaving out pixels, which is unreadable where a picture has another size."""

COLORS = ("#3d85c6", "#e0862a", "#2e9e6b", "#c0508f", "#8f7fd6", "#a08a3c")
"""Of lines: each has a contrast of 3 and more on white and on a dark background."""


@dataclass(frozen=True)
class Style:
    """Colours and sizes of text.

    Attributes:
        ink: Colour of text and axes.
        background: Of the figure; None: it has none.
        title: Points of the title.
        label: Points of the labels of axes and ticks.
        legend: Points of the legend.
    """

    ink: str
    background: str | None
    title: float
    label: float
    legend: float


PAGE = Style("#767676", None, 10.0, 8.0, 7.5)
"""On a page, which puts the colour of its text in the place of ``ink``."""

CARD = Style("#3a3a3a", "#f7f7f5", 8.5, 7.0, 6.5)
"""Of a picture that may stand anywhere. It brings its background along, since no one ink has the contrast of text on white and on
TensorBoard's dark grey, and some viewers fill what is transparent with black."""

SEQUENCE = ListedColormap(
    ["#1f3b73", "#2c6fa8", "#3a9a9a", "#63b06a", "#a9b542", "#d9a031", "#d97a2b", "#c2452d"], "sequence"
)
"""Of what has an order: from dark blue to red, all of it readable on a light background."""


def new_figure(height: float = CARD_INCHES[1], style: Style = CARD) -> Figure:
    """Create an empty figure of the width of a card, outside pyplot's global state.

    Args:
        height: Inches; a table of many rows may be higher than a card.
        style: Of what is drawn.

    Returns:
        The figure, without axes.
    """
    figure = Figure(figsize=(CARD_INCHES[0], height), dpi=DPI)
    FigureCanvasAgg(figure)
    if style.background is None:
        figure.patch.set_alpha(0.0)
    else:
        figure.patch.set_facecolor(style.background)
    # Fixed margins in inches, because a layout engine draws every figure twice.
    margins(figure)
    return figure


def margins(
    figure: Figure, *, left: float = 0.52, right: float = 0.1, bottom: float = 0.4, top: float = 0.26, **between: float
) -> None:
    """Set the margins of a figure.

    Args:
        figure: The figure.
        left: Inches.
        right: Inches.
        bottom: Inches.
        top: Inches.
        between: ``wspace`` and ``hspace``, as shares of a panel.
    """
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, **between)


def style_axes(axes: Axes, style: Style, *, frame: Sequence[str] = ("left", "bottom")) -> None:
    """Give a panel its colours and its thin axes.

    Args:
        axes: The panel.
        style: Of what is drawn.
        frame: The sides that have a line.
    """
    axes.patch.set_alpha(0.0)
    axes.tick_params(labelsize=style.label, colors=style.ink, which="both")
    for side, spine in axes.spines.items():
        spine.set_color(style.ink)
        spine.set_linewidth(0.6)
        spine.set_visible(side in frame)


def set_title(axes: Axes, text: str, style: Style) -> None:
    """Write the title of a panel at its left end.

    Args:
        axes: The panel.
        text: What it shows.
        style: Of what is drawn.
    """
    title = axes.set_title(
        printable(text), fontsize=style.title, loc="left", color=style.ink, pad=6 if style is PAGE else 5
    )
    title.set_parse_math(False)


def set_heading(figure: Figure, text: str, style: Style) -> None:
    """Write the title of a figure at its left edge, where names stand beside the panels.

    Args:
        figure: The figure.
        text: What it shows.
        style: Of what is drawn.
    """
    place = 1 - 0.05 / figure.get_figheight()
    figure.text(0.02, place, printable(text), fontsize=style.title, color=style.ink, va="top", parse_math=False)


def set_labels(axes: Axes, style: Style, *, x: str = "", y: str = "") -> None:
    """Write what the axes show, with its unit.

    Args:
        axes: The panel.
        style: Of what is drawn.
        x: Of the horizontal axis.
        y: Of the vertical one.
    """
    if x:
        axes.set_xlabel(x, fontsize=style.label, color=style.ink, labelpad=2)
    if y:
        axes.set_ylabel(y, fontsize=style.label, color=style.ink, labelpad=2)


def finish(axes: Axes, style: Style, *, log: bool, x: str = "step", y: str = "") -> None:
    """Finish a panel of lines when all of them are drawn: scale, grid and labels.

    Args:
        axes: The panel.
        style: Of what is drawn.
        log: Whether the vertical axis is logarithmic.
        x: What the horizontal axis shows.
        y: What the vertical one shows.
    """
    if log:
        use_log_scale(axes, "y")
    axes.grid(visible=True, color=style.ink, alpha=0.25, linewidth=0.5)
    set_labels(axes, style, x=x, y=y)


def legend(axes: Axes, style: Style, *, beside: bool = False, title: str = "") -> None:
    """Add the legend of a panel.

    Args:
        axes: The panel.
        style: Of what is drawn.
        beside: Whether it stands at the right of the panel, which leaves room for it.
        title: Its heading.
    """
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "borderaxespad": 0.3} if beside else {}
    # "best" compares every place with every point, in milliseconds for a card and in tenths of a second for a long line.
    made = axes.legend(
        frameon=False,
        fontsize=style.legend,
        labelcolor=style.ink,
        title=title or None,
        title_fontsize=style.legend,
        handlelength=1.2,
        labelspacing=0.3,
        handletextpad=0.5,
        **place,
    )
    made.get_title().set_color(style.ink)


def say(axes: Axes, why: str, style: Style) -> None:
    """Say in a panel why there is nothing in it.

    Args:
        axes: The panel.
        why: A sentence.
        style: Of what is drawn.
    """
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_alpha(0.4)
    text = "\n".join(textwrap.wrap(why, 40))
    axes.text(
        0.5,
        0.5,
        text,
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=style.title - 1,
        color=style.ink,
        parse_math=False,
    )


def printable(text: str) -> str:
    """Return a text without characters that cannot be drawn.

    Args:
        text: Any text, such as a name from the user's code.
    """
    return "".join(each if each.isprintable() else " " for each in text)


def plain(text: str) -> str:
    """Return a label in which matplotlib sees no formula and no reason to leave a line out of the legend.

    Args:
        text: Any text.
    """
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def fit_steps(axes: Axes, steps: Sequence[int], *, spread: bool = False) -> None:
    """Let the horizontal axis reach from the start of a run to its last step, also where there is one step only.

    Args:
        axes: The panel.
        steps: Steps that are shown.
        spread: Whether the axis may be one of log(1 + step), where most of the steps would lie in its first fifth.
    """
    first, last = min([0, *steps]), max([1, *steps])
    if spread and first >= 0 and len(steps) > 3 and sorted(steps)[len(steps) // 2] < last / 5:
        axes.set_xscale("function", functions=(_log_of_steps, np.expm1))
        decades = range(math.ceil(math.log10(last + 1)))
        axes.set_xticks([0, *(10**power for power in decades)], ["0", *(tick_label(10.0**power) for power in decades)])
        axes.minorticks_off()
        spare = 0.03 * math.log1p(last)
        axes.set_xlim(-min(spare, 0.4), math.expm1(math.log1p(last) + spare))
        return
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    spare = 0.03 * last
    axes.set_xlim(first - spare, last + spare)


def _log_of_steps(steps: np.ndarray) -> np.ndarray:
    logs: np.ndarray = np.log1p(np.maximum(steps, -0.5))
    return logs
