"""``RunNetwork``: the network that is measured, and its samples; observed in the training step, or as the user has said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_conv.callbacks.run.data.batch import take_inputs, take_targets
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.losses.run_loss import RunLoss, unknown
from lightning_conv.callbacks.run.observe_run import copy_of, observe_run
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs, input_tensors, map_inputs, sample_count, spread
from lightning_conv.networks.observed.sample_lists import same_rest
from lightning_conv.networks.sharded import is_sharded
from lightning_conv.networks.state import restored
from lightning_conv.networks.undisturbed import undisturbed


@dataclass(frozen=True)
class RunNetwork:
    """The network of a run, and the samples on which it is measured.

    Attributes:
        probe: Its settings.
        inputs: The samples, on the CPU.
        targets: Their targets; None: not known.
        loss: The loss of the training step as a function of the network's outputs.
        observed: How the training step calls its network; None: the user has said it, by ``forward_fn``, ``input_fn`` or ``inputs``.
        asked: Number of samples that were asked for, where fewer were read, as the network is slow; None: all were.
        numbers: Number of each sample in the training set; None: the samples are not read from it now, or not by number.
        sharded: Whether its parameters are divided among processes, so that it is measured itself and not a copy of it.
    """

    probe: Probe
    inputs: Inputs
    targets: Tensor | None
    loss: RunLoss
    observed: Observed | None = None
    asked: int | None = None
    numbers: tuple[int, ...] | None = None
    sharded: bool = False

    @property
    def words(self) -> str:
        """How network and loss were found, for a user."""
        called = "called as the Probe says (given)" if self.observed is None else f"{self.observed.words} (observed)"
        if self.sharded:
            called = "sharded, and called by its forward on what a batch begins with, or as the Probe says"
        of = "" if self.probe.optimizer is None else f" of {self.probe.optimizer}"
        return f"the network{of} is {called}; {self.loss.words}"

    def network(self, twin: Twin) -> nn.Module:
        """Return the network over the weights of a copy of the module.

        Args:
            twin: The copy, in eval mode.
        """
        return self.probe.network(twin.module) if self.observed is None else self.observed.network(twin)

    def on(self, stored: Inputs, targets: Tensor | None) -> RunNetwork:
        """Return the same network with samples from a checkpoint.

        Args:
            stored: The samples.
            targets: Their targets.

        Raises:
            MisconfigurationException: They are not what the network of this run takes.
        """
        now, then = input_tensors(self.inputs), input_tensors(stored)
        if [each.shape[1:] for each in now] != [each.shape[1:] for each in then]:
            raise MisconfigurationException(
                f"Probe: the checkpoint has samples of the shapes {[tuple(each.shape) for each in then]}, and the training step takes "
                f"{[tuple(each.shape) for each in now]}; begin a new run, or pass Probe(inputs=...)"
            )
        if isinstance(stored, Mapping) and isinstance(self.inputs, Mapping) and not same_rest(self.inputs, stored):
            raise MisconfigurationException(
                "Probe: the checkpoint is from a run whose probe had other samples, such as other texts; begin a new run"
            )
        loss = self.loss
        if loss.own is not None and not _are_among(stored, self.inputs):
            loss = unknown(
                "the samples of the checkpoint are not those that are read now, and the step's own loss is that of a batch"
            )
        return replace(self, inputs=stored, targets=targets, loss=loss, numbers=None)


def _are_among(some: Inputs, every: Inputs) -> bool:
    """Return whether samples are those that ``spread`` takes of others."""
    chosen = input_tensors(spread(every, sample_count(some)))
    pairs = list(zip(chosen, input_tensors(some), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b.to(a.device)) for a, b in pairs)


def network_of(
    trainer: pl.Trainer, probe: Probe, parameters: Sequence[str], batch: Any, samples: int, *, may_be_few: bool = False
) -> RunNetwork:
    """Find the network of a run, and its loss, on a batch.

    Args:
        trainer: Trainer of the run.
        probe: The settings; its seed is that of the random numbers that the step may draw.
        parameters: Names of those that the kernel is over, with or without a gradient in the run.
        batch: Samples as the training step gets them.
        samples: Their number.
        may_be_few: Whether ``FEW`` of the samples are enough where the step takes longer than ``SLOW`` for them.

    Raises:
        NotObservedError, NotATwinError, ...: The step cannot be observed on a copy, and the Probe does not say how the network is called.
    """
    if is_sharded(trainer.lightning_module):
        unseen = unknown(
            "the parameters are sharded, so that the training step is not observed on a copy of the module"
        )
        given = take_inputs(batch, probe.input_fn)
        # All processes evaluate one network on the same samples, also where each reads others.
        read = trainer.strategy.broadcast(kept(given, _targets(batch, probe, unseen), probe.size))
        return RunNetwork(probe, *read, unseen, sharded=True)
    if not probe.is_given:
        found = observe_run(trainer, probe, parameters, batch, samples, may_be_few=may_be_few)
        inputs = found.observed.inputs()
        asked = samples if found.samples < samples else None
        targets = _targets(found.batch, probe, found.loss)
        return RunNetwork(probe, *kept(inputs, targets, sample_count(inputs)), found.loss, found.observed, asked)
    inputs = take_inputs(batch, probe.input_fn)
    with attempted(Exception) as attempt:
        found = observe_run(trainer, probe, parameters, batch, samples)
        loss = _of_given(trainer, probe, found.observed, found.loss, inputs)
    if attempt.failed:
        loss = unknown(f"the training step could not be observed ({attempt.error})")
    return RunNetwork(probe, *kept(inputs, _targets(batch, probe, loss), probe.size), loss)


def _targets(batch: Any, probe: Probe, loss: RunLoss) -> Tensor | None:
    """Return the targets: those that the user says, those of the loss that was observed, or those that a batch usually has."""
    if probe.target_fn is not None or loss.targets is None:
        return take_targets(batch, probe.target_fn)
    return loss.targets


def _of_given(trainer: pl.Trainer, probe: Probe, observed: Observed, loss: RunLoss, inputs: Inputs) -> RunLoss:
    """Return the loss that was observed if the step's network has the outputs of the given one, where both take the same batch."""
    twin = copy_of(trainer, trainer.lightning_module)
    if has_the_outputs_of(observed, twin, probe.network(twin.module), inputs, probe.batch_norm):
        return loss
    return unknown("the network that the Probe gives has other outputs than that of the training step")


