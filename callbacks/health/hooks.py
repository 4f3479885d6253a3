"""``HealthHooks``: what ``ConvergenceHealth`` does at each hook of the trainer."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks.health.announcements import Announcements
from lightning_conv.callbacks.health.forecast_of_run import steps_of_run
from lightning_conv.callbacks.health.health_record import HealthRecord
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.monitors.kernel_stability import KernelStability
from lightning_conv.callbacks.monitors.lambda_min import LambdaMin
from lightning_conv.callbacks.run.callbacks import all_callbacks
from lightning_conv.callbacks.run.end_of_run import say_the_end
from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.callbacks.run.logging import log_metrics
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.measuring import measuring
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.reporting.gradient_plot import plot_layer_gradients
from lightning_conv.reporting.label_pictures import are_pictures, plot_labels
from lightning_conv.reporting.plain_words import LEVEL, health_scalars, tag_of

PASSES = 9
"""Forward and backward passes of the probe that a measurement takes without its costly parts, roughly."""

NOT_SEEN = "the step after a measurement is not looked at"

CRITICAL = "health/critical_"
"""How the tags begin that a watched step brings."""

AT_A_MEASUREMENT = ("stability", "gradient_noise", "regime", "inputs", "units", "layers", "width")
"""Findings that every measurement brings, or says why not."""

NEVER = "no measurement was made"

FREE = 0.1
"""Seconds that the costly parts of the first measurement may take in any run."""


class HealthHooks(KernelMonitor):
    """Base of ``ConvergenceHealth``: follows losses and steps, measures, logs and says what is found."""

    _record: HealthRecord
    _announcements: Announcements
    _tags: set[str]  # of the findings that were there at the last measurement

    @property
    def findings(self) -> list[Finding]:
        """Return what is known of the run now, the most severe first."""
        return self._record.findings

    @property
    def not_judged(self) -> dict[str, list[str]]:
        """Return what could not be judged, by the reason."""
        found: dict[str, list[str]] = {}
        for name, reason in self._record.undecided.items():
            found.setdefault(reason, []).append(name)
        if not self._record.is_measured:
            waits = self._kernel is not None and not self.failures.words
            reason = (
                f"{NEVER}, as it takes longer than the run allows for; every_n_steps= asks for it" if waits else NEVER
            )
            found.setdefault(reason, []).extend(AT_A_MEASUREMENT)
        return found

    @property
    def diverged_at(self) -> int | None:
        """Return the step at which a loss or a weight was no longer finite; None: all were."""
        first = self._record.losses.not_finite
        return None if first is None or first.skipped else first.step

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record.begin()
        super().on_train_start(trainer, pl_module)

    def note_batch(self, trainer: pl.Trainer, outputs: Any, batch: Any) -> None:
        """Note the loss of a batch, in every step; the first one that is not finite is an alert.

        Args:
            trainer: Trainer of the run.
            outputs: What the training step has returned.
            batch: The batch.
        """
        if self._record.losses.note(outputs):
            self._fetch(trainer, batch)

    def _fetch(self, trainer: pl.Trainer, batch: Any = None) -> None:
        """Look at the losses that wait."""
        with guarded(None, f"{self._name}: losses are not followed", failures=self._record.failures):
            batches = trainer.accumulate_grad_batches
            if self._record.losses.fetch(trainer.global_step, batches, batch):
                self._alert(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.note_batch(trainer, outputs, batch)
        if self._record.waits:
            self._look_at_step(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def _next_look(self) -> float:
        return 0.0 if self._record.waits else super()._next_look()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._record.waits and self._kernel is not None:
            begun = time.perf_counter()
            with guarded(trainer.global_step, f"{self._name}: {NOT_SEEN}", failures=self._record.failures):
                self._record.before_step(RunView(trainer, self._kernel, self.loss_fn))
            self._kernel.schedule.spend(trainer.global_step, time.perf_counter() - begun)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _look_at_step(self, trainer: pl.Trainer) -> None:
        """Look at the step after a measurement, and log what it shows at the step of that one."""
        if self._kernel is None or trainer.received_sigterm:
            return
        begun, step = time.perf_counter(), None
        what = f"{self._name}: {NOT_SEEN}"
        with measuring(trainer), guarded(trainer.global_step, what, failures=self._record.failures):
            affords = partial(self._affords, trainer.global_step)
            step = self._record.after_step(RunView(trainer, self._kernel, self.loss_fn), affords)
        if step is not None:
            of_step = [each for each in self.findings if each.name == "stability" and each.step == step]
            found = {tag: value for tag, value in self._record.scalars.items() if tag.startswith(CRITICAL)}
            found |= health_scalars(of_step)
            found[LEVEL] = health_scalars(self.findings)[LEVEL]
            self._metrics |= found
            log_metrics(trainer, self._tagged(found), step)
            self._say(trainer, step)
        self._kernel.schedule.spend(trainer.global_step, time.perf_counter() - begun)

    @override
    def own_seconds(self, kernel: Measurement) -> float:
        return PASSES * kernel.pass_seconds

    @override
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        assert self._kernel is not None
        run = RunView(trainer, self._kernel, self.loss_fn)
        beside = [each for each in monitors_of(trainer, KernelStability) if each.optimizer == self.optimizer]
        drift = next((each.drift for each in beside if each.last_step == step), None)
        bounds = [each for each in monitors_of(trainer, LambdaMin) if each.optimizer == self.optimizer]
        proven = [each.finding for each in bounds if each.last_step == step and each.finding is not None]
        self._record.measure(
            run, gram, partial(self._affords, step), total=steps_of_run(trainer), drift=drift, beside=proven[:1]
        )
        self._say(trainer, step)
        self._alert(trainer)
        self._announcements.stop_together(trainer)
        now = {tag_of(each) for each in self.findings if each.step in (None, step)} | {LEVEL}  # others are older
        of_findings = {name: value for name, value in health_scalars(self.findings).items() if name in now}
        tags = {tag_of(each) for each in self.findings}
        gone, self._tags = self._tags - tags, tags
        return self._record.scalars | dict.fromkeys(gone, math.nan) | of_findings

    def _affords(self, step: int, seconds: float) -> bool:
        """Return whether a costly part may take so long: all of them together get a third of the share, and ``FREE`` at the start."""
        assert self._kernel is not None
        schedule = self._kernel.schedule
        may = self._record.spent + seconds <= FREE + self._share / 3 * schedule.elapsed
        may = may and schedule.allows_beside(seconds, step)
        return schedule.every_n_steps is not None or self._kernel.decisions.alike(may)

    @override
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        """Draw the layers over training, their gradients and updates if they are known at this step, and the audited samples."""
        if len(self._record.over_training):
            self.show(trainer, "health/layers_over_training", self._record.over_training.figure)
        if layers := self._record.layers:
            self.show(trainer, "health/layer_gradients", lambda: plot_layer_gradients(layers))
        if not self.may_show("health/labels_top"):
            return
        audited = self._announcements.new_audit(self._record.labels, "pictures")
        if audited is None or self._kernel is None or not are_pictures(self._kernel.inputs):
            return
        inputs, (audit, numbers) = self._kernel.inputs, audited
        assert isinstance(inputs, Tensor)
        self.show(trainer, "health/labels_top", lambda: plot_labels(inputs, audit, numbers=numbers))

    def _say(self, trainer: pl.Trainer, step: int) -> None:
        self._announcements.say(trainer, self.findings, self._record.labels, step, self.tag)

    def _alert(self, trainer: pl.Trainer) -> None:
        self._announcements.alert(trainer, self.findings, self._name)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        for each in self.by_optimizer.values():
            each.finish(trainer, pl_module)

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the weights of the end, and say in the terminal what is known of the run.

        Args:
            trainer: Trainer of the run.
            pl_module: The module.
        """
        with guarded(None, f"{self._name}: the end of the fit is not judged", failures=self._record.failures):
            self._fetch(trainer)
            self._record.losses.look_at_weights(pl_module, trainer.global_step)
            self._alert(trainer)
            self._say(trainer, trainer.global_step)
            if self.findings and not any(getattr(each, "says_the_end", False) for each in all_callbacks(trainer)):
                how = "completed" if self.diverged_at is None else f"diverged at step {self.diverged_at}"
                say_the_end(trainer, how, self.findings, self.not_judged)
