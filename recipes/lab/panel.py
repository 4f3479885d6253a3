"""Layout of the laboratory's figures: ``sheet`` makes their panels, ``dress`` labels one."""

from __future__ import annotations

from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Place = Literal["best", "lower left", "upper left", "upper right"]


def sheet(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    """Create a figure of several panels, outside the global state of pyplot.

    Args:
        width: width of the figure in inches.
        height: height of the figure in inches.
        rows: number of rows of panels.
        columns: number of columns of panels.
        options: keyword arguments of `Figure.subplots`.

    Returns:
        The figure, and its panels as `Figure.subplots` returns them.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def dress(
    axes: Axes, title: str, x: str, y: str = "", *, log: Literal["", "x", "y", "xy"] = "", legend: Place = "best"
) -> None:
    """Set title, labels, scales, a light grid and a legend of a panel.

    Args:
        axes: panel to label.
        title: title of the panel.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        log: axes whose scale is logarithmic (base 10).
        legend: place of the legend; none is drawn if the panel has one already or nothing in it has a label.
    """
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, alpha=0.3)
    if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc=legend)
