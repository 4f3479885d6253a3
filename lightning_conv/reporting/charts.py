r"""The charts of TensorBoard's tab "Custom scalars": which there are, and the layout of those of which something was logged.

What decides their form is how TensorBoard draws them (2.20):

- A Multiline chart takes regular expressions, which match beginnings unless anchored. A Margin chart stands behind all Multiline charts of
  its category, wherever the layout has it, so there is none here.
- Axes are linear until the reader presses the button below a chart. What spans decades in every run, lambda_min and the gap, is therefore
  drawn as its logarithm to the base of 10, a tag that TensorBoard alone gets: other loggers have an axis for it. The losses stay what the
  module logs, and for them there is the button.
- All lines of a run have one color and differ by their marks. What a quantity is held against, its bounds or an edge, is therefore written
  into a run of its own, ``limits``, in the folder of the run: it has another color.
- Charts of several runs are merged where they are equal. So a chart has the same lines in each run, logged or not, but for the losses of
  the module; it is left out where nothing of it was logged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lightning_conv.reporting.tags import GROUPS, tag_of_network, tag_of_one

MOST_OF_MODULE = 2
"""Losses of the module that are drawn: with ours at most four lines."""

LIMITS = "limits"
"""Folder of the run with what values are held against, in that of a run."""

EDGE = "convergence/edge"
"""Tag of the line at 1 beside the ratios of ``RATIOS``."""

RATIOS = ("health/stability", "health/critical_ratio", "kernel/step_size_ratio")
"""What reaches the edge of stability at 1."""

LOG10 = {
    "kernel/lambda_min": "convergence/log10_lambda_min",
    "loss_kernel/lambda_min": "convergence/log10_loss_kernel_lambda_min",
    "guard/gap": "convergence/log10_gap",
}
"""Tags of what is drawn as its logarithm."""

LOG10_LIMITS = {
    "kernel/lambda_min_lower": "convergence/log10_lambda_min_lower",
    "kernel/lambda_min_upper": "convergence/log10_lambda_min_upper",
    "kernel/lambda_min_bound": "convergence/log10_lambda_min_bound",
    "loss_kernel/lambda_min_lower": "convergence/log10_loss_kernel_lambda_min_lower",
    "loss_kernel/lambda_min_upper": "convergence/log10_loss_kernel_lambda_min_upper",
    "loss_kernel/lambda_min_bound": "convergence/log10_loss_kernel_lambda_min_bound",
    "guard/bound": "convergence/log10_bound",
}
"""The same for bounds."""


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: Its heading.
        tags: What it shows, in a run with one optimizer; it is drawn where one of them was logged.
        limits: What that is held against.
    """

    title: str
    tags: tuple[str, ...]
    limits: tuple[str, ...] = ()


LOSSES = Chart("loss", ("theory/loss", "guard/loss"))

CHARTS: Mapping[str, tuple[Chart, ...]] = {
    "convergence": (
        LOSSES,
        Chart("stability ratio (edge at 1)", RATIOS, (EDGE,)),
        Chart(
            "log10 of the smallest kernel eigenvalue, with bounds",
            ("convergence/log10_lambda_min", "convergence/log10_lambda_min_bound"),
            ("convergence/log10_lambda_min_lower", "convergence/log10_lambda_min_upper"),
        ),
        Chart(
            "change of the kernel since the start",
            ("kernel/relative_frobenius_change", "kernel/relative_spectral_change"),
        ),
        Chart("alignment of the kernel with the start", ("kernel/alignment",)),
        Chart(
            "log10 of the gap to the global infimum (phase 2), and its proven bound",
            ("convergence/log10_gap",),
            ("convergence/log10_bound",),
        ),
    ),
    "kernel of the loss gradients": (
        Chart(
            "log10 of the smallest eigenvalue, with bounds",
            ("convergence/log10_loss_kernel_lambda_min", "convergence/log10_loss_kernel_lambda_min_bound"),
            ("convergence/log10_loss_kernel_lambda_min_lower", "convergence/log10_loss_kernel_lambda_min_upper"),
        ),
        Chart(
            "change since the start", ("loss_kernel/relative_frobenius_change", "loss_kernel/relative_spectral_change")
        ),
        Chart("alignment with the start", ("loss_kernel/alignment",)),
    ),
    "path of the weights (ConvergenceCriteria)": (
        Chart("PL ratio |grad f|^2 / f, and its infimum so far", ("theory/pl_ratio", "theory/pl_infimum")),
        Chart("distance from the start, and length of the path", ("theory/distance", "theory/path_length")),
        Chart(
            "share of the loss that a step removes, to first order and measured",
            ("theory/rate_linearised", "theory/rate"),
        ),
        Chart(
            "error |u - y| as predicted by the first kernel, and measured",
            ("theory/residual_predicted", "theory/residual"),
        ),
    ),
    "steps of plain SGD on a squared loss (LambdaMin)": (
        Chart(
            "bounds of the step size over its limit 2 / lambda_max",
            ("kernel/step_size_ratio_lower", "kernel/step_size_ratio_upper"),
        ),
        Chart(
            "squared error over the one measured before, predicted and measured",
            ("kernel/contraction_predicted", "kernel/contraction_measured"),
        ),
    ),
}
"""All charts by category, in the order in which they are read."""

