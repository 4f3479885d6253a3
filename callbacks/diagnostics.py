"""``ConvergenceDiagnostics``: all monitors of this library by one name, on one shared probe."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria
from lightning_conv.callbacks.health.announcements import OnAlert
from lightning_conv.callbacks.health.callback import ConvergenceHealth
from lightning_conv.callbacks.monitors.base import KernelMonitor, OnError
from lightning_conv.callbacks.monitors.kernel_stability import KernelStability
from lightning_conv.callbacks.monitors.lambda_min import LambdaMin, PerLayer
from lightning_conv.callbacks.report import ConvergenceReport
from lightning_conv.callbacks.run.group import CallbackGroup
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.health.wording import listed


class ConvergenceDiagnostics(CallbackGroup):
    """Adds ``KernelStability``, ``LambdaMin``, ``ConvergenceCriteria``, ``ConvergenceHealth`` and ``ConvergenceReport`` on one probe.

    They behave as if they had been passed themselves: their values can be monitored, and their state is in the checkpoint. One that is
    in the trainer's list already takes the place of that here. In the list there is one callback, as each costs time in every step.

    Under ``ModelParallelStrategy`` criteria and health are left out, as no process has all weights; a line says so.

    In a run with several optimizers the network of each of them is measured, with the optimizer's name in the tags; ``max_overhead`` covers
    all of them together.

    Args:
        probe: as in the monitors.
        every_n_steps: as in the monitors.
        max_overhead: share of wall time of all of them together.
        which: of ``ConvergenceCriteria``.
        per_layer: of ``LambdaMin``.
        loss_fn: of the training step.
        radius: of ``ConvergenceCriteria``.
        on_error: as in the monitors.
        on_alert: of ``ConvergenceHealth``.
        audit_labels: of ``ConvergenceHealth``.

    Attributes:
        callbacks: the five.
        members: those of them that the trainer's list does not have.

    Example::

        trainer = Trainer(callbacks=[ConvergenceDiagnostics(probe=64)])
    """

    def __init__(
        self,
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        which: str | Sequence[str] = "auto",
        per_layer: PerLayer | None = "traces",
        loss_fn: LossFn | None = None,
        radius: float | None = None,
        on_error: OnError = "raise",
        on_alert: OnAlert = "warn",
        audit_labels: bool = False,
    ) -> None:
        self.callbacks: list[pl.Callback] = [
            KernelStability(probe, every_n_steps, max_overhead, on_error),
            LambdaMin(probe, every_n_steps, max_overhead, per_layer=per_layer, loss_fn=loss_fn, on_error=on_error),
            ConvergenceCriteria(
                which, probe, every_n_steps, max_overhead, loss_fn=loss_fn, radius=radius, on_error=on_error
            ),
            ConvergenceHealth(probe, every_n_steps, max_overhead, loss_fn, on_alert, on_error, audit_labels),
            ConvergenceReport(),
        ]
        super().__init__(self.callbacks)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        present = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
        self.members = [callback for callback in self.callbacks if type(callback) not in present]
        if isinstance(trainer.strategy, ModelParallelStrategy):
            whole = [each for each in self.members if isinstance(each, KernelMonitor) and not each.measures_sharded]
            self.members = [each for each in self.members if each not in whole]
            if whole and stage == "fit":
                rank_zero_info(
                    f"ConvergenceDiagnostics: {listed([type(each).__name__ for each in whole])} are left out, since they need all weights "
                    "on one device and ModelParallelStrategy shards them; the kernel is measured on the sharded module"
                )
        super().setup(trainer, pl_module, stage)
