"""``Moment``, ``Moments``: what is computed of a network at the weights of one moment, once for all callbacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.data.batch import to_device
from lightning_conv.callbacks.run.features import LastFeatures, last_features
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.network import RunNetwork
from lightning_conv.callbacks.run.observe_run import copy_of
from lightning_conv.callbacks.run.outputs_on import outputs_on
from lightning_conv.losses.gradient import SampleLoss
from lightning_conv.losses.kind import LossFn
from lightning_conv.networks.batch_norm import BatchStatistics, has_batch_norm
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs

Seen = TypeVar("Seen")


class Moment:
    """The network over a copy of the weights of one moment, and what it makes of the probe.

    Args:
        network: The copy; whatever a forward does to it, the run does not see.
        inputs: The samples of the probe, on its device.
        batch_norm: See ``Probe``.
        head: Name of the last linear layer at an earlier moment; empty: not known.

    Attributes:
        network: The copy.
        inputs: The samples.
        head: Name of the last linear layer; empty: not known.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, batch_norm: BatchNormMode, head: str = "") -> None:
        self.network, self.head = network, head
        self.inputs, self._batch_norm = inputs, batch_norm
        self._loss: tuple[LossFn, Tensor, SampleLoss] | None = None

    @cached_property
    def _seen(self) -> tuple[Tensor, BatchStatistics | None]:
        return outputs_on(self.network, self.inputs, self._batch_norm)

    @property
    def shaped_outputs(self) -> Tensor:
        """Return u in the shape that the network gives, (m, ...), as losses take it."""
        return self._seen[0]

    @property
    def _statistics(self) -> BatchStatistics | None:
        """Return the statistics of the probe in the BatchNorm layers, with ``"frozen"``; None: there are none."""
        return self._seen[1] if self._batch_norm == "frozen" and has_batch_norm(self.network) else None

    def seen_by(self, look: Callable[..., Seen]) -> Seen:
        """Return what a function of network and samples sees, in the mode of BatchNorm that the probe has.

        Args:
            look: Takes network and samples, and ``batch_norm=`` and ``statistics=`` as ``unit_activity`` does.
        """
        return look(self.network, self.inputs, batch_norm=self._batch_norm, statistics=self._statistics)

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
            self._loss = loss_fn, targets, self.seen_by(partial(SampleLoss, targets=targets, loss_fn=loss_fn))
        return self._loss[2]

    @cached_property
    def features(self) -> LastFeatures | str:
        """Return the last hidden features on the probe; a string says why there are none."""
        found = last_features(self.network, self.inputs, self.head)
        self.head = "" if isinstance(found, str) else found.head
        return found


class Moments:
    """Makes the present moment of a run, at most once for the same weights.

    Args:
        trainer: Trainer of the run.
        network: What is measured.
        kind: What a moment is made of.
    """

    def __init__(self, trainer: pl.Trainer, network: RunNetwork, kind: type[Moment] = Moment) -> None:
        self._trainer, self._network, self._kind = trainer, network, kind
        self._now: tuple[tuple[int, ...], Moment] | None = None
        self._head = ""  # name of the last linear layer, where it was found

    @property
    def is_kept(self) -> bool:
        """Return whether there is a copy of the weights."""
        return self._now is not None

    def now(self, inputs: Inputs, batch_norm: BatchNormMode) -> Moment:
        """Return the network over a copy of the weights of now, with what was computed of it so far.

        Args:
            inputs: The samples of the probe.
            batch_norm: See ``Probe``.
        """
        module = self._trainer.lightning_module
        tensors = (*module.parameters(), *module.buffers())
        key = self._trainer.global_step, *(number for each in tensors for number in (each._version, _place(each)))
        if self._now is None or self._now[0] != key:
            self.forget()  # before the next copy is made
            if self._network.sharded:  # no copy of it is right
                network = self._network.probe.network(module)
            else:
                with isolated():
                    network = self._network.network(copy_of(self._trainer, module))
            self._now = key, self._kind(network, to_device(inputs, module.device), batch_norm, self._head)
        return self._now[1]

    def change(self, inputs: Inputs, batch_norm: BatchNormMode) -> None:
        """Keep the copy of the weights, and forget what was computed of it on other samples.

        Args:
            inputs: The samples of the probe from now on.
            batch_norm: See ``Probe``.
        """
        if self._now is not None:
            key, moment = self._now
            on_device = to_device(inputs, self._trainer.lightning_module.device)
            self._now = key, self._kind(moment.network, on_device, batch_norm, moment.head)

    def forget(self) -> None:
        """Forget the copy of the weights."""
        if self._now is not None:
            self._head, self._now = self._now[1].head, None


def _place(tensor: Tensor) -> int:
    """Return where the numbers of a tensor are, which an assignment to ``data`` changes; 0: it has no such place."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, lazy or a subclass
        return 0
