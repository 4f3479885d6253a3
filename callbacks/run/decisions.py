"""``Decisions``: whether a step is measured, decided once per step and alike in all processes."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_conv.callbacks.run.schedule import Schedule


class Decisions:
    """The decisions of a run about the steps that are measured.

    Args:
        trainer: of the run.
        schedule: says what the time allows.
    """

    def __init__(self, trainer: pl.Trainer, schedule: Schedule) -> None:
        self._trainer, self._schedule = trainer, schedule
        self._due: dict[int, bool] = {}  # of the last step that was asked for
        self._last: dict[int, bool] = {}

    def alike(self, decision: bool) -> bool:
        """Return the first process's decision on all of them, so that what depends on time is done alike.

        Args:
            decision: of this process.
        """
        trainer = self._trainer
        return bool(trainer.strategy.broadcast(decision)) if trainer.world_size > 1 else decision

    def knows(self, step: int) -> bool:
        """Return whether it is decided already whether to measure at a step.

        Args:
            step: its number.
        """
        return step in self._due

    def due(self, step: int) -> bool:
        """Decide whether to measure at a step.

        Args:
            step: its number.
        """
        if step not in self._due:
            decision = self._schedule.due(step)
            self._due = {step: decision if self._schedule.every_n_steps is not None else self.alike(decision)}
        return self._due[step]

    def last(self, step: int, *, asked: bool) -> bool:
        """Decide whether the last step is measured.

        Args:
            step: its number.
            asked: whether it is measured whatever it costs.
        """
        if step not in self._last:
            self._last = {step: asked or self.alike(self._schedule.allows_last(step))}
        return self._last[step]
