"""What the panels of the laboratory's figures look like: ``dress``."""

from __future__ import annotations

from typing import Literal

from matplotlib.axes import Axes


def dress(axes: Axes, title: str, x: str, y: str = "", *, log: Literal["", "x", "y", "xy"] = "") -> None:
    """Title, labels and a light grid.

    Args:
        axes: the panel.
        title: of the panel.
        x: label.
        y: label.
        log: the axes on which the scale is logarithmic (base 10).
    """
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, alpha=0.3)
