"""Send scalars, figures, texts and files to the loggers of a run; one that fails is said once and ends no run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure

from lightning_conv.callbacks.run.guarded import Attempt, Failures, guarded
from lightning_conv.callbacks.run.loggers.artifacts import Artifacts, artifacts_of
from lightning_conv.callbacks.run.loggers.names import metric_names

_failures: WeakKeyDictionary[Logger, Failures] = WeakKeyDictionary()
"""What was said of a logger: the same sentence is not said twice."""


def logging_guard(logger: Logger) -> AbstractContextManager[Attempt]:
    """Guard a call of a logger: a full disk or a lost connection is no reason to end a run.

    Args:
        logger: The logger.
    """
    # Without the step, so that a logger that fails in every step is one warning.
    return guarded(
        None,
        f"{type(logger).__name__}: something is not logged",
        expects=(OSError, ValueError),
        failures=_failures.setdefault(logger, Failures()),
    )


def send_metrics(logger: Logger, metrics: Mapping[str, float], step: int) -> None:
    """Send finite values to a logger.

    Args:
        logger: The logger.
        metrics: Values by tag; none: nothing is sent.
        step: Their step.
    """
    if metrics:
        with logging_guard(logger):
            logger.log_metrics(metric_names(logger, metrics), step=step)


def send_figure(trainer: pl.Trainer, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Send a figure to all loggers that take one; it is drawn once, and only if there is such a logger.

    Args:
        trainer: Trainer of the run.
        tag: Its tag.
        draw: Draws it.
        step: Its step.
    """
    takers = takers_of(trainer)
    if not takers:
        return
    with guarded(step, f"{tag}: the figure is not drawn") as attempt:
        figure = draw()
    if attempt.failed:
        return
    for taker in takers:
        with logging_guard(taker.logger):
            taker.figure(tag, figure, step)
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close(figure)  # one that a user's code has made with pyplot would stay there


def send_text(trainer: pl.Trainer, tag: str, text: str, step: int) -> None:
    """Send Markdown to all loggers that take it.

    Args:
        trainer: Trainer of the run.
        tag: Its tag.
        text: The text.
        step: Its step.
    """
    for taker in takers_of(trainer):
        with logging_guard(taker.logger):
            taker.text(tag, text, step)


def send_files(trainer: pl.Trainer, files: Mapping[str, Path], step: int) -> None:
    """Send the files of a run to all loggers that store files.

    Args:
        trainer: Trainer of the run.
        files: Their paths by what they are: ``page``, ``report``, ``record``, ``picture``.
        step: The step at which they were written.
    """
    for taker in takers_of(trainer):
        with logging_guard(taker.logger):
            taker.files(files, step)


def wants_picture(trainer: pl.Trainer) -> bool:
    """Return whether a logger has a place for the picture of the run.

    Args:
        trainer: Trainer of the run.
    """
    return any(taker.wants_picture for taker in takers_of(trainer))


def takes_texts(trainer: pl.Trainer) -> bool:
    """Return whether this process has a logger that takes texts and figures.

    Args:
        trainer: Trainer of the run.
    """
    return bool(takers_of(trainer))


def takers_of(trainer: pl.Trainer) -> list[Artifacts]:
    """Return the loggers that take more than scalars; none on any rank but the first.

    Args:
        trainer: Trainer of the run.
    """
    found = [artifacts_of(logger) for logger in trainer.loggers] if trainer.is_global_zero else []
    return [each for each in found if each is not None]
