"""``step_network``: the network of the run as a function of the inputs in a batch, observed in the training step or as the user says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_conv.callbacks.guard.settings import RunFunctions
from lightning_conv.callbacks.guard.shared_twin import SharedTwin
from lightning_conv.callbacks.guard.step_call import At, InputsOfBatch, OneCall, inputs_of_call
from lightning_conv.callbacks.run.call import StepCall
from lightning_conv.callbacks.run.data.batch import InputFn, TargetFn, take_inputs, take_targets
from lightning_conv.callbacks.run.data.training_set import TrainingSet
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated, seed_all
from lightning_conv.callbacks.run.losses.loss_modules import find_loss, loss_modules
from lightning_conv.callbacks.run.losses.run_loss import RunLoss, find_run_loss, given, unknown
from lightning_conv.callbacks.run.network import has_the_outputs_of
from lightning_conv.callbacks.run.observe_run import copy_of
from lightning_conv.callbacks.run.step.observation import observe
from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.step.samples_of_batch import axis_of_length, place_name
from lightning_conv.callbacks.run.step.seeking import NotObservedError
from lightning_conv.callbacks.run.step.step_code import ReplayStep
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.losses.kind import is_loss_module
from lightning_conv.networks.called_by import CalledBy, called_by
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.observed.leaves import tensors_in
from lightning_conv.networks.observed.replay import Given, OutputPlace, Replay
from lightning_conv.networks.undisturbed import undisturbed

SAMPLES = 16
"""Number of samples on which the training step is observed, at most."""

OTHERS = 4
"""Number of other batches of as many samples on which the loss that was found is tried."""


@dataclass(frozen=True)
class StepNetwork:
    """How a run calls its network, and its loss.

    Attributes:
        network: Module that is called on the inputs: the network over a copy of the module that has the weights of the run.
        twin: This copy; None: the module cannot be copied, and the network calls it itself.
        direct: The same network over the module of the run itself; None: the training step is the network.
        outputs: Where the outputs are made, for a user.
        prefix: What the names of the LightningModule's parts begin with in it.
        input_fn: Function that takes the inputs out of a batch; None: ``take_inputs`` does.
        target_fn: Function that takes the targets out of a batch; None: ``take_targets`` does.
        loss: Loss of the training step. Where it is unknown, its ``fn`` is the one loss module that the LightningModule has: what the step
            minimises is compared with it, and nothing is claimed where they differ.
        called: How the network was found, for a user.
        unseen: Why the training step could not be observed; empty: it was.
    """

    network: nn.Module
    twin: SharedTwin | None
    direct: nn.Module | None
    outputs: tuple[str, ...]
    prefix: str
    input_fn: InputFn | None
    target_fn: TargetFn | None
    loss: RunLoss
    called: str
    unseen: str = ""

    def as_usual(self, module: pl.LightningModule) -> StepNetwork:
        """Return the usual call of the module, for a loss that depends on more than one result; all of the claim is compared with the step.

        Args:
            module: Module of the run.
        """
        found = _as_said(RunFunctions())
        own = module if self.twin is None else self.twin.module
        loss = replace(unknown(f"it depends on {' and '.join(map(repr, self.outputs))} together"), fn=find_loss(module))
        loss = self.loss if self.loss.source == "given" else loss
        return replace(self, network=own, direct=module, prefix="", input_fn=None, loss=loss, called=found.words)

    @property
    def words(self) -> str:
        """How network and loss were found, for a user."""
        compared = ""
        if self.loss.source == "unknown" and self.loss.fn is not None:
            compared = f"; it is compared with {self.loss.kind.name}, which the module has"
        return f"the network is {self.called}; {self.loss.words}{compared}"


def step_network(
    trainer: pl.Trainer, module: pl.LightningModule, functions: RunFunctions, data: TrainingSet
) -> StepNetwork:
    """Return the network of a run, and its loss: what the user says, and for the rest what is observed in the training step.

    The step is run on a copy of the module, on ``SAMPLES`` samples (``observe``). Where the network is one call on tensors of the batch, as
    in ``self(batch["x"], mask=batch["mask"])``, it is that call. Otherwise, as in ``self.head(self.body(x))``, it is the step itself up to
    the call that returns the outputs. It runs on a copy that shares the weights of the run, so that nothing else of the module changes.

    Where the step cannot be observed, the module is called on ``batch[0]`` or what else is usual, and the loss is unknown.

    Args:
        trainer: Trainer of the run.
        module: Module that it trains.
        functions: Functions of the user that read the run; they win.
        data: The training set.

    Cost: up to four copies of the weights, one at a time, and what ``observe`` and ``find_run_loss`` take.
    """
    by_user = functions.forward_fn is not None or functions.input_fn is not None
    target_fn, usual = functions.target_fn, _as_said(functions)
    found = usual
    outputs: tuple[str, ...] = ()
    shared: SharedTwin | None = None
    with attempted(Exception):  # a module that cannot be copied
        shared = SharedTwin(trainer, module)
    with attempted(Exception) as attempt, isolated():  # the step is any code of the user's
        batch, count = data.few(SAMPLES)
        seed_all(0)
        twin = copy_of(trainer, module)
        twin.watched = 0 if len(trainer.optimizers) == 1 else None
        observed = observe(twin, batch, count)
        trained = [name for name, each in module.named_parameters() if each.requires_grad]
        own = loss_modules(module)
        loss = find_run_loss(
            trainer, twin, observed, batch, own, lambda some: take_targets(some, functions.target_fn), trained
        )
        if loss.source == "observed" and not (is_loss_module(loss.fn) or any(loss.fn is each for each in own)):
            loss = unknown(f"it is {loss.kind.described}, and the guarantee is for a loss of torch as it is")
        target_fn, loss = _targets(functions, loss, batch)
        loss = _on_other_samples(twin, observed, loss, target_fn, data)
        outputs = tuple(dict.fromkeys(each.name for each in observed.outputs))
    unseen = attempt.reason
    if attempt.failed:
        loss = unknown(f"the training step could not be observed ({unseen})")
    elif not by_user:
        with attempted(Exception) as calling, isolated():
            called = _called(copy_of(trainer, module), observed, batch)
            found = replace(called, words=f"{observed.words} (observed)")
            with attempted(Exception):  # the module may have no forward
                if called.in_step and _has_the_same_outputs(copy_of(trainer, module), usual, observed, batch):
                    found = replace(usual, words=f"{observed.words}, as does calling it (observed)")
        unseen = calling.reason
    if not attempt.failed and (by_user or unseen) and loss.source == "observed":
        with attempted(Exception) as comparing, isolated():
            loss = _of_other_network(copy_of(trainer, module), found, observed, loss, batch)
        if comparing.failed:
            loss = unknown(f"the outputs could not be compared with those of the training step ({comparing.reason})")
    if functions.loss_fn is not None:
        loss = given(functions.loss_fn, loss)
    elif loss.source == "unknown":
        loss = replace(loss, fn=find_loss(module))
    network = found.over(module if shared is None else shared.module)
    direct = None if found.in_step else found.over(module)
    prefix = "module." if isinstance(network, CalledBy) else ""
    return StepNetwork(network, shared, direct, outputs, prefix, found.input_fn, target_fn, loss, found.words, unseen)


@dataclass(frozen=True)
class _Found:
    """How the network is called."""

    over: Callable[[pl.LightningModule], nn.Module]  # the network over a module
    input_fn: InputFn | None
    words: str = ""
    in_step: bool = False  # whether the training step is the network


def _as_said(functions: RunFunctions) -> _Found:
    """Return the call that the user says, or the usual one."""
    by_user = functions.forward_fn is not None or functions.input_fn is not None
    said = "called as input_fn and forward_fn say (given)" if by_user else "called on what batches usually begin with"
    return _Found(lambda module: called_by(module, functions.forward_fn), functions.input_fn, said)


def _targets(functions: RunFunctions, loss: RunLoss, batch: Any) -> tuple[TargetFn | None, RunLoss]:
    """Return what takes the targets out of a batch, and the loss; a loss of other targets than the user's is not known."""
    if functions.target_fn is not None:
        said = take_targets(batch, functions.target_fn)
        if loss.targets is not None and not (said is not None and torch.equal(said, loss.targets)):
            loss = unknown("the training step compares its outputs with other targets than target_fn gives")
        return functions.target_fn, loss
    place = next((place for place, each in tensors_in(batch) if each is loss.targets), None)
    return (None if place is None else At(place)), loss


