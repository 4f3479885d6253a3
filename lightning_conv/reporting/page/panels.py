"""What is drawn of a run: the panels of its figure and of its page, with the tags that each one shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_conv.reporting.series import Series
from lightning_conv.reporting.tags import GROUPS, LOSS, tag_of_network

Scale: TypeAlias = Literal["log", "linear", "auto"]

SPAN = 30.0
"""Largest over smallest value from which on an axis is logarithmic, if nothing else is said."""

MOST_OF_MODULE = 6
"""Losses of the module that are drawn beside ours."""


@dataclass(frozen=True)
class Line:
    """One quantity: its tag in a run with one optimizer, its label, and the tags of its bounds."""

    tag: str
    label: str
    lower: str = ""
    upper: str = ""


@dataclass(frozen=True)
class Panel:
    """A chart.

    Attributes:
        title: Its heading.
        lines: What it shows, as far as it was logged.
        about: What it tells, in one sentence.
        empty: Why there is nothing to draw, if there is not.
        scale: Of the vertical axis.
        edge: A value that separates two cases; None: there is none.
    """

    title: str
    lines: tuple[Line, ...]
    about: str
    empty: str = ""
    scale: Scale = "auto"
    edge: float | None = None


LOSSES = Panel(
    "Loss",
    (Line(LOSS, "training loss of each step"), Line("theory/loss", "loss of the probe")),
    "The loss of every training step, the loss on the probe, and the losses that the module logs.",
    "No loss was recorded: ConvergenceHealth follows that of every step, or self.log one whose name contains loss.",
)
STABILITY = Panel(
    "Stability ratio",
    (
        Line("health/stability", "curvature over its limit"),
        Line(
            "kernel/step_size_ratio",
            "step size over 2 / lambda_max",
            "kernel/step_size_ratio_lower",
            "kernel/step_size_ratio_upper",
        ),
        Line("health/critical_ratio", "update over the critical one"),
    ),
    "Below 1 a step is stable on the quadratic model of the loss. A ratio a little above 1 is usual in runs that end well.",
    "Not measured. ConvergenceHealth measures it where the run is long enough for it, for torch's SGD, Adam, AdamW, NAdam, RMSprop "
    "and Adagrad.",
    "auto",
    1.0,
)
LAMBDA_MIN = Panel(
    "lambda_min",
    (
        Line("kernel/lambda_min", "lambda_min of the kernel", "kernel/lambda_min_lower", "kernel/lambda_min_upper"),
        Line("kernel/lambda_min_bound", "proven lower bound"),
        Line(
            "loss_kernel/lambda_min",
            "lambda_min of the kernel of the loss gradients",
            "loss_kernel/lambda_min_lower",
            "loss_kernel/lambda_min_upper",
        ),
    ),
    "The smallest eigenvalue of the kernel on the probe, with its bounds: a bar that reaches down to 0 leaves it open. Above 0 the "
    "full kernel lets the gradient vanish only where the loss does; a kernel that is summed over the outputs says less.",
    "Not measured: LambdaMin measures it.",
    "log",
)
CHANGE = Panel(
    "Change of the kernel",
    (
        Line("kernel/relative_frobenius_change", "relative change (Frobenius)"),
        Line("kernel/relative_spectral_change", "relative change (spectral)"),
        Line("loss_kernel/relative_frobenius_change", "of the loss gradients (Frobenius)"),
    ),
    "How far the kernel is from that of the start, over the norm of that one. A small change means that the linearised network still "
    "describes the training.",
    "Not measured: KernelStability measures it.",
)
ALIGNMENT = Panel(
    "Alignment",
    (
        Line("kernel/alignment", "alignment with the first kernel"),
        Line("loss_kernel/alignment", "of the loss gradients"),
    ),
    "1: after centring the kernel has the shape that it had at the start; it falls where the network learns features.",
    "Not measured: KernelStability measures it.",
    "linear",
)
GAP = Panel(
    "Gap to the infimum",
    (Line("guard/gap", "loss above its infimum"), Line("guard/bound", "proven bound of it")),
    "Phase 2 of ExpressivityGuard: the training loss above its infimum over all outputs, and the bound that is proven for it.",
)
FORECAST = Panel(
    "Forecast",
    (Line("theory/loss", "loss of the probe"), Line("health/forecast", "forecast of the loss, where it was made")),
    "The loss of the probe, and at each step the loss that was forecast there for a later one.",
    "No forecast: one is shown where ConvergenceHealth could check earlier ones, and a gap in phase 2 of ExpressivityGuard.",
)

PANELS: tuple[Panel, ...] = (
    LOSSES,
    STABILITY,
    LAMBDA_MIN,
    CHANGE,
    ALIGNMENT,
    GAP,
    FORECAST,
    Panel(
        "Largest eigenvalue and trace",
        (Line("kernel/lambda_max", "lambda_max"), Line("kernel/trace", "trace")),
        "The largest eigenvalue of the kernel, and the sum of all of them. The largest limits the step of plain SGD on a squared loss "
        "only; for all others the stability ratio does.",
    ),
    Panel(
        "PL ratio",
        (Line("theory/pl_ratio", "|grad f|^2 / f"), Line("theory/pl_infimum", "its infimum so far")),
        "The squared gradient over the loss. If it stays above a constant, gradient descent converges at a linear rate; where it falls "
        "towards 0 while the loss does not, progress stalls. Its size depends on the scale of the loss.",
        scale="log",
    ),
    Panel(
        "Path of the weights",
        (Line("theory/distance", "distance from the start"), Line("theory/path_length", "length of the path")),
        "How far the weights are from their start, and how long their way was; close together: they moved straight ahead.",
    ),
    Panel(
        "Error and its prediction",
        (Line("theory/residual", "|u - y|"), Line("theory/residual_predicted", "predicted by the first kernel")),
        "The error on the probe, and what the first kernel predicts for it.",
        scale="log",
    ),
)
"""The charts of a page, in their order. One of which nothing was logged is left out, except those of the figure."""


@dataclass(frozen=True)
class Drawn:
    """A line with its values: those at which bounds are known have them, the others NaN."""

    label: str
    steps: list[int]
    values: list[float]
    lower: list[float] | None = None
    upper: list[float] | None = None

    @property
    def numbers(self) -> list[float]:
        """All values and bounds that are known."""
        return [each for each in (*self.values, *(self.lower or ()), *(self.upper or ())) if math.isfinite(each)]


def drawn_lines(
    panel: Panel, series: Mapping[str, Series], optimizer: str = "", most: int | None = None
) -> list[Drawn]:
    """Return the lines of a panel of which something was logged.

    Args:
        panel: The panel.
        series: What was logged, by tag.
        optimizer: Name of the optimizer whose network is meant.
        most: Points of a line; None: all.
    """
    tags = [
        tuple(tag_of_network(tag, optimizer) if tag else "" for tag in (line.tag, line.lower, line.upper))
        for line in panel.lines
    ]
    labels = [line.label for line in panel.lines]
    if panel is LOSSES:
        own = [name for name in series if is_of_module(name) and "loss" in name.lower()][:MOST_OF_MODULE]
        tags, labels = [*tags, *((name, "", "") for name in own)], [*labels, *own]
    known = [
        (label, of)
        for label, of in zip(labels, tags, strict=True)
        if any(math.isfinite(value) for value in _of(series, of[0]).values)
    ]
    if panel is FORECAST and len(known) < len(labels):
        return []  # the loss of the probe alone is in another panel
    return [_drawn(label, series, of, most) for label, of in known]


def is_of_module(tag: str) -> bool:
    """Return whether a tag is one of the module's own.

    Args:
        tag: The tag.
    """
    return not tag.startswith(GROUPS) and tag != LOSS


def other_tags(series: Mapping[str, Series], optimizers: Sequence[str] = ("",)) -> list[str]:
    """Return the tags of what was logged and no panel shows, those of the module first.

    Args:
        series: What was logged, by tag.
        optimizers: Names of the optimizers.
    """
    shown = {
        tag_of_network(tag, of)
        for panel in PANELS
        for line in panel.lines
        for tag in (line.tag, line.lower, line.upper)
        for of in optimizers
    }
    shown |= {
        name for name in [each for each in series if is_of_module(each) and "loss" in each.lower()][:MOST_OF_MODULE]
    }
    rest = [tag for tag in series if tag not in shown and any(math.isfinite(value) for value in series[tag].values)]
    return sorted(rest, key=lambda tag: (not is_of_module(tag), tag))


def needs_log(panel_scale: Scale, numbers: Iterable[float]) -> bool:
    """Return whether an axis is logarithmic: where that is asked for, or the numbers reach over more than ``SPAN``.

    Args:
        panel_scale: What is asked for.
        numbers: What is drawn.
    """
    known = list(numbers)
    positive = [each for each in known if each > 0]
    if panel_scale == "linear" or not positive:
        return False
    return panel_scale == "log" or (min(known) > 0 and max(positive) / min(positive) > SPAN)


def _of(series: Mapping[str, Series], tag: str) -> Series:
    return series.get(tag, Series())


def _drawn(label: str, series: Mapping[str, Series], tags: Sequence[str], most: int | None) -> Drawn:
    """Return a line from the tags of its values and of their bounds, which are empty where there are none."""
    found = _of(series, tags[0])
    found = found if most is None or len(found) <= most else found.thinned(most)
    steps = found.steps
    lower, upper = (
        [known.get(step, math.nan) for step in steps] if (known := _by_step(series, bound)) else None
        for bound in tags[1:]
    )
    return Drawn(label, steps, found.values, lower, upper)


def _by_step(series: Mapping[str, Series], tag: str) -> dict[int, float]:
    found = _of(series, tag)
    return dict(zip(found.steps, found.values, strict=True))
