"""``RunLog``: what the callbacks of this library have logged in one fit, of which the charts, the constants and the settings are made."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_conv.callbacks.run.callbacks import callbacks_of, find_callback
from lightning_conv.callbacks.run.changes import Changes
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.loggers.sending import send_metrics
from lightning_conv.callbacks.run.tensorboard import (
    LimitsWriter,
    boards_of,
    log_settings,
    say_where,
    write,
)
from lightning_conv.reporting.charts import HEADLINES, RATIOS, drawn_values, layout
from lightning_conv.reporting.tags import EQUALS, GROUPS, REPEATS, tag_of_network, tag_of_one

COMPARED = (
    "theory/loss",
    *RATIOS,
    "kernel/lambda_min",
    "kernel/relative_frobenius_change",
    "kernel/alignment",
    "guard/gap",
    "health/level",
)
"""What of ours the tab HParams compares, from the first measurement on: also the run in which it does not change has it there."""

FIRST_OF_MODULE = 3
"""Metrics of the module that stand before ours there."""


class RunLog:
    """What was logged in a fit. All ranks make the same calls."""

    def __init__(self) -> None:
        self._changes = Changes(at_once=HEADLINES.union(COMPARED))
        self._fixed: dict[str, float] = {}
        self._last: dict[str, tuple[int, float]] = {}
        self._left_out: dict[str, set[float]] = {}  # values that another tag has
        self._tags: dict[str, None] = {}
        self._own: list[str] = []
        self._layout: object = None
        self._limits = LimitsWriter()

    def log(
        self, trainer: pl.Trainer, values: Mapping[str, float], step: int, fixed: Collection[str] = frozenset()
    ) -> None:
        """Log what no other tag has: to TensorBoard what changes, to other loggers all.

        Args:
            trainer: Trainer of the run.
            values: Finite values by tag.
            step: Their step.
            fixed: Those that cannot change in a run.
        """
        self._last |= {tag: (step, value) for tag, value in values.items()}
        self._fixed |= {tag: value for tag, value in values.items() if tag in fixed}
        boards = boards_of(trainer)
        others = {tag: value for tag, value in values.items() if tag_of_one(tag)[0] not in REPEATS}
        for logger in (each for each in trainer.loggers if each not in boards):
            send_metrics(logger, others, step)
        if not boards:
            return
        own = {tag: value for tag, value in others.items() if tag not in fixed and not self._repeats(tag, value, step)}
        for at, found in self._changes.pass_on(own, step).items():
            self._send(trainer, found, at)
        self._own = own_tags(trainer)
        self._lay_out(trainer)

    def _repeats(self, tag: str, value: float, step: int) -> bool:
        name, optimizer = tag_of_one(tag)
        if name not in EQUALS:
            return False
        at, other = self._last.get(tag_of_network(EQUALS[name], optimizer), (-1, math.nan))
        same = at == step and _as_written(value) == _as_written(other)
        if same and len(known := self._left_out.setdefault(tag, set())) < 2:
            known.add(value)
        return same

    def _send(self, trainer: pl.Trainer, values: Mapping[str, float], step: int) -> None:
        for logger in boards_of(trainer):
            send_metrics(logger, values, step)
        self._tags |= dict.fromkeys(values)
        of_run, limits = drawn_values(values)
        write(trainer, lambda writer: [writer.add_scalar(tag, value, step) for tag, value in of_run.items()])
        self._limits.write(trainer, limits, step)
        self._tags |= dict.fromkeys([*of_run, *limits])

    def _lay_out(self, trainer: pl.Trainer) -> None:
        """Write the layout of the charts if another one has something to show."""
        found = layout(self._tags, self._own)
        if found and found != self._layout:
            self._layout = found
            write(trainer, lambda writer: writer.add_custom_scalars(found))

    def end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, succeeded: bool = True) -> None:
        """Log to TensorBoard what was measured once, and as settings what has not changed.

        Args:
            trainer: Trainer of the run.
            pl_module: The module.
            succeeded: Whether the fit came to its end.
        """
        if not boards_of(trainer):
            return
        for at, found in self._changes.single().items():
            self._send(trainer, found, at)
        # Where the other processes may be gone nothing is asked of the module's metrics, which may ask them.
        self._own = own_tags(trainer) if succeeded else self._own
        self._lay_out(trainer)
        constants = {**self._changes.constants, **self._fixed}
        constants = {
            tag: value
            for tag, value in constants.items()
            if self._left_out.get(tag, {value}) == {value} and tag_of_one(tag)[0] not in COMPARED
        }
        log_settings(trainer, constants, self._compared(pl_module), succeeded=succeeded)
        self._limits.close()

    def _compared(self, pl_module: pl.LightningModule) -> list[str]:
        """Return what the tab HParams compares: metrics of validation first, then ours, then the rest of the module's."""
        own = [each for each in self._own if not each.endswith("_step")]
        own = sorted(own, key=lambda each: "val" not in each)
        if is_overridden("test_step", pl_module):  # a test may follow the fit
            own += [each.replace("val", "test", 1) for each in own if each.startswith("val")]
        ours = [tag for tag in self._tags if tag_of_one(tag)[0] in COMPARED]
        ours.sort(key=lambda tag: COMPARED.index(tag_of_one(tag)[0]))
        return list(dict.fromkeys([*own[:FIRST_OF_MODULE], *ours, *own[FIRST_OF_MODULE:]]))


def _as_written(value: float) -> float:
    """Return a value as an event file has it, in single precision."""
    return float(torch.tensor(value, dtype=torch.float32))


def own_tags(trainer: pl.Trainer) -> list[str]:
    """Return the names of what the module has logged so far, in its order.

    Args:
        trainer: Trainer of the run.
    """
    names: list[str] = []
    with attempted(Exception):  # what a metric of the module fails by, the trainer will meet next
        names = [each for each in trainer.logged_metrics if not each.startswith(GROUPS) and each != "epoch"]
    return names


class LogsOfRun(pl.Callback):
    """Base of the callbacks that log: the first one in the trainer's list keeps the ``RunLog`` of a fit for all of them.

    Lightning calls none of this in a step.
    """

    _run_log = cast(
        "RunLog | None", None
    )  # a bare annotation would be a setting of a guard, whose types jsonargparse reads

    def begin_log(self, trainer: pl.Trainer) -> None:
        """Begin the log of a fit, and say where its charts are; only in the first of these callbacks, in ``on_train_start``.

        Args:
            trainer: Trainer of the run.
        """
        if find_callback(trainer, LogsOfRun) is self:
            self._run_log = RunLog()
            say_where(trainer)

    def end_log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, succeeded: bool = True) -> None:
        """End the log of a fit, in ``teardown`` or ``on_exception``; a second call does nothing.

        Args:
            trainer: Trainer of the run.
            pl_module: The module.
            succeeded: Whether the fit came to its end.
        """
        if self._run_log is None:
            return
        log, self._run_log = self._run_log, None
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        log.end(trainer, pl_module, succeeded=succeeded)
        if succeeded:
            say_where(trainer)


def run_log(trainer: pl.Trainer) -> RunLog | None:
    """Return the log of this fit; None: no callback keeps one.

    Args:
        trainer: Trainer of the run.
    """
    return next((each._run_log for each in callbacks_of(trainer, LogsOfRun) if each._run_log is not None), None)