def _on_other_samples(
    twin: Twin, observed: Observed, loss: RunLoss, target_fn: TargetFn | None, data: TrainingSet
) -> RunLoss:
    """Return the loss that was observed, if the step has its value on other samples, too: class weights may not show on a few."""
    if loss.source != "observed" or observed.source is None:
        return loss
    twin.module.eval()
    with isolated():
        for seed in range(1, OTHERS + 1):
            batch, _ = data.few(SAMPLES, seed)
            seed_all(0)
            seen = StepCall(twin, observed.source.name, batch, place=observed.source.place).observe()
            targets = take_targets(batch, target_fn)
            assert targets is not None
            u, stepped = seen.outputs.detach(), float(seen.loss.detach())
            value = float(loss.kind.evaluate(u.double(), targets).mean())
            if not abs(value - stepped) <= torch.finfo(u.dtype).eps ** 0.5 * max(abs(value), abs(stepped), 1e-6):
                return unknown(
                    f"it is {loss.kind.name} on some samples, and {stepped:.6g} instead of {value:.6g} on others"
                )
    return loss


def _of_other_network(twin: Twin, found: _Found, observed: Observed, loss: RunLoss, batch: Any) -> RunLoss:
    """Return the loss that was observed, if the network that is called in another way has the outputs that it is a function of."""
    if _has_the_same_outputs(twin, found, observed, batch):
        return loss
    return unknown("the network that is called here has other outputs than that of the training step")


