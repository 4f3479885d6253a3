"""``TrainerReader``: the trainer as the copy of a module sees it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger

METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


class TrainerReader:
    """The trainer as the copy sees it: what it reads is the run's, nothing that it calls for reaches a logger or an optimizer.

    Args:
        trainer: Trainer of the run.
        step: Optimizer steps that the copy is told of; None: those of the run.
        epoch: Epoch that the copy is told of; None: that of the run.
    """

    def __init__(self, trainer: pl.Trainer, step: int | None = None, epoch: int | None = None) -> None:
        held = vars(self)
        held |= {"_read": trainer, "logger": DummyLogger(), "loggers": []}
        held["global_step"] = trainer.global_step if step is None else step
        held["current_epoch"] = trainer.current_epoch if epoch is None else epoch

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainerReader:
        """Return this reader: a copy of it would bring the trainer."""
        return self

    def __getattr__(self, name: str) -> Any:
        """Return what the run's trainer has under this name; of its metrics a copy."""
        found = getattr(self._read, name)
        return dict(found) if name in METRICS else found
