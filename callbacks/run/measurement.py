"""``Measurement``: one kernel per step on one probe, shared by all monitors with equal settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.run.data.batch import to_device
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.losses.probe_loss import ProbeLoss
from lightning_conv.callbacks.run.losses.run_loss import RunLoss
from lightning_conv.callbacks.run.moment import Moment
from lightning_conv.callbacks.run.network import RunNetwork
from lightning_conv.callbacks.run.observe_run import copy_of
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.callbacks.run.steps import Parameters
from lightning_conv.health.wording import counted, listed
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.kernels.resolve import resolved_spectrum
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.networks.inputs import Inputs, input_tensors, sample_count, spread
from lightning_conv.reporting.progress import Lines

PAUSE = 10.0
"""Seconds after which a measurement that takes long says how far it is; training has the bar."""


class Measurement:
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
        self.run_network, self.probe, self.inputs, self.targets = (
            network,
            network.probe,
            network.inputs,
            network.targets,
        )
        self._trainer = trainer
        self._moment: tuple[tuple[int, ...], Moment] | None = None
        self._head = ""  # name of the last linear layer, where it was found
        self.parameters, self.schedule, self.per_layer = tuple(parameters), schedule, per_layer
        self.precision: Precision = "fast"  # the one that last resolved lambda_min
        self.highest: Precision = "certified"  # the last one that is tried
        self.is_bound = False
        self.pass_seconds = 0.0  # of a forward and a backward pass of the samples; 0: not timed
        self.awaited = 0.0  # predicted seconds of the first kernel, for which the run is not long enough yet
        self._plans: dict[Precision, NTKPlan] = {}  # the last ones
        self._decisions: dict[int, bool] = {}
        self._ends: dict[int, bool] = {}
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
        if self._moment is not None:  # the copy of the weights stays, and what was computed of it goes
            key, moment = self._moment
            device = self._trainer.lightning_module.device
            self._moment = key, Moment(moment.network, to_device(inputs, device), probe.batch_norm, moment.head)
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
        same = _are_equal(input_tensors(self.inputs), input_tensors(other.inputs))
        if mine.outputs != "loss":
            return same
        s, t = self.cotangents, other.cotangents
        return same and s is not None and t is not None and torch.equal(s, t)

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
        scale = f"in the scale of the loss on all {self._samples} samples of the probe"
        return f"{words}; the kernel is that of the loss gradients, s_i^T K_ij s_j with s {scale}, and not the NTK"

    def due(self, step: int, trainer: pl.Trainer) -> bool:
        """Decide whether to measure at ``step``, once per step and alike for all callbacks and ranks."""
        if step not in self._decisions:
            decision = self.schedule.due(step)
            if self.schedule.every_n_steps is None:
                decision = self.decided(decision)
            self._decisions = {step: decision}
            if not decision:
                self.leave()
        return self._decisions[step]

    @property
    def rests_until(self) -> float:
        """A moment (``time.monotonic``) before which nothing is to be done; 0: a copy is to be forgotten, or processes decide together."""
        alone = self._moment is None and self._trainer.world_size == 1
        return self.schedule.rests_until(self._trainer.global_step) if alone else 0.0

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers of the run."""
        return self._trainer.optimizers

    def decided(self, decision: bool) -> bool:
        """Return the first process's decision on all of them, so that what depends on time is done alike."""
        trainer = self._trainer
        return bool(trainer.strategy.broadcast(decision)) if trainer.world_size > 1 else decision

    def ends(self, step: int) -> bool:
        """Decide whether the last step is measured, alike for all callbacks and ranks."""
        if step not in self._ends:
            asked = self.has(step) or {"size", "outputs"} <= self.run_network.probe.given  # whatever it costs
            self._ends = {step: asked or self.decided(self.schedule.allows_last(step))}
        return self._ends[step]

    def has(self, step: int) -> bool:
        """Return whether the kernel of this step is known."""
        return self._measured is not None and self._measured[0] == step

    def at(self, step: int, pl_module: pl.LightningModule) -> tuple[KernelGram, Spectrum]:
        """Return kernel and spectrum of the weights after ``step`` optimizer steps."""
        if self._measured is None or not self.has(step):
            self.probe_loss.look_again(step)
            seconds, gram, spectrum = self._compute(pl_module)
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
    def n_outputs(self) -> int | None:
        """Number C of outputs per sample; None before the first kernel."""
        return None if self._measured is None else self._measured[1].n_outputs

    def moment(self) -> Moment:
        """Return the network over a copy of the weights of now, with what was computed of it so far."""
        module = self._trainer.lightning_module
        key = self._trainer.global_step, *(each._version for each in module.parameters())
        if self._moment is None or self._moment[0] != key:
            self._forget_moment()  # before the next copy is made
            with isolated():
                network = self.run_network.network(copy_of(self._trainer, module))
            inputs = to_device(self.inputs, module.device)
            self._moment = key, Moment(network, inputs, self.probe.batch_norm, self._head)
        return self._moment[1]

    def network(self) -> nn.Module:
        """Return the network over a copy of the weights of now: whatever a forward does to it, the run does not see."""
        return self.moment().network

    def leave(self) -> None:
        """Forget the copies of the weights; a later call of ``moment`` makes another one."""
        self._forget_moment()
        self.probe_loss.leave()

    def _forget_moment(self) -> None:
        if self._moment is not None:
            self._head, self._moment = self._moment[1].head, None

    @property
    def rows(self) -> Tensor:
        """Numbers of the measured samples among those that were read, (m,)."""
        own = self.run_network.loss.own
        chosen = spread(torch.arange(self._samples if own is None else own.samples), self._samples)
        assert isinstance(chosen, Tensor)
        return chosen

    @property
    def numbers(self) -> list[int] | None:
        """Number of each measured sample in the training set, (m,); None: not known."""
        read = self.run_network.numbers
        if read is None or len(read) != sample_count(self.run_network.inputs):
            return None
        chosen = spread(torch.tensor(read), self._samples)
        assert isinstance(chosen, Tensor)
        return list(map(int, chosen))

    @property
    def _samples(self) -> int:
        return sample_count(self.inputs)

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

    def trained(self, pl_module: pl.LightningModule) -> Parameters:
        """Return the parameters that plain descent trains: the kernel's, and no others. They are looked up once per fit."""
        if self._trained is None:
            self._trained = Parameters.of(self.probe.network(pl_module), self.parameters)
        return self._trained

    def with_cotangents(self, cotangents: Tensor, pl_module: pl.LightningModule) -> tuple[KernelGram, Spectrum]:
        """Return the kernel of the present weights with cotangents of another moment, and its spectrum.

        Args:
            cotangents: s, (m, C).
            pl_module: Module of the run.

        Cost: a kernel.
        """
        return self._kernel(pl_module, cotangents)

    def _compute(self, pl_module: pl.LightningModule) -> tuple[float, KernelGram, Spectrum]:
        """Return the seconds that the next one takes, which does not read the network again, and kernel and spectrum."""
        start, known = time.perf_counter(), bool(self._plans)
        self.cotangents = None
        if self.probe.outputs == "loss":
            self.cotangents = self.probe_loss.gradients(lambda: self.moment().shaped_outputs, self.targets, self.rows)
        gram, spectrum = self._kernel(pl_module, self.cotangents)
        self.precision = gram.precision
        reading = gram.plan.reading_seconds if gram.plan is not None and not known else 0.0
        return time.perf_counter() - start - reading, gram, spectrum

    def _kernel(self, pl_module: pl.LightningModule, cotangents: Tensor | None) -> tuple[KernelGram, Spectrum]:
        with isolated():
            gram, spectrum = resolved_spectrum(
                self.network(),
                to_device(self.inputs, pl_module.device),
                outputs="trace" if self.probe.outputs == "loss" else self.probe.outputs,
                cotangents=cotangents,
                parameters=self.parameters,
                per_layer=self.per_layer,
                start="certified" if self.is_bound else self.precision,
                highest=self.highest,
                precision=self.probe.precision,
                batch_norm=self.probe.batch_norm,
                max_memory=self.probe.max_memory,
                projections=self.probe.projections,
                seed=self.probe.seed,
                plans=self._plans,
                progress=Lines(
                    rank_zero_info, f"Tangent kernel at step {self._trainer.global_step}", pause=PAUSE, predicts=True
                ),
            )
        if gram.plan is not None:
            self._plans[gram.precision] = gram.plan
        return gram, spectrum


def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