def _has_the_same_outputs(twin: Twin, found: _Found, observed: Observed, batch: Any) -> bool:
    return has_the_outputs_of(observed, twin, found.over(twin.module), take_inputs(batch, found.input_fn))


def _require_uncoupled(network: nn.Module, inputs: Inputs) -> None:
    """Require that the outputs of a sample are the same among fewer samples.

    Raises:
        NotObservedError: They are others, as where samples are mixed before they enter.
    """
    samples = sample_count(inputs)
    module, half = StatelessModule(network), slice((samples + 1) // 2)
    with undisturbed(network), torch.no_grad():
        whole, less = (module.outputs({}, module.convert(some)) for some in (inputs, take(inputs, half)))
    if not torch.allclose(whole[half], less, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
        raise NotObservedError("the outputs of a sample depend on the other samples of its batch")


def _called(twin: Twin, observed: Observed, batch: Any) -> _Found:
    """Return how the observed network is called, and what takes its inputs out of a batch."""
    if observed.call is not None:
        taken = inputs_of_call(twin, observed, batch)
        if taken is not None:
            made = observed.inputs()
            inputs = InputsOfBatch(taken, bare=isinstance(made, Tensor), row=isinstance(made, tuple))
            if observed.network(twin) is twin.module:
                return _Found(lambda module: module, inputs)
            call = OneCall(observed.call, observed.given, observed.outputs[0])
            return _Found(lambda module: CalledBy(module, call), inputs)
    if observed.random:
        raise NotObservedError("the training step draws random numbers")
    if observed.given.lists or observed.carried:
        raise NotObservedError("the outputs are no function of tensors with a row for each sample")
    outputs = observed.outputs if observed.call is None else (_in_step(observed),)
    axes = {
        place: axis for place, each in tensors_in(batch) if (axis := axis_of_length(each, observed.samples)) is not None
    }
    whole = Given(batch, {place_name(place): place for place in axes}, axes)
    places = {name: (place, axes[place]) for name, place in whole.samples.items()}
    _require_uncoupled(Replay(twin.module, ReplayStep(), whole, outputs), InputsOfBatch(places)(batch))
    return _Found(lambda module: Replay(module, ReplayStep(), whole, outputs), InputsOfBatch(places), in_step=True)


def _in_step(observed: Observed) -> OutputPlace:
    """Return where the outputs stand in the step, for a network that is one call."""
    assert observed.source is not None  # there is one output
    return observed.source