def has_the_outputs_of(
    observed: Observed, twin: Twin, network: nn.Module, inputs: Inputs, batch_norm: BatchNormMode = "eval"
) -> bool:
    """Return whether the network of the training step has the outputs of another one, where both take the same batch.

    Args:
        observed: The network of the step.
        twin: A copy of the module, in eval mode.
        network: The other one, over this copy.
        inputs: What the other one takes of the batch.
        batch_norm: See ``Probe``.

    Cost: a forward pass of each.
    """
    own = observed.network(twin)
    others = StatelessModule(network, batch_norm=batch_norm, statistics_of=inputs)
    mine = StatelessModule(own, batch_norm=batch_norm, statistics_of=observed.inputs())
    with isolated(), restored(network), restored(own), undisturbed(network), undisturbed(own), torch.no_grad():
        u, v = others.outputs({}, others.convert(inputs)), mine.outputs({}, mine.convert(observed.inputs()))
    return u.shape == v.shape and torch.allclose(u, v, rtol=1e-4, atol=1e-6 * float(v.abs().max()))


def kept(inputs: Inputs, targets: Tensor | None, size: int) -> tuple[Inputs, Tensor | None]:
    """Return the first samples and their targets as copies on the CPU."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor[:size].detach().cpu().clone()

    return map_inputs(copied, inputs), None if targets is None else copied(targets)


def is_lazy(module: nn.Module) -> bool:
    """Return whether parameters have no shape yet, because no sample has passed through their layers."""
    return any(isinstance(each, UninitializedParameter) for each in module.parameters())
