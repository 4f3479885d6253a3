"""``GuardView``: a run as the guard sees it: network, head, training set and loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_conv.callbacks.guard.refusal import cannot_be_called, several_heads, without_prefix
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.step_network import StepNetwork, step_network
from lightning_conv.callbacks.guard.training_loss import TrainingLoss
from lightning_conv.callbacks.run.data.training_set import TrainingSet
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.losses.run_loss import unknown
from lightning_conv.callbacks.run.network import is_lazy
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.networks.head import Head, find_head


@dataclass(frozen=True)
class GuardView:
    """A run that is about to train, with its network split into trunk and head."""

    trainer: pl.Trainer
    module: pl.LightningModule
    found: StepNetwork  # how it calls its network
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
        if is_lazy(module):
            raise MisconfigurationException(
                "ExpressivityGuard: the module has lazy layers, whose weights have no shape yet; let one batch pass before the fit: "
                "module.training_step(next(iter(loader)), 0)"
            )
        data, name = TrainingSet(trainer, settings.input_fn, Ranks(trainer)), settings.head
        found = step_network(trainer, module, settings, data)
        try:
            head = usable_head(trainer, module, found, data.reading(found.input_fn), name)
        except MisconfigurationException:
            if len(found.outputs) < 2 or settings.forward_fn is not None or settings.input_fn is not None:
                raise
            usual = found.as_usual(module)
            with attempted(Exception) as attempt:
                head, found = usable_head(trainer, module, usual, data, name), usual
            if attempt.failed:
                raise
        data = data.reading(found.input_fn)
        if head.rows > 1:
            said = f"the head has {head.rows} rows of features for each sample, and the loss is not taken apart by rows"
            found = replace(found, loss=unknown(said))
        loss = TrainingLoss(found.loss, found.target_fn, data, head, settings)
        return cls(trainer, module, found, head, data, loss)

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.data.ranks

    @property
    def network(self) -> nn.Module:
        """The network, called on the inputs, as the run has it now."""
        if self.found.twin is not None:
            self.found.twin.refresh()
        return self.found.network

    @property
    def prefix(self) -> str:
        """What the names of the module's parts begin with in the network."""
        return self.found.prefix

    @property
    def words(self) -> str:
        """How network and loss were found."""
        return self.found.words

    @property
    def head_name(self) -> str:
        """The dotted name of the head in the LightningModule."""
        return self.head.name.removeprefix(self.prefix)

    @property
    def layer(self) -> nn.Linear:
        """The head in the LightningModule, which the run calls; it has the weights of ``head.module``."""
        layer = self.module.get_submodule(self.head_name)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def rows(self) -> int:
        """Number n of rows of features: of samples, or of tokens where the head is applied to each token."""
        return self.data.size * self.head.rows

    def same_inputs(self, i: int, j: int) -> bool:
        """Return whether rows i and j of the features come of the same input, whatever the weights.

        Args:
            i: Number of a row.
            j: Number of another one.
        """
        each = self.head.rows
        return i % each == j % each and self.data.same_inputs(i // each, j // each)

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
    trainer: pl.Trainer, pl_module: pl.LightningModule, found: StepNetwork, data: TrainingSet, name: str | None
) -> Head:
    """Return the head that phase 2 trains.

    Args:
        trainer: Trainer of the run.
        pl_module: Module that it trains.
        found: Its network.
        data: The training set.
        name: Dotted name of the head in the LightningModule; None: it is searched for.

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
        named = None if name is None else f"{found.prefix}{name}"
        head = find_head(found.network, data.first_inputs(), named, tokens=True)
    except ValueError as error:
        said = without_prefix(str(error), found.prefix)
        if len(found.outputs) > 1:
            said = several_heads(found.outputs)
        raise MisconfigurationException(f"ExpressivityGuard: {said}") from error
    except (TypeError, NotImplementedError, RuntimeError, LookupError, MisconfigurationException) as error:
        raise MisconfigurationException(cannot_be_called(trainer, data, found.unseen, error)) from error
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    if not head.module.weight.requires_grad or id(head.module.weight) not in optimized:
        raise MisconfigurationException(
            f"ExpressivityGuard: head: {head.name.removeprefix(found.prefix)!r} is frozen or not in the optimizer, so phase 2 would train "
            "nothing; let the optimizer have it"
        )
    return head
