"""``ConvergenceHealth``: what a run is doing, in sentences with their numbers, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_conv.callbacks.health.health_record import HealthRecord
from lightning_conv.callbacks.health.labels_of_run import LabelsOfRun
from lightning_conv.callbacks.monitors.base import KernelMonitor, OnError
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.monitors.kernel_stability import KernelStability
from lightning_conv.callbacks.monitors.lambda_min import LambdaMin
from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.callbacks.run.logging import log_figure, log_text
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.suspicious_labels import LabelAudit
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.reporting.gradient_plot import plot_layer_gradients
from lightning_conv.reporting.label_pictures import are_pictures, plot_labels
from lightning_conv.reporting.plain_words import LEVEL, health_scalars, plain_words_terminal, plain_words_text, tag_of
from lightning_conv.reporting.series import Series

OnAlert: TypeAlias = Literal["warn", "stop"] | Callable[[Finding], object]

PASSES = 9
"""Forward and backward passes of the probe that a measurement takes without its costly parts, roughly."""

FREE = 0.1
"""Seconds that the costly parts of the first measurement may take in any run."""


class ConvergenceHealth(KernelMonitor):
    """Says what a run is doing: whether its steps are too long, what its loss can reach, which units are off, and what is not finite.

    Judged are, each in one sentence with its number, its limit and what to do (``docs/health.md``):

    - ``stability``: the curvature of the run's loss on the probe over the limit of the optimizer's steps, for torch's SGD, Adam, AdamW,
      NAdam, RMSprop and Adagrad. A ratio above 1 is usual; it is named as the cause where the loss has risen. For any other optimizer
      it rests on the loss along the next update
    - ``loss_rise``: the loss has risen though the steps are not too long
    - ``loss_floor``, ``training_floor``: the loss that equal inputs with unequal targets force on the probe, and on the training set
    - ``width``: what the number of features before the last layer forces
    - ``units``, ``layers``: units that are dead, saturated or constant on the probe, layers on which the outputs do not depend
    - ``inputs``, ``signal``: inputs that are equal or of a scale far from 1, and what tells the samples apart layer by layer
    - ``movement``: layers that require gradients and never move
    - ``descent``: a loss that curves downward and falls below zero, as one with the wrong sign does
    - ``gradient_noise``: the batch against the noise scale, samples that carry the gradient
    - ``forecast``: the loss of the probe at the next measurement, if earlier forecasts were right
    - ``regime``: lazy or feature learning, behind a ``KernelStability`` in the list
    - ``lambda_min_bound``: what a ``LambdaMin(bound=...)`` before it in the list has proven at the same step
    - ``labels``: labels of the probe that the other samples contradict, if ``audit_labels``
    - ``not_finite``: the first loss, input or weight that was not finite

    Levels are ``ok``, ``notice`` (usual in runs that end well), ``warning`` (the run is held back) and ``alert`` (it cannot go on well).

    Logged: scalars ``health/<name>`` (the value) and ``health/level`` (0 to 3), ``health/critical_ratio`` and
    ``health/critical_sharpness`` (the length of the next update over the one from which on it raises the loss, and the curvature that
    this means), ``health/zero_gradients`` (share of zeros in the gradient of the probe), the figure ``health/layers`` (gradient and update
    of each layer), the text ``health/words`` when a sentence changes, a block in the terminal when the fit ends, and once a warning for
    each alert. ``ConvergenceReport`` has the sentences at the top of its page.

    Args:
        probe: as in ``LambdaMin``.
        every_n_steps: measure at multiples of it; None: within ``max_overhead``.
        max_overhead: as in ``LambdaMin``.
        loss_fn: of the training step; None: the one that is observed in it.
        on_alert: what to do at an alert: ``"warn"``, ``"stop"`` training after the batch, or a function of the ``Finding``.
        on_error: as in ``LambdaMin``.
        audit_labels: whether to look for labels that the other samples contradict. The table is then the text ``health/labels_table`` and a
            section of ``ConvergenceReport``; of images TensorBoard gets pictures, ``health/labels_top``.

    Attributes:
        findings: what is known of the run now, the most severe first.

    Raises:
        MisconfigurationException: ``on_alert`` is neither of these; otherwise as ``LambdaMin``.

    Cost: a measurement takes one ``ntk_gram`` (shared), a forward pass in float64 and four in the network's type. Stability takes twenty
    products with the Jacobian the first time and four later, the forecast twelve, the noise two backward passes, the critical sharpness
    six to sixteen forward passes and copies of the weights and of the optimizer's state, the floor of the training set 0.1 s of reading
    until all is read; these are left out, and said to be, where they would take more than 0.1 s and a third of ``max_overhead``. The loss
    of every step is read, on an accelerator 32 at a time. The audit of labels takes at most four eigendecompositions of the size of the
    probe, until the network knows labels by heart.

    Example::

        trainer = Trainer(callbacks=[ConvergenceHealth(on_alert="stop")])
    """

    def __init__(
        self,
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        loss_fn: LossFn | None = None,
        on_alert: OnAlert = "warn",
        on_error: OnError = "raise",
        audit_labels: bool = False,
    ) -> None:
        known = get_args(get_args(OnAlert)[0])
        if not callable(on_alert) and on_alert not in known:
            raise MisconfigurationException(
                f"{type(self).__name__}: on_alert={on_alert!r} is none of {', '.join(map(repr, known))}, nor a function of a Finding"
            )
        if not isinstance(audit_labels, bool):
            raise MisconfigurationException(f"{type(self).__name__}: audit_labels={audit_labels!r}; need True or False")
        super().__init__(probe, every_n_steps, max_overhead, on_error)
        self.loss_fn = loss_fn
        self.on_alert: OnAlert = on_alert
        self.audit_labels = audit_labels
        self._clear()

    def _clear(self) -> None:
        self._record = HealthRecord(audit_labels=self.audit_labels)
        self._audited: dict[str, int] = {}  # steps of the audits that were logged
        self._alerted: set[str] = set()
        self._words = ""
        self._stops = False

    @override
    def forget(self) -> None:
        super().forget()
        self._clear()

    @property
    def findings(self) -> list[Finding]:
        """What is known of the run now, the most severe first."""
        return self._record.findings

    @property
    @override
    def steps_of_values(self) -> dict[str, int]:
        of_findings = {self.tag(tag_of(each)): each.step for each in reversed(self.findings) if each.step is not None}
        return super().steps_of_values | of_findings

    @property
    def labels(self) -> LabelsOfRun | None:
        """The audit of the probe's labels, with the numbers of the samples; None: it was not asked for."""
        return self._record.labels

    def losses_so_far(self, trainer: pl.Trainer) -> Series:
        """Return the losses of all steps, thinned, those that wait included; look at them first.

        Args:
            trainer: Trainer of the run.
        """
        self._fetch(trainer)
        return self._record.losses.series

    @property
    def diverged_at(self) -> int | None:
        """Step at which a loss or a weight was no longer finite; None: all were."""
        first = self._record.losses.not_finite
        return None if first is None or first.skipped else first.step

    @property
    def not_judged(self) -> dict[str, list[str]]:
        """What could not be judged, by the reason."""
        found: dict[str, list[str]] = {}
        for name, reason in self._record.undecided.items():
            found.setdefault(reason, []).append(name)
        return found

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
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

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
            run, gram, partial(self._affords, step), total=_steps_of(trainer), drift=drift, beside=proven[:1]
        )
        self._say(trainer, step)
        self._alert(trainer)
        if trainer.world_size > 1 and self.on_alert == "stop":  # losses differ from process to process
            self._stops = trainer.strategy.reduce_boolean_decision(self._stops, all=False)
            trainer.should_stop = trainer.should_stop or self._stops
        now = {tag_of(each) for each in self.findings if each.step in (None, step)} | {LEVEL}  # others are older
        of_findings = {name: value for name, value in health_scalars(self.findings).items() if name in now}
        return self._record.scalars | of_findings

    def _affords(self, step: int, seconds: float) -> bool:
        """Return whether a costly part may take so long: all of them together get a third of the share, and ``FREE`` at the start."""
        assert self._kernel is not None
        schedule = self._kernel.schedule
        may = self._record.spent + seconds <= FREE + self._share / 3 * schedule.elapsed
        may = may and schedule.allows_beside(seconds, step)
        return schedule.every_n_steps is not None or self._kernel.decided(may)

    @override
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        """Draw gradients and updates of the layers, if they are known at this step, and the audited samples."""
        if layers := self._record.layers:
            log_figure(trainer, self.tag("health/layers"), lambda: plot_layer_gradients(layers), step)
        audited = self._new_audit("pictures")
        if audited is None or self._kernel is None or not are_pictures(self._kernel.inputs):
            return
        inputs, (audit, numbers) = self._kernel.inputs, audited
        assert isinstance(inputs, Tensor)
        log_figure(trainer, self.tag("health/labels_top"), lambda: plot_labels(inputs, audit, numbers=numbers), step)

    def _new_audit(self, shown: str) -> tuple[LabelAudit, list[int] | None] | None:
        """Return the audit of the labels if it was not shown yet, as a table or as pictures."""
        labels = self._record.labels
        if labels is None or labels.audit is None or self._audited.get(shown) == labels.step:
            return None
        self._audited[shown] = labels.step
        return labels.audit, labels.numbers

    def _say(self, trainer: pl.Trainer, step: int) -> None:
        words = plain_words_text(self.findings)
        if words != self._words:
            log_text(trainer, self.tag("health/words"), words.replace("\n", "\n\n"), step)
            self._words = words
        if self._new_audit("table") is not None and self._record.labels is not None:
            log_text(trainer, self.tag("health/labels_table"), self._record.labels.markdown, step)

    def _alert(self, trainer: pl.Trainer) -> None:
        """Do what ``on_alert`` asks for, once for each finding that is an alert."""
        for each in self.findings:
            if each.level != "alert" or each.name in self._alerted:
                continue
            self._alerted.add(each.name)
            rank_zero_warn(f"{self._name}: {each.sentence} {each.advice}".rstrip())
            if callable(self.on_alert):
                self.on_alert(each)
            elif self.on_alert == "stop":
                self._stops = True
                trainer.should_stop = trainer.should_stop or trainer.world_size == 1

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
            if self.findings:
                rank_zero_info(plain_words_terminal(self.findings, self.not_judged))

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"health": self._record.state_dict(), "alerted": sorted(self._alerted)} if state else state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "health" in state_dict:
            self._record.load_state_dict(state_dict["health"])
        self._alerted = set(state_dict.get("alerted", ()))


def _steps_of(trainer: pl.Trainer) -> int | None:
    """Return the number of optimizer steps of the run; None: not known."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    batches, epochs, accumulated = trainer.num_training_batches, trainer.max_epochs, trainer.accumulate_grad_batches
    if epochs is None or epochs < 0 or batches == float("inf"):
        return None
    return math.ceil(batches / accumulated) * epochs
