"""``Measurement``: one kernel per step on one probe, shared by all monitors with equal settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.run.decisions import Decisions
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.losses.probe_loss import ProbeLoss
from lightning_conv.callbacks.run.losses.run_loss import RunLoss
from lightning_conv.callbacks.run.measured_samples import MeasuredSamples
from lightning_conv.callbacks.run.moment import Moment, Moments
from lightning_conv.callbacks.run.network import RunNetwork
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.probe_kernel import probe_kernel
from lightning_conv.callbacks.run.ranks import Ranks, processes_of
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.callbacks.run.sharded import ShardedMoment
from lightning_conv.callbacks.run.steps import Parameters
from lightning_conv.health.wording import counted, listed
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.networks.inputs import Inputs


class Measurement(MeasuredSamples):
    """The kernel on the samples of a probe, computed at most once per step for all callbacks that share it.

    Args:
        trainer: of the run.
        network: what is measured, on which samples.
        parameters: names, in ``probe.network(...)``, of the parameters that the kernel is over. They stay the same when some are
            frozen later, because kernels over different parameters cannot be compared.
        schedule: decides when to measure.
        per_layer: whether some monitor needs each layer's own kernel.
        loss_fn: the loss of the training step as the user has said it, for ``Probe(outputs="loss")``; None: the one that was observed.
        loss_changed: how the loss was seen to change before the checkpoint; empty: it was not.

    Attributes:
        cotangents: s of the last kernel of the loss gradients, (m, C); None: there was none.
        probe_loss: the loss of the training step on the probe.
        is_bound: whether the kernel is over a subset of the parameters, for a bound of lambda_min of the kernel over all of them.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        network: RunNetwork,
        parameters: Sequence[str],
        schedule: Schedule,
        *,
        per_layer: bool,
        loss_fn: LossFn | None = None,
        loss_changed: str = "",
    ) -> None:
        super().__init__(network)
        self._trainer = trainer
        self._moments = Moments(trainer, network, ShardedMoment if network.sharded else Moment)
        self.decisions = Decisions(trainer, schedule)
        self.parameters, self.schedule, self.per_layer = tuple(parameters), schedule, per_layer
        self.precision: Precision = "fast"  # the one that last resolved lambda_min
        self.highest: Precision = "certified"  # the last one that is tried
        self.is_bound = False
        self.pass_seconds = 0.0  # of a forward and a backward pass of the samples; 0: not timed
        self.choice = ""  # what the budget has chosen, in words; empty: all that was asked for
        self.awaited = 0.0  # predicted seconds of the first kernel, for which the run is not long enough yet
        self._plans: dict[Precision, NTKPlan] = {}  # the last ones
        self._processes = processes_of(trainer)
        self._measured: tuple[int, KernelGram, Spectrum] | None = None
        self._trained: Parameters | None = None
        self.cotangents: Tensor | None = None
        self.probe_loss = ProbeLoss(trainer, network.loss, loss_fn, loss_changed)

    def change(self, probe: Probe, inputs: Inputs, targets: Tensor | None) -> None:
        """Measure other samples, or another kernel, from now on.

        Args:
            probe: The settings.
            inputs: The samples.
            targets: Their targets.
        """
        self._moments.change(inputs, probe.batch_norm)
        self.probe, self.inputs, self.targets, self._measured = probe, inputs, targets, None

    def bound_by(self, parameters: Sequence[str]) -> None:
        """Measure the kernel over a subset of the parameters, which is to bound that over all of them: it has to be certified.

        Args:
            parameters: Their names.
        """
        self.parameters, self.is_bound = tuple(parameters), True

    def is_like(self, other: Measurement) -> bool:
        """Return whether the kernel of the same samples, outputs and BatchNorm mode is measured, whatever the parameters are.

        Args:
            other: Another measurement of the run.
        """
        mine, its = self.probe, other.probe
        if (mine.outputs, mine.batch_norm, mine.parameters) != (its.outputs, its.batch_norm, its.parameters):
            return False
        same, s, t = self.has_samples_of(other), self.cotangents, other.cotangents
        return same and (mine.outputs != "loss" or (s is not None and t is not None and torch.equal(s, t)))

    @property
    def lowest(self) -> Precision:
        """The precision below which nothing is measured."""
        return "certified" if self.is_bound else "fast"

    def words(self, fn: LossFn | None = None) -> str:
        """Return what is measured, for a user: network, loss, and the kernel where it is not the NTK.

        Args:
            fn: The loss as the user has said it.
        """
        words = replace(self.run_network, loss=self.probe_loss.now(fn)).words
        if self.is_bound:
            every = "all trainable parameters" if self.probe.parameters is None else "all those that the Probe names"
            words += (
                f"; the kernel is over {counted(self.weights, 'number')} in {listed(self.parameters, most=8)}, and its lambda_min a lower "
                f"bound of that over {every}"
            )
        if self.probe.outputs != "loss":
            return words
        scale = f"in the scale of the loss on all {self.samples} samples of the probe"
        return f"{words}; the kernel is that of the loss gradients, s_i^T K_ij s_j with s {scale}, and not the NTK"

    def due(self, step: int) -> bool:
        """Decide whether to measure at ``step``, once per step and alike for all callbacks and ranks."""
        known = self.decisions.knows(step)
        due = self.decisions.due(step)
        if not (known or due):
            self.leave()
        return due

    @property
    def rests_until(self) -> float:
        """A moment (``time.monotonic``) before which nothing is to be done; 0: a copy is to be forgotten, or processes decide together."""
        alone = not self._moments.is_kept and self._trainer.world_size == 1
        return self.schedule.rests_until(self._trainer.global_step) if alone else 0.0

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers of the run."""
        return self._trainer.optimizers

    def ends(self, step: int) -> bool:
        """Decide whether the last step is measured, alike for all callbacks and ranks."""
        return self.decisions.last(step, asked=self.has(step) or {"size", "outputs"} <= self.run_network.probe.given)

    def has(self, step: int) -> bool:
        """Return whether the kernel of this step is known."""
        return self._measured is not None and self._measured[0] == step

    def at(self, step: int) -> tuple[KernelGram, Spectrum]:
        """Return kernel and spectrum of the weights after ``step`` optimizer steps."""
        if self._measured is None or not self.has(step):
            self.probe_loss.look_again(step)
            seconds, gram, spectrum = self._compute()
            self.schedule.expect(seconds)
            self.awaited, self._measured = 0.0, (step, gram, spectrum)
        return self._measured[1:]

    @cached_property
    def weights(self) -> int:
        """Number of weights that the kernel is over."""
        named = dict(self.probe.network(self._trainer.lightning_module).named_parameters())
        return sum(named[name].numel() for name in self.parameters)

    @property
    def is_resolved(self) -> bool:
        """Whether lambda_min of the last kernel stands clear of its error."""
        return self._measured is not None and self._measured[2].lambda_min.resolved

    @property
    def plan(self) -> NTKPlan | None:
        """The plan of the last kernel, with its bytes; None: there is none."""
        return self._plans.get(self.precision)

    @property
    def n_outputs(self) -> int | None:
        """Number C of outputs per sample; None before the first kernel."""
        return None if self._measured is None else self._measured[1].n_outputs

    def moment(self) -> Moment:
        """Return the network over a copy of the weights of now, with what was computed of it so far."""
        return self._moments.now(self.inputs, self.probe.batch_norm)

    def network(self) -> nn.Module:
        """Return the network over a copy of the weights of now: whatever a forward does to it, the run does not see."""
        return self.moment().network

    def leave(self) -> None:
        """Forget the copies of the weights; a later call of ``moment`` makes another one."""
        self._moments.forget()
        self.probe_loss.leave()

    def loss(self, fn: LossFn | None = None) -> RunLoss:
        """Return the loss of the training step.

        Args:
            fn: The loss as the user has said it; None: what was observed, or that it has changed since.
        """
        return self.probe_loss.now(fn)

    @property
    def knows_loss(self) -> bool:
        """Whether the gradient of the loss by the outputs can be taken on the probe."""
        return self.probe_loss.is_known(self.targets)

    @property
    def loss_unknown(self) -> str:
        """Why that gradient cannot be taken; empty where it can, or where only the targets are missing."""
        return self.probe_loss.reason

    def trained(self, pl_module: pl.LightningModule) -> Parameters:
        """Return the parameters that plain descent trains: the kernel's, and no others. They are looked up once per fit."""
        if self._trained is None:
            self._trained = Parameters.of(self.probe.network(pl_module), self.parameters)
        return self._trained

    def with_cotangents(self, cotangents: Tensor) -> tuple[KernelGram, Spectrum]:
        """Return the kernel of the present weights with cotangents of another moment, and its spectrum.

        Args:
            cotangents: s, (m, C).

        Cost: a kernel.
        """
        return self._kernel(cotangents)

    def _compute(self) -> tuple[float, KernelGram, Spectrum]:
        """Return the seconds that the next one takes, which does not read the network again, and kernel and spectrum."""
        start, known = time.perf_counter(), bool(self._plans)
        self.cotangents = None
        if self.probe.outputs == "loss":
            self.cotangents = self.probe_loss.gradients(lambda: self.moment().shaped_outputs, self.targets, self.rows)
        gram, spectrum = self._kernel(self.cotangents)
        self.precision = gram.precision
        reading = gram.plan.reading_seconds if gram.plan is not None and not known else 0.0
        return time.perf_counter() - start - reading, gram, spectrum

    def _kernel(self, cotangents: Tensor | None) -> tuple[KernelGram, Spectrum]:
        moment = self.moment()
        if self._processes is not None:  # all compute parts of one kernel: that of the first one's running statistics
            ranks = Ranks(self._trainer)
            ranks.agree_on({name: each for name, each in moment.network.named_buffers() if each.is_floating_point()})
            cotangents = ranks.broadcast(cotangents)
        gram, spectrum = probe_kernel(
            moment,
            self.probe,
            self.parameters,
            step=self._trainer.global_step,
            per_layer=self.per_layer,
            start="certified" if self.is_bound else self.precision,
            highest=self.highest,
            cotangents=cotangents,
            plans=self._plans,
            processes=self._processes,
        )
        if gram.plan is not None:
            self._plans[gram.precision] = gram.plan
        return gram, spectrum
