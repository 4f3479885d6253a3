"""``FirstBatch``: whether the training step minimises the loss that the guard knows, seen on the first batch of phase 2."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_conv.anatomy import Head
from lightning_conv.callbacks.batch import InputFn, take_inputs
from lightning_conv.callbacks.guard.caveats import ROUNDED
from lightning_conv.callbacks.guard.head_steps import HeadWeights
from lightning_conv.callbacks.guard.training_loss import TrainingLoss
from lightning_conv.callbacks.guard.training_set import TrainingSet
from lightning_conv.evaluation import StatelessModule, undisturbed

AGREEMENT = 1e-3
"""Relative difference up to which the loss of the training step counts as that of ``loss_fn``, in a float32 run."""


class FirstBatch:
    """Compares once.

    Args:
        trainer: of the run.
        network: that takes the inputs.
        head: of the network.
        data: the training set.
        loss: on it.
        input_fn: see ``Probe``.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        network: nn.Module,
        head: Head,
        data: TrainingSet,
        loss: TrainingLoss,
        input_fn: InputFn | None,
    ) -> None:
        self._trainer, self._network, self._head, self._data, self._loss = trainer, network, head, data, loss
        self._input_fn = input_fn
        self._done, self._expected = loss.loss_fn is None, math.nan
        self._before: list[torch.Tensor] = []  # the head before the first step that nothing has been compared for

    def before(self, batch: Any) -> None:
        """Compute the loss of the first batch by ``loss_fn``."""
        if self._done:
            return
        self._before = [parameter.detach().clone() for parameter in HeadWeights(self._head).parameters]
        inputs = take_inputs(batch, self._input_fn)
        try:
            with undisturbed(self._network), torch.no_grad():
                module = StatelessModule(self._network)
                outputs = module.call({}, module.convert(inputs))
            assert isinstance(outputs, torch.Tensor)
            self._expected = self._loss.of(outputs.cpu().double(), self._loss.targets_of(batch).cpu())["loss"]
            if getattr(self._loss.loss_fn, "reduction", "mean") == "sum":
                self._expected *= len(outputs)
        except Exception:  # the loss of the training set cannot be measured either, which is said there
            self._expected = math.nan

    def after(self, stepped: float) -> str | None:
        """Hold the loss of the training step against it; what to say if they differ on any rank.

        Args:
            stepped: loss of the training step; NaN: not known.
        """
        if self._done:
            return None
        self._done = True
        allowed = (0.1 if str(self._trainer.precision) in ROUNDED else AGREEMENT) * max(abs(self._expected), 1e-3)
        apart = abs(stepped - self._expected) > allowed  # not so if one of them is not known
        if not any(self._data.ranks.gather(lambda: apart)):
            self._before = []
            return None
        return (
            f"the training step minimises something else than the mean of {self._loss.name} ({stepped:.6g} instead of "
            f"{self._expected:.6g} on the first batch of phase 2)"
        )

    @torch.no_grad()
    def take_back(self) -> None:
        """Put the head back to where it was before the first batch."""
        for parameter, before in zip(HeadWeights(self._head).parameters, self._before, strict=True):
            parameter.copy_(before)
        self._before = []
