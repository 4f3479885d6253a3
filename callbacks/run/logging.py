"""Send values to all loggers and to ``trainer.callback_metrics``, figures and texts to those that take them, histograms to TensorBoard."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure

from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.loggers.sending import logging_guard, send_figure, send_metrics, send_text
from lightning_conv.callbacks.run.series_keeper import SeriesKeeper
from lightning_conv.reporting.report import EXPLANATION, criteria_table, verdict_counts
from lightning_conv.reporting.tags import GROUPS
from lightning_conv.theory.criterion import Criterion

LAYOUT = {
    "convergence": {
        "smallest kernel eigenvalue, with bounds": [
            "Margin",
            ["kernel/lambda_min", "kernel/lambda_min_lower", "kernel/lambda_min_upper"],
        ],
        "change of the kernel since the start": [
            "Multiline",
            ["kernel/relative_frobenius_change$", "kernel/relative_spectral_change$"],
        ],
        "gap to the global infimum (phase 2), and its proven bound": ["Multiline", ["guard/gap$", "guard/bound$"]],
    },
    "path of the weights (ConvergenceCriteria)": {
        "PL ratio |grad f|^2 / f, and its infimum so far": ["Multiline", ["theory/pl_ratio$", "theory/pl_infimum$"]],
        "distance from the start, and length of the path": ["Multiline", ["theory/distance$", "theory/path_length$"]],
        "share of the loss that a step removes, to first order and measured": [
            "Multiline",
            ["theory/rate_linearised$", "theory/rate$"],
        ],
        "error |u - y| as predicted by the first kernel, and measured": [
            "Multiline",
            ["theory/residual_predicted$", "theory/residual$"],
        ],
    },
    "steps of plain SGD on a squared loss (LambdaMin)": {
        "step size over its limit 2 / lambda_max": [
            "Multiline",
            ["kernel/step_size_ratio$", "kernel/step_size_ratio_lower$", "kernel/step_size_ratio_upper$"],
        ],
        "squared error over the one measured before, predicted and measured": [
            "Multiline",
            ["kernel/contraction_predicted$", "kernel/contraction_measured$"],
        ],
    },
}
"""One custom-scalars layout for all runs: TensorBoard merges layouts of runs only where they are equal.

A Multiline chart takes regular expressions, which match prefixes unless anchored; a Margin chart takes plain tags.
"""


def warn_without_logger(trainer: pl.Trainer, callback: pl.Callback, what: str) -> None:
    """Warn that a run without a logger shows nothing; ``what`` still reaches ``trainer.callback_metrics``."""
    if not trainer.loggers:
        rank_zero_warn(
            f"{type(callback).__name__}: the trainer has no logger, so nothing will be drawn; {what} still reach "
            "trainer.callback_metrics. Pass Trainer(logger=TensorBoardLogger('runs')) to see them"
        )


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Log finite values at ``step``, the number of optimizer steps done; they belong to the weights after that many steps."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    for logger in trainer.loggers:
        send_metrics(logger, finite, step)
    keep(trainer, metrics, step)
    publish(trainer, metrics)


def keep(trainer: pl.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Hand values on to the callbacks that write them down when the fit ends; what is not finite is a gap there."""
    for keeper in callbacks_of(trainer, SeriesKeeper):
        keeper.keep(trainer, metrics, step)


def publish(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Put values into ``trainer.callback_metrics``, where EarlyStopping and ModelCheckpoint read them."""
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in metrics.items()})


def withdraw(trainer: pl.Trainer, names: Iterable[str]) -> dict[str, float]:
    """Replace values in ``trainer.callback_metrics`` by NaN, since they are of an earlier step; loggers keep what they have.

    Args:
        trainer: Trainer of the run.
        names: Names of the values.

    Returns:
        The values, all NaN.
    """
    values = dict.fromkeys(names, math.nan)
    keep(trainer, values, trainer.global_step)
    publish(trainer, values)
    return values


def warn_of_early_stopping(trainer: pl.Trainer) -> None:
    """Warn before the run begins of an EarlyStopping that would end it at the first measurement that fails."""
    for stopping in callbacks_of(trainer, EarlyStopping):
        if stopping.check_finite and stopping.monitor.startswith(GROUPS):
            rank_zero_warn(
                f"EarlyStopping(monitor={stopping.monitor!r}, check_finite=True) ends the run where a measurement fails, since its value "
                "is then NaN; pass check_finite=False to go on"
            )


def log_figure(trainer: pl.Trainer, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Log a figure to the loggers that take one; it is drawn only if there is such a logger."""
    send_figure(trainer, tag, draw, step)


def log_histogram(trainer: pl.Trainer, tag: str, values: torch.Tensor, step: int) -> None:
    """Log a histogram to TensorBoard."""
    _write(trainer, lambda writer: writer.add_histogram(tag, values, global_step=step))


def log_text(trainer: pl.Trainer, tag: str, text: str, step: int) -> None:
    """Log Markdown to the loggers that take it."""
    send_text(trainer, tag, text, step)


def layout(names: Sequence[str] = ("",)) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of TensorBoard's custom-scalars tab.

    Args:
        names: The optimizers whose networks are measured; empty: the only one of a run.
    """
    if not any(names):
        return LAYOUT
    return {
        f"{title} of {name}": {
            chart: [kind, [_of(name, tag, regular=kind == "Multiline") for tag in tags]]
            for chart, (kind, tags) in charts.items()
            if not tags[0].startswith("guard/")
        }
        for name in names
        for title, charts in LAYOUT.items()
    }


def _of(optimizer: str, tag: str, *, regular: bool) -> str:
    group, _, rest = tag.partition("/")
    return f"{group}/{re.escape(optimizer) if regular else optimizer}/{rest}"


def log_layout(trainer: pl.Trainer, names: Sequence[str] = ("",)) -> None:
    """Log the layout of TensorBoard's custom-scalars tab.

    Args:
        trainer: Trainer of the run.
        names: See ``layout``.
    """
    _write(trainer, lambda writer: writer.add_custom_scalars(layout(names)))


def _write(trainer: pl.Trainer, write: Callable[[Any], object]) -> None:
    """Call a function with the writer of every TensorBoard logger, which is a dummy on all ranks but the first."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            with logging_guard(logger):
                write(logger.experiment)


def log_criteria(trainer: pl.Trainer, criteria: Sequence[Criterion], samples: int, step: int, tag: str) -> None:
    """Log the table of verdicts as a text, such as ``theory/criteria``."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(criteria).items())
    head = f"Step {step}, on the probe's {samples} samples: {counts}."
    log_text(trainer, tag, f"{head}\n\n{criteria_table(criteria)}\n\n{EXPLANATION}", step)
