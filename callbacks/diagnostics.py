"""``ConvergenceDiagnostics``: all monitors of this library by one name, on one shared probe."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from typing_extensions import override

from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria
from lightning_conv.callbacks.monitors.base import OnError
from lightning_conv.callbacks.monitors.kernel_stability import KernelStability
from lightning_conv.callbacks.monitors.lambda_min import LambdaMin, PerLayer
from lightning_conv.callbacks.report import ConvergenceReport
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.probe import Probe


class ConvergenceDiagnostics(pl.Callback):
    """Adds ``KernelStability``, ``LambdaMin``, ``ConvergenceCriteria`` and ``ConvergenceReport`` on one probe, with one kernel per step.

    They are put behind this callback in the trainer's list when a fit begins, and then behave as if they had been passed themselves:
    their values can be monitored, and their state is in the checkpoint. One that is in the list already is left as it is.

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

    Attributes:
        callbacks: the four.

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
    ) -> None:
        self.callbacks: list[pl.Callback] = [
            KernelStability(probe, every_n_steps, max_overhead, on_error),
            LambdaMin(probe, every_n_steps, max_overhead, per_layer=per_layer, loss_fn=loss_fn, on_error=on_error),
            ConvergenceCriteria(
                which, probe, every_n_steps, max_overhead, loss_fn=loss_fn, radius=radius, on_error=on_error
            ),
            ConvergenceReport(),
        ]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        listed: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        present = {type(callback) for callback in listed}
        missing = [callback for callback in self.callbacks if type(callback) not in present]
        # Lightning is iterating over this very list, calling setup: what is inserted behind this callback is called next.
        place = listed.index(self) + 1
        listed[place:place] = missing
