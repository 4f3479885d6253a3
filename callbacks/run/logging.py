"""Send values to all loggers and to ``trainer.callback_metrics``, figures and texts to those that take them, histograms to TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure

from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.loggers.sending import send_figure, send_text
from lightning_conv.callbacks.run.run_log import run_log
from lightning_conv.callbacks.run.series_keeper import SeriesKeeper
from lightning_conv.callbacks.run.tensorboard import write
from lightning_conv.reporting.tags import GROUPS, REPEATS, tag_of_one


def warn_without_logger(trainer: pl.Trainer, callback: pl.Callback, what: str) -> None:
    """Warn that a run without a logger shows nothing; ``what`` still reaches ``trainer.callback_metrics``."""
    if not trainer.loggers:
        rank_zero_warn(
            f"{type(callback).__name__}: the trainer has no logger, so nothing will be drawn; {what} still reach "
            "trainer.callback_metrics. Pass Trainer(logger=TensorBoardLogger('runs')) to see them"
        )


def log_metrics(
    trainer: pl.Trainer, metrics: Mapping[str, float], step: int, fixed: Collection[str] = frozenset()
) -> None:
    """Log finite values at ``step``, the number of optimizer steps done; they belong to the weights after that many steps.

    All of them are in ``trainer.callback_metrics``. Loggers get what no other tag has, and TensorBoard of that what changes: a value that
    stays what it was is logged with the first change (``Changes``), or as a setting of the run when the fit ends.

    Args:
        trainer: Trainer of the run.
        metrics: Values by tag.
        step: Their step.
        fixed: Those that cannot change in a run; TensorBoard has them in its tab HParams.
    """
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if (log := run_log(trainer)) is not None:
        log.log(trainer, finite, step, fixed)
    keep(trainer, {name: value for name, value in metrics.items() if tag_of_one(name)[0] not in REPEATS}, step)
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
    write(trainer, lambda writer: writer.add_histogram(tag, values, global_step=step))


def log_text(trainer: pl.Trainer, tag: str, text: str, step: int) -> None:
    """Log Markdown to the loggers that take it."""
    send_text(trainer, tag, text, step)
