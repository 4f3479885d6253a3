"""``GuardView``: a run as the guard sees it: network, head, training set and loss."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.training_loss import TrainingLoss
from lightning_conv.callbacks.run.probe import cannot_call
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.networks.head import Head, called_by, find_head
from lightning_conv.networks.inputs import Inputs


@dataclass(frozen=True)
class GuardView:
    """A run that is about to train, with its network split into trunk and head."""

    trainer: pl.Trainer
    module: pl.LightningModule
    network: nn.Module  # called on the inputs: the module itself, or a wrapper that calls ``forward_fn`` on it
    head: Head  # of the network
    data: TrainingSet
    loss: TrainingLoss  # on the training set

    @classmethod
    def of(cls, trainer: pl.Trainer, module: pl.LightningModule, settings: GuardSettings) -> GuardView:
        """Find network, head, training set and loss of a run.

        Args:
            trainer: Trainer of the run.
            module: Module that it trains.
            settings: Settings of the guard.

        Raises:
            MisconfigurationException: The data have no random access, or there is no usable head, see ``usable_head``.
        """
        network, name = called_by(module, settings.forward_fn), settings.head
        data = TrainingSet(trainer, settings.input_fn, Ranks(trainer))
        if name is not None and network is not module:
            name = f"module.{name}"
        head = usable_head(trainer, module, network, data.first_inputs(), name)
        return cls(trainer, module, network, head, data, TrainingLoss(module, data, head, settings))

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.data.ranks

    @property
    def head_name(self) -> str:
        """The dotted name of the head in the LightningModule."""
        return self.head.name if self.network is self.module else self.head.name.removeprefix("module.")

    @property
    def not_whole(self) -> str:
        """The reason why a step is not one on the mean loss of the whole training set, or an empty string; ranks do not communicate."""
        accumulated = self.data.sampling.accumulated
        # torch normalises class weights within a batch, so the mean over batches differs from the loss on the whole set.
        if self.loss.kind.weighted and (accumulated or 2) * self.ranks.world > 1:
            return "class weights are divided batch by batch, so that a step is not that of the whole set"
        if accumulated is None or not self.data.steps_are_whole(accumulated):
            return "the steps are those of mini-batches, whose bounds hold in expectation"
        return ""

    @property
    def head_parameters(self) -> list[Tensor]:
        """The parameters that phase 2 trains: the weight of the head, and its bias if that requires a gradient."""
        return [self.head.module.weight, *([self.head.module.bias] if self.head.has_bias else [])]


def usable_head(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, inputs: Inputs, name: str | None
) -> Head:
    """Return the head that phase 2 trains.

    Args:
        trainer: Trainer of the run.
        pl_module: Module that it trains.
        network: Module that is called on the inputs.
        inputs: A batch of inputs.
        name: Dotted name of the head in the network; None: it is searched for.

    Raises:
        MisconfigurationException: There are several optimizers, the network cannot be called, it has no usable linear head, or
            the optimizer does not train the head.
    """
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"ExpressivityGuard: {len(trainer.optimizers)} optimizers, but phase 2 is one problem, the head's, for one of them; return one "
            "from configure_optimizers, with a parameter group for each part of the network that needs its own settings"
        )
    try:
        head = find_head(network, inputs, name)
    except ValueError as error:
        raise MisconfigurationException(f"ExpressivityGuard: {error}") from error
    except (TypeError, NotImplementedError, RuntimeError) as error:
        raise MisconfigurationException(f"ExpressivityGuard: {cannot_call(pl_module, error)}") from error
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    if not head.module.weight.requires_grad or id(head.module.weight) not in optimized:
        raise MisconfigurationException(
            f"head: {head.name!r} is frozen or not in the optimizer, so phase 2 would train nothing; let the optimizer have it"
        )
    return head
