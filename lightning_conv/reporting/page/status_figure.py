"""``status_figure``: a run in one picture of two rows and three columns, and ``figure_as_svg``, which is read on any background."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_conv.reporting.gradient_plot import short_names
from lightning_conv.reporting.log_axis import use_log_scale
from lightning_conv.reporting.page.panels import (
    ALIGNMENT,
    CHANGE,
    FORECAST,
    GAP,
    LAMBDA_MIN,
    LOSSES,
    STABILITY,
    Drawn,
    Panel,
    drawn_lines,
    needs_log,
)
from lightning_conv.reporting.plots import DPI, MOST_BARS, style_bar_axis
from lightning_conv.reporting.series import Series

SIZE_INCHES = (12.0, 6.4)

POINTS = 400
"""Points of a line: more cannot be told apart on a third of the width."""

COLORS = ("#3d85c6", "#e0862a", "#2e9e6b", "#c0508f", "#8f7fd6", "#a08a3c")
"""Of lines: each has a contrast of 3 and more on white and on a dark background."""

INK = "#767676"
"""Of text and axes, which ``figure_as_svg`` replaces by the colour of the text around the figure."""

NAMES = 0.07
"""Share of the width that the names of the layers take."""

NO_SHARES = 'Not measured: LambdaMin(per_layer="traces"), its default, measures it.'


def status_figure(
    series: Mapping[str, Series],
    shares: Mapping[str, float],
    optimizer: str = "",
    *,
    why: Mapping[str, str] | None = None,
) -> Figure:
    """Draw the loss, the stability ratio, lambda_min, the change of the kernel, the gap or the forecast, and the layers' shares.

    A panel of which nothing was measured says in a line why. Missing values are gaps. On a logarithmic axis values of 0 and below, such as
    the lower bound of an undecided lambda_min, end at its lower edge.

    Args:
        series: Values by step, by tag (``tags`` of the callbacks).
        shares: Each layer's share of the trace of the kernel; empty: not known.
        optimizer: Name of the optimizer whose network is meant, in a run with several.
        why: Why something could not be judged, by the name of the finding: ``stability``, ``forecast``.

    Returns:
        A figure with six panels, 12 x 6.4 inches, without a background.

    Cost: half a second.
    """
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI)
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.085, top=0.94, hspace=0.36, wspace=0.25)
    panels = figure.subplots(2, 3)
    for axes in panels.flat:
        _style(axes)
    reasons = why or {}
    for axes, panel, name in zip(panels[0], (LOSSES, STABILITY, LAMBDA_MIN), ("", "stability", ""), strict=True):
        _draw(axes, panel, drawn_lines(panel, series, optimizer, POINTS), reasons.get(name, ""))
    _draw_kernel(panels[1, 0], series, optimizer)
    gap = drawn_lines(GAP, series, optimizer, POINTS)
    if gap:
        _draw(panels[1, 1], GAP, gap)
    else:
        _draw(panels[1, 1], FORECAST, drawn_lines(FORECAST, series, optimizer, POINTS), reasons.get("forecast", ""))
    _draw_shares(panels[1, 2], shares)
    steps = [step for each in series.values() for step in each.steps[-1:]]
    for axes in panels.flat[:5]:
        if axes.lines:  # all panels begin and end where the run does, also that of a quantity that was measured once
            spare = 0.03 * max([1, *steps])
            axes.set_xlim(min(0.0, *steps) - spare, max([1, *steps]) + spare)
    return figure


def figure_as_svg(figure: Figure, *, salt: str = "status", title: str = "") -> str:
    """Return a figure as an ``svg`` element for an HTML page, in which text and axes have the colour of the page's text.

    Args:
        figure: The figure; what is drawn in ``INK`` takes the colour of the page.
        salt: What its identifiers are made from: two figures on one page need different ones.
        title: What a screen reader says.
    """
    with io.StringIO() as file, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    # An svg element in HTML needs no namespaces, and its size is that of the page.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r'<svg ([^>]*?)(width|height)="[^"]*"\s?', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)(width|height)="[^"]*"\s?', r"<svg \1", text, count=1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(_printable(title))}" ', 1)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text.replace(INK, "currentColor"))  # hundredths of a point cannot be seen
    return re.sub(r"\n\s*", "\n", text).strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _style(axes: Axes) -> None:
    axes.patch.set_alpha(0.0)
    axes.tick_params(labelsize=8, colors=INK, which="both")
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_linewidth(0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left", color=INK, pad=6)


def _say(axes: Axes, why: str) -> None:
    """Say in a panel why there is nothing in it."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_alpha(0.4)
    text = "\n".join(textwrap.wrap(why, 40))
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=INK, parse_math=False
    )


