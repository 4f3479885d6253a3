"""``OwnLoss``: the loss of the training step as a function of the outputs, from the step's own graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.step.step_outputs import StepOutputs
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.losses.of_outputs import Point, evaluate
from lightning_conv.losses.separation import GraphLoss, Separation, curvature_product
from lightning_conv.networks.observed.replay import OutputPlace


class OwnLoss(GraphLoss):
    """The loss of the training step as a function of (outputs, numbers of samples), without naming it.

    The step is run on a copy of the module, on the samples of the probe, with the outputs in place of the network's. So it can be
    differentiated by the outputs as often as the step's own operations can.

    Args:
        trainer: Trainer of the run.
        batch: The samples, as the training step gets them.
        observed: How the step calls its network on them.
        places: Where the step makes the outputs.
        depends: How it depends on the batch, see ``GraphLoss``; the number of labels that count may divide it.
        separated: How it was found that samples do not couple.

    Cost: a forward pass of the step per evaluation; per optimizer step one copy of the module.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        batch: Any,
        observed: Observed,
        places: Sequence[OutputPlace],
        depends: str,
        separated: Separation,
    ) -> None:
        super().__init__(depends, separated)
        self._trainer, self._batch, self._places, self._observed = trainer, batch, tuple(places), observed
        self.samples = observed.samples
        self._twin: tuple[int, Twin] | None = None

    def __call__(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of a batch of some of the samples.

        Args:
            outputs: u of these samples, (m, ...); the loss is computed in the types of the training step.
            rows: Their numbers, (m,).
        """
        loss = self.on(rows)(outputs).to(outputs.dtype)
        return loss if torch.is_grad_enabled() else loss.detach()

    def on(self, rows: Tensor) -> StepOutputs:
        """Return the loss of a batch of some of the samples as a function of their outputs alone.

        Args:
            rows: Their numbers, (m,).
        """
        every = len(rows) == self.samples and bool((rows.cpu() == torch.arange(self.samples)).all())
        part = self._batch if every else self._observed.some(self._batch, rows)
        return StepOutputs(self._copy(), part, self._places, len(rows), self._observed.batch_idx)

    def derivatives(self, outputs: Tensor, rows: Tensor) -> Point:
        """Return the loss of some of the samples, and its gradient s by their outputs.

        Args:
            outputs: u of these samples, (m, ...).
            rows: Their numbers, (m,).
        """
        return evaluate(self.on(rows), outputs)

    def curvature(self, outputs: Tensor, rows: Tensor, directions: Tensor) -> Tensor:
        """Return S v of some of the samples, see ``curvature_product``.

        Args:
            outputs: u of these samples, (m, ...).
            rows: Their numbers, (m,).
            directions: v, in the shape of u, or several of them.
        """
        return curvature_product(self.on(rows), outputs, directions)

    def leave(self) -> None:
        """Forget the copy of the module; the next evaluation makes another one."""
        self._twin = None

    def _copy(self) -> Twin:
        step = self._trainer.global_step
        if self._twin is None or self._twin[0] != step:
            self._twin = None  # before the next one is made
            with isolated():
                twin = Twin(self._trainer, self._trainer.lightning_module)
                twin.module.eval()
                self._observed.set_up(twin)
            self._twin = step, twin
        return self._twin[1]
