"""``status_figure``: a run in one picture of two rows and three columns, and ``figure_as_svg``, which is read on any background."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_conv.reporting.figures.bars import draw_bars, draw_names, largest_layers
from lightning_conv.reporting.figures.lines import draw_line, draw_lines
from lightning_conv.reporting.figures.style import (
    COLORS,
    DPI,
    PAGE,
    finish,
    fit_steps,
    printable,
    say,
    set_title,
    style_axes,
)
from lightning_conv.reporting.page.panels import (
    ALIGNMENT,
    CHANGE,
    FORECAST,
    GAP,
    LAMBDA_MIN,
    LOSSES,
    STABILITY,
    drawn_lines,
    needs_log,
)
from lightning_conv.reporting.series import Series

SIZE_INCHES = (12.0, 6.4)

POINTS = 400
"""Points of a line: more cannot be told apart on a third of the width."""

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
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.085, top=0.94, hspace=0.36, wspace=0.33)
    panels = figure.subplots(2, 3)
    for axes in panels.flat:
        style_axes(axes, PAGE)
    reasons = why or {}
    for axes, panel, name in zip(panels[0], (LOSSES, STABILITY, LAMBDA_MIN), ("", "stability", ""), strict=True):
        draw_lines(axes, panel, drawn_lines(panel, series, optimizer, POINTS), PAGE, reasons.get(name, ""))
    _draw_kernel(panels[1, 0], series, optimizer)
    gap = drawn_lines(GAP, series, optimizer, POINTS)
    if gap:
        draw_lines(panels[1, 1], GAP, gap, PAGE)
    else:
        forecast = drawn_lines(FORECAST, series, optimizer, POINTS)
        draw_lines(panels[1, 1], FORECAST, forecast, PAGE, reasons.get("forecast", ""))
    _draw_shares(panels[1, 2], shares)
    steps = [step for each in series.values() for step in each.steps[:1] + each.steps[-1:]]
    for axes in panels.flat[:5]:
        if axes.lines:  # all panels begin and end where the run does, also that of a quantity that was measured once
            fit_steps(axes, steps)
    return figure


def figure_as_svg(figure: Figure, *, salt: str = "status", title: str = "") -> str:
    """Return a figure as an ``svg`` element for an HTML page, in which text and axes have the colour of the page's text.

    Args:
        figure: The figure; what is drawn in the ink of ``PAGE`` takes the colour of the page.
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
    text = text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(printable(title))}" ', 1)
    text = re.sub(r"<[^>]+>", _rounded, text.replace(PAGE.ink, "currentColor"))
    return re.sub(r"\n\s*", "\n", text).strip()


def _rounded(tag: re.Match[str]) -> str:
    """Return a tag with two decimals in its places and sizes: less than a hundredth of a point cannot be seen. Words stay as they are."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _draw_kernel(axes: Axes, series: Mapping[str, Series], optimizer: str) -> None:
    """Draw the change of the kernel, and its alignment on an axis of its own at the right."""
    change = drawn_lines(CHANGE, series, optimizer, POINTS)[:1]
    alignment = drawn_lines(ALIGNMENT, series, optimizer, POINTS)[:1]
    set_title(axes, "Kernel: change and alignment", PAGE)
    if not change and not alignment:
        say(axes, CHANGE.empty, PAGE)
        return
    log = needs_log(CHANGE.scale, [number for line in change for number in line.numbers])
    for line in change:
        draw_line(axes, line, COLORS[0], log=log)
    if alignment:
        beside = axes.twinx()
        style_axes(beside, PAGE, frame=("left", "bottom", "right"))
        draw_line(beside, alignment[0], COLORS[1], log=False)
        beside.set_ylim(min(0.0, *alignment[0].numbers), 1.03)
        beside.set_ylabel(alignment[0].label, fontsize=PAGE.label, color=COLORS[1])
    if change:
        axes.set_ylabel(change[0].label, fontsize=PAGE.label, color=COLORS[0])
    finish(axes, PAGE, log=log)


def _draw_shares(axes: Axes, shares: Mapping[str, float]) -> None:
    kept = largest_layers(shares)
    known = [layer for layer, share in shares.items() if math.isfinite(share)]
    of = f" ({len(kept)} of {len(known)})" if len(kept) < len(known) else ", per layer"
    set_title(axes, f"Share of the trace{of}", PAGE)
    if not kept:
        say(axes, NO_SHARES, PAGE)
        return
    at = axes.get_position()
    axes.set_position((at.x0 + NAMES, at.y0, at.width - NAMES, at.height))
    draw_bars(axes, [shares[layer] for layer in kept], "share of the trace of the kernel", PAGE)
    draw_names(axes, kept, PAGE)
