"""``DryRun``: the callback of a dry run: it makes the first measurements of the monitors, keeps what they show, and ends the fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks.check.head_checked import head_checked
from lightning_conv.callbacks.check.networks_checked import networks_checked
from lightning_conv.callbacks.check.run_check import HeadCheck, NetworkCheck
from lightning_conv.callbacks.check.scale_checked import Target
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.beginning import NOTHING
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.run.group import CallbackGroup
from lightning_conv.reporting.progress import Report


class CheckedError(Exception):
    """Ends the fit of a dry run; everything is known."""


class DryRun(CallbackGroup):
    """Makes the first measurement of each monitor as in a run, keeps what it shows, and ends the fit.

    The fit ends before its first step; where samples cannot be read one by one, when its first batch is known; and where parameters have
    no shape yet, after the first step, on the copy.

    Args:
        monitors: Of the run.
        said: Where warnings are collected.
        report: Is told of the progress.
        target: Ranks and device for which measurements are predicted; None: they are not.

    Attributes:
        networks: What is measured.
        head: What a guard would train.
        refused: What cannot be measured.
    """

    def __init__(
        self,
        monitors: Sequence[KernelMonitor],
        said: Sequence[warnings.WarningMessage],
        report: Report,
        target: Target | None = None,
    ) -> None:
        super().__init__(monitors)
        self._monitors, self._said, self._report, self._target = list(monitors), said, report, target
        self.networks: tuple[NetworkCheck, ...] = ()
        self.head = HeadCheck()
        self.refused: list[str] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._each(lambda member: member.setup(trainer, pl_module, stage))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._each(lambda member: member.on_train_start(trainer, pl_module))
        self._end(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._each(lambda member: member.on_train_batch_start(trainer, pl_module, batch, batch_idx))
        self._end(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note nothing of the step, which only gives parameters their shapes."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._each(lambda member: member.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx))
        self._end(trainer, pl_module, at_once=trainer.global_step > 0)

    def _each(self, do: Callable[[KernelMonitor], None]) -> None:
        """Call a hook of each monitor that has not been refused."""
        for number, member in enumerate(list(self._monitors)):
            try:
                do(member)
            except MisconfigurationException as error:
                self.refused.append(str(error))
                self._monitors.remove(member)
            self._report(0.1 + 0.6 * (number + 1) / len(self.members))

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, at_once: bool = False) -> None:
        """Keep what is known and end the fit, unless a monitor waits for a batch or a step.

        Raises:
            CheckedError: The fit ends.
        """
        if not (at_once or all(each.has_begun for each in self._monitors)):
            return
        self.refused += self._left_out(trainer)
        self.networks = networks_checked(trainer, self._target)
        self._report(0.8)
        self.head = head_checked(trainer, pl_module)
        self._report(1.0)
        raise CheckedError

    def _left_out(self, trainer: pl.Trainer) -> list[str]:
        """Return why networks of some optimizers are not measured, and which measurements have failed."""
        monitors = monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
        failed = [words for each in monitors for words in each.failures.words]
        without = [each for each in monitors if each.kernel is None]
        unseen = [each.measured for each in without if each.measured]
        # A monitor that ends the run in an error was noted above; one that goes on without measuring says so in a warning.
        warned = [str(each.message) for each in self._said if str(each.message).endswith(NOTHING)] if without else []
        return list(dict.fromkeys([*unseen, *failed, *warned]))