def _draw(axes: Axes, panel: Panel, lines: Sequence[Drawn], why: str = "") -> None:
    _title(axes, panel.title)
    if not lines:
        _say(axes, f"Not measured: {why}." if why else panel.empty)
        return
    log = needs_log(panel.scale, [number for line in lines for number in line.numbers])
    for line, color in zip(lines, COLORS, strict=False):
        _plot(axes, line, color, log)
    if panel.edge is not None:
        axes.axhline(panel.edge, color=INK, linestyle="--", linewidth=0.9)
    _finish(axes, log)
    axes.legend(frameon=False, fontsize=7.5, labelcolor=INK)


def _draw_kernel(axes: Axes, series: Mapping[str, Series], optimizer: str) -> None:
    """Draw the change of the kernel, and its alignment on an axis of its own at the right."""
    change = drawn_lines(CHANGE, series, optimizer, POINTS)[:1]
    alignment = drawn_lines(ALIGNMENT, series, optimizer, POINTS)[:1]
    _title(axes, "Kernel: change and alignment")
    if not change and not alignment:
        _say(axes, CHANGE.empty)
        return
    log = needs_log(CHANGE.scale, [number for line in change for number in line.numbers])
    for line in change:
        _plot(axes, line, COLORS[0], log)
    if alignment:
        beside = axes.twinx()
        _style(beside)
        beside.spines["right"].set_visible(True)
        _plot(beside, alignment[0], COLORS[1], log=False)
        beside.set_ylim(min(0.0, *alignment[0].numbers), 1.03)
        beside.set_ylabel(alignment[0].label, fontsize=8, color=COLORS[1])
    if change:
        axes.set_ylabel(change[0].label, fontsize=8, color=COLORS[0])
    _finish(axes, log)


def _plot(axes: Axes, line: Drawn, color: str, log: bool) -> None:
    values = np.array(line.values)
    values = np.where(values > 0, values, np.nan) if log else values
    few = np.isfinite(values).sum() <= 40
    (drawn,) = axes.plot(line.steps, values, color=color, linewidth=1.3, marker="o" if few else "", markersize=3)
    drawn.set_label(_plain(line.label))
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


def _finish(axes: Axes, log: bool) -> None:
    if log:
        use_log_scale(axes, "y")
    axes.grid(visible=True, color=INK, alpha=0.25, linewidth=0.5)
    axes.set_xlabel("step", fontsize=8, color=INK)


def _draw_shares(axes: Axes, shares: Mapping[str, float]) -> None:
    _title(axes, "Share of the trace, per layer")
    known = {layer: share for layer, share in shares.items() if math.isfinite(share)}
    if not known:
        _say(axes, NO_SHARES)
        return
    largest = sorted(known, key=lambda layer: -known[layer])[:MOST_BARS]
    kept = [layer for layer in known if layer in set(largest)]
    rows = np.arange(len(kept))[::-1]
    axes.barh(rows, [known[layer] for layer in kept], height=0.7, color=COLORS[0])
    at = axes.get_position()
    axes.set_position((at.x0 + NAMES, at.y0, at.width - NAMES, at.height))
    axes.set_axisbelow(True)
    axes.set_yticks(rows, [_printable(name) for name in short_names(kept)])
    style_bar_axis(axes, [known[layer] for layer in kept], "share of the trace of the kernel")
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(visible=True, axis="x", color=INK, alpha=0.25, linewidth=0.5)
    if len(kept) < len(known):
        _title(axes, f"Share of the trace, per layer ({len(kept)} of {len(known)})")


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)


def _plain(text: str) -> str:
    """Return a text in which matplotlib sees no formula and no reason to leave a line out of the legend."""
    text = _printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