HEADLINES = frozenset(tag for charts in CHARTS.values() for chart in charts for tag in chart.tags) | frozenset(
    [*LOG10, *LOG10_LIMITS]
)
"""What a chart shows, or shows the logarithm of."""


def layout(tags: Collection[str], own: Sequence[str] = ()) -> dict[str, dict[str, list[object]]]:
    """Return the layout as ``SummaryWriter.add_custom_scalars`` takes it, of those charts of which something was logged.

    Args:
        tags: What was logged.
        own: Names of what the module logs.
    """
    losses = own_losses(own)
    optimizers = list(dict.fromkeys(tag_of_one(tag)[1] for tag in sorted(tags))) or [""]
    found: dict[str, dict[str, list[object]]] = {}
    for optimizer in optimizers:
        for category, charts in CHARTS.items():
            drawn: dict[str, list[object]] = {}
            for chart in charts:
                lines = [tag_of_network(tag, optimizer) for tag in chart.tags]
                # The losses of the module are those of all networks together.
                of_module = losses if chart is LOSSES and optimizer == optimizers[0] else []
                if of_module or not tags_absent(lines, tags):
                    limits = [tag_of_network(tag, optimizer) for tag in chart.limits]
                    drawn[chart.title] = ["Multiline", [f"{re.escape(tag)}$" for tag in (*of_module, *lines, *limits)]]
            if drawn:
                found[f"{category} of {optimizer}" if optimizer else category] = drawn
    return found


def tags_absent(lines: Sequence[str], tags: Collection[str]) -> bool:
    """Return whether none of some lines was logged.

    Args:
        lines: Their tags.
        tags: What was logged.
    """
    return not any(line in tags for line in lines)


def own_losses(names: Sequence[str]) -> list[str]:
    """Return which losses of the module are drawn: one of training and one of validation, or two of one kind.

    Of ``loss_step`` and ``loss_epoch``, into which Lightning splits what is logged both ways, the latter is taken.

    Args:
        names: Names of what the module logs, in its order.

    Example:
        >>> own_losses(["train_loss_step", "train_loss_epoch", "accuracy", "val_loss"])
        ['train_loss_epoch', 'val_loss']
    """
    losses = [each for each in names if "loss" in each.lower() and not each.startswith(GROUPS)]
    losses = [
        each for each in losses if not (each.endswith("_step") and f"{each.removesuffix('_step')}_epoch" in losses)
    ]
    evaluated = [each for each in losses if re.search(r"val|test", each.lower())]
    trained = [each for each in losses if each not in evaluated]
    both = trained[:1] + evaluated[:1]
    return both if len(both) == MOST_OF_MODULE else (trained or evaluated)[:MOST_OF_MODULE]


def drawn_values(values: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what TensorBoard draws beside some values: logarithms, and in a second dict what values are held against.

    A bound that is not positive has no logarithm and is left out.

    Args:
        values: Values of one step by tag.
    """
    of_run: dict[str, float] = {}
    limits: dict[str, float] = {}
    for tag, value in values.items():
        name, optimizer = tag_of_one(tag)
        if name in RATIOS:
            limits[tag_of_network(EDGE, optimizer)] = 1.0
        for names, into in ((LOG10, of_run), (LOG10_LIMITS, limits)):
            if name in names and value > 0:
                into[tag_of_network(names[name], optimizer)] = math.log10(value)
    return of_run, limits
