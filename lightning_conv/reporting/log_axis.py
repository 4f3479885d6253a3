"""``use_log_scale``: a logarithmic axis with few ticks and plain labels, which is drawn in a third of matplotlib's time."""

from __future__ import annotations

import math
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

FEW_DECADES, MANY_DECADES = 0.5, 2.3
"""Below the first an axis is labelled at round numbers, from the second on at powers of ten only."""

NARROW_DECADES = 1.2
"""The second of these on a narrow axis."""

SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def use_log_scale(axes: Axes, which: Literal["x", "y"], *, narrow: bool = False) -> None:
    """Make an axis logarithmic, with ticks for its limits of now: call it when everything is drawn.

    Ticks are at powers of ten; on a short axis at 1, 2 and 5 times them, or wherever numbers are round. Labels are plain text, since
    each mathematical one is parsed anew.

    Args:
        axes: The panel.
        which: The axis.
        narrow: Whether there is room for three or four labels only.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = abs(math.log10(high) - math.log10(low)) if low > 0 and high > 0 else math.inf
    if decades < FEW_DECADES:
        axis.set_major_locator(MaxNLocator(2 if narrow else 5))
    elif narrow:
        axis.set_major_locator(LogLocator(numticks=4) if decades >= NARROW_DECADES else LogLocator(subs=(1.0, 3.0)))
    else:
        axis.set_major_locator(LogLocator(numticks=7) if decades >= MANY_DECADES else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(tick_label))


def tick_label(value: float, _: int | None = None) -> str:
    """Return the label of a tick on a logarithmic axis, such as 10\u207b\u00b3, 2\u00b710\u207b\u2075 or 0.5.

    Args:
        value: Where the tick is.
    """
    if not value > 0:
        return ""
    exponent = math.floor(math.log10(value) + 1e-9)
    if -2 <= exponent <= 3:
        return f"{value:.4g}"
    leading = f"{value / 10.0**exponent:.3g}"
    power = "10" + str(exponent).translate(SUPERSCRIPTS)
    return power if leading == "1" else f"{leading}\u00b7{power}"
