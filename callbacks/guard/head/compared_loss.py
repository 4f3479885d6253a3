"""``ComparedLoss``: whether the training step minimises the loss that the guard knows, seen on a batch of every epoch of phase 2."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_conv.callbacks.guard.certify.caveats import ROUNDED
from lightning_conv.callbacks.guard.head.head_steps import HeadWeights
from lightning_conv.callbacks.guard.head.training_loss import TrainingLoss
from lightning_conv.callbacks.run.batch import InputFn, take_inputs
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.networks.evaluation import StatelessModule, undisturbed
from lightning_conv.networks.head import Head

AGREEMENT = 1e-3
"""Relative difference up to which the loss of the training step counts as that of ``loss_fn``, in a float32 run."""


class ComparedLoss:
    """Compares on the first batch, and on the next one whenever it is asked to, until the two differ.

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
        self._known = loss.loss_fn is not None
        self._wanted, self._expected = self._known, math.nan
        self._targets: torch.Tensor | None = None
        self._shape: torch.Size | None = None  # of a sample's outputs, once they were computed
        self._seen: list[torch.Tensor] = []  # outputs of the head in the training step
        self._hook: RemovableHandle | None = None
        self._before: list[torch.Tensor] = []  # the head before the step of the batch that is compared

    def again(self) -> None:
        """Compare on the next batch, too: a term of the loss may set in later."""
        self.release()
        self._wanted = self._known

    def before(self, batch: Any) -> None:
        """Compute the batch's loss by ``loss_fn``, if it is to be compared: by a forward pass, later by what the training step makes."""
        if not self._wanted:
            return
        self.release()  # a batch that was skipped (``on_train_batch_start`` gave -1) has no end
        self._before = [parameter.detach().clone() for parameter in HeadWeights(self._head).parameters]
        self._expected = math.nan
        try:
            self._targets = self._loss.targets_of(batch)
            if self._shape is not None and self._head.last:
                self._hook = self._head.module.register_forward_hook(self._look)
                return
            with undisturbed(self._network), torch.no_grad():
                module = StatelessModule(self._network)
                outputs = module.call({}, module.convert(take_inputs(batch, self._input_fn)))
            assert isinstance(outputs, torch.Tensor)
            self._shape = outputs.shape[1:]
            self._expected = self._loss_of(outputs)
        except Exception:  # the loss of the training set cannot be measured either, which is said there
            return

    def _look(self, module: nn.Module, inputs: Any, outputs: torch.Tensor) -> None:
        self._seen.append(outputs.detach().clone())

    def _loss_of(self, outputs: torch.Tensor) -> float:
        assert self._targets is not None
        found = self._loss.of(outputs.cpu().double(), self._targets.cpu())["loss"]
        return found * (len(outputs) if getattr(self._loss.loss_fn, "reduction", "mean") == "sum" else 1)

    def after(self, loss: torch.Tensor | None) -> str | None:
        """Hold the loss of the training step against it; what to say if they differ on any rank.

        Args:
            loss: of the training step; None: not known. Read only where it is compared: the device need not be waited for otherwise.
        """
        if not self._wanted:
            return None
        self._wanted, stepped = False, math.nan if loss is None else float(loss)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            if len(self._seen) == 1 and self._shape is not None:  # a step that runs the head twice is not looked into
                with suppress(Exception):
                    self._expected = self._loss_of(self._seen[0].reshape(len(self._seen[0]), *self._shape))
            self._seen = []
        allowed = (0.1 if str(self._trainer.precision) in ROUNDED else AGREEMENT) * max(abs(self._expected), 1e-3)
        apart = abs(stepped - self._expected) > allowed  # not so if one of them is not known
        if not any(self._data.ranks.gather(lambda: apart)):
            self._before = []
            return None
        self._known = False
        return (
            f"the training step minimises something else than the mean of {self._loss.name} ({stepped:.6g} instead of "
            f"{self._expected:.6g} on a batch at step {self._trainer.global_step})"
        )

    def release(self) -> None:
        """Leave nothing on the head, and keep nothing that it made."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._seen = None, []

    @torch.no_grad()
    def take_back(self) -> None:
        """Put the head back to where it was before that batch."""
        for parameter, before in zip(HeadWeights(self._head).parameters, self._before, strict=True):
            parameter.copy_(before)
        self._before = []
