"""``Moment``: what is computed of a network at the weights of one moment, once for all callbacks."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.features import LastFeatures, last_features
from lightning_conv.callbacks.run.outputs_on import outputs_on
from lightning_conv.losses.gradient import SampleLoss
from lightning_conv.losses.kind import LossFn
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs


class Moment:
    """The network over a copy of the weights of one moment, and what it makes of the probe.

    Args:
        network: The copy; whatever a forward does to it, the run does not see.
        inputs: The samples of the probe, on its device.
        batch_norm: See ``Probe``.
        head: Name of the last linear layer at an earlier moment; empty: not known.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, batch_norm: BatchNormMode, head: str = "") -> None:
        self.network, self.head = network, head
        self._inputs, self._batch_norm = inputs, batch_norm
        self._loss: tuple[LossFn, Tensor, SampleLoss] | None = None

    @cached_property
    def shaped_outputs(self) -> Tensor:
        """Return u in the shape that the network gives, (m, ...), as losses take it."""
        return outputs_on(self.network, self._inputs, self._batch_norm)

    @property
    def outputs(self) -> Tensor:
        """Return u, (m, C), in the network's type: the function that the kernel is of (BatchNorm mode, no dropout)."""
        return self.shaped_outputs.reshape(len(self.shaped_outputs), -1)

    def sample_loss(self, targets: Tensor, loss_fn: LossFn) -> SampleLoss:
        """Return the loss on the probe as a function of the weights, in the network's own type.

        Args:
            targets: What the loss takes beside the outputs.
            loss_fn: The loss.
        """
        if self._loss is None or self._loss[0] is not loss_fn or not torch.equal(self._loss[1], targets):
            made = SampleLoss(self.network, self._inputs, targets, loss_fn, batch_norm=self._batch_norm)
            self._loss = loss_fn, targets, made
        return self._loss[2]

    @cached_property
    def features(self) -> LastFeatures | str:
        """Return the last hidden features on the probe; a string says why there are none."""
        found = last_features(self.network, self._inputs, self.head)
        self.head = "" if isinstance(found, str) else found.head
        return found
