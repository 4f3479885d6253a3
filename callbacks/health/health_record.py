"""``HealthRecord``: what the measurements of one run have shown so far, and the findings that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_conv.callbacks.health.course_of_run import CourseOfRun
from lightning_conv.callbacks.health.fit_of_run import FitOfRun
from lightning_conv.callbacks.health.floor_of_set import FloorOfSet, drawn_in_part
from lightning_conv.callbacks.health.forecast_of_run import ForecastOfRun
from lightning_conv.callbacks.health.frozen_trunk import FrozenTrunk
from lightning_conv.callbacks.health.labels_of_run import LabelsOfRun
from lightning_conv.callbacks.health.layers_of_run import LayersOfRun
from lightning_conv.callbacks.health.linearisation_of_run import LinearisationOfRun
from lightning_conv.callbacks.health.losses_seen import LossesSeen
from lightning_conv.callbacks.health.noise_of_run import NoiseOfRun
from lightning_conv.callbacks.health.paid_parts import PaidParts
from lightning_conv.callbacks.health.start_of_run import StartOfRun
from lightning_conv.callbacks.health.units_of_run import UnitsOfRun
from lightning_conv.callbacks.health.update_of_run import ProbeGradient, UpdateOfRun
from lightning_conv.callbacks.health.watched_step import AFTER_THE_NEXT
from lightning_conv.callbacks.run.assumptions import violated
from lightning_conv.callbacks.run.data.samples import data_violations
from lightning_conv.callbacks.run.guarded import Failures
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.together import findings_of_finiteness, told_together
from lightning_conv.health.layers.layer_gradients import LayerGradient
from lightning_conv.kernels.drift import Drift
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.layers import trace_shares

AHEAD = 0.1
"""Seconds that reading the training set may take more than all other costly parts, which it must not starve."""


class HealthRecord:
    """Follows one run.

    Args:
        audit_labels: Whether to audit the labels of the probe.

    Attributes:
        losses: The training losses.
        undecided: What could not be judged, and why.
        failures: Parts of a measurement that ended in an error.
        labels: The audit of the probe's labels; None: it was not asked for.
        over_training: What the layers have done so far.
    """

    def __init__(self, *, audit_labels: bool = False) -> None:
        self._parts = PaidParts()
        self.losses = LossesSeen()
        self._measured: list[Finding] = []
        self._fit: FitOfRun | None = None  # looked at once per fit
        self._units = UnitsOfRun()
        self._noise = NoiseOfRun()
        self._update = UpdateOfRun()
        self._set = FloorOfSet()
        self._linear = LinearisationOfRun()
        self._trunk = FrozenTrunk()
        self._augmented = ""  # why the samples are not the same in every step
        self._forecast = ForecastOfRun()
        self._start = StartOfRun()
        self.labels = LabelsOfRun() if audit_labels else None
        self.over_training = LayersOfRun()
        self._course = CourseOfRun(self.losses, self._start, self._parts.undecided)
        self._past: dict[str, Finding] = {}  # the alerts so far, by name

    @property
    def undecided(self) -> dict[str, str]:
        """Return what could not be judged, and why."""
        return self._parts.undecided

    @property
    def is_measured(self) -> bool:
        """Return whether a measurement was made."""
        return bool(self._measured)

    @property
    def failures(self) -> Failures:
        """Return the parts of a measurement that ended in an error."""
        return self._parts.failures

    @property
    def spent(self) -> float:
        """Return the seconds that the costly parts took so far."""
        return self._parts.spent

    @property
    def layers(self) -> list[LayerGradient]:
        """Return gradient and update of each layer at the last measurement; empty: not known."""
        return self._update.layers

    @property
    def scalars(self) -> dict[str, float]:
        """Return the numbers of the last measurement that no finding has, by tag; NaN: they were found before, and not this time."""
        others = {"zero_gradients": self._noise.zeros, "linearisation_error": self._linear.error}
        known = self._update.scalars | {name: value for name, value in others.items() if value is not None}
        return {f"health/{name}": value for name, value in known.items()}

    def begin(self) -> None:
        """Begin a fit, of a new run or of this one: the samples are looked at again."""
        self._fit = None
        self._set.begin()
        self._update.watched.begin()
        self._trunk = FrozenTrunk()  # it may be another one

    @property
    def findings(self) -> list[Finding]:
        """Return all findings, the most severe first."""
        losses = self.losses
        step = None if losses.course is None else losses.course.step
        found = [*self._measured, *self._course.findings]
        if self._course.ratios is None:
            _add(found, self._update.finding())
        found = findings_of_finiteness(found, losses.not_finite, losses.progress, step=step)
        self._past |= {each.name: each for each in found if each.level == "alert"}
        return told_together(found, self._past)

    def measure(
        self,
        run: RunView,
        gram: KernelGram,
        affords: Callable[[float], bool],
        *,
        total: int | None = None,
        drift: Drift | None = None,
        beside: Sequence[Finding] = (),
    ) -> None:
        """Measure the run at the weights of now; costly parts are left out where the run cannot afford them, which is noted.

        Args:
            run: The run at this moment.
            gram: The kernel on the probe.
            affords: Whether a part may take so many seconds now.
            total: Number of steps of the run; None: not known.
            drift: How the kernel differs from that of the start; None: not known.
            beside: What other callbacks have found at this step.
        """
        step, self._forecast.record.total = run.step, total
        found: list[Finding] = [*beside]
        self.losses.fetch(step, run.trainer.accumulate_grad_batches)
        course, look = self._course, partial(self._parts.look, step)
        pay = partial(self._parts.afford, step=step, affords=affords, pass_seconds=run.measurement.pass_seconds)
        if self._fit is None:
            self._begin_fit(run, gram)
        fit, gradient = self._fit, ProbeGradient(run)
        assert fit is not None
        self._update.clear()
        self._linear.clear()
        self._noise.zeros = None if self._noise.zeros is None else math.nan
        loss = look("the loss of the probe", lambda: course.read_loss(run))
        at = pay("stability", look=lambda: course.read_ratio(run))
        if at is not None and loss is not None:
            pay("forecast", look=lambda: _add(found, self._forecast.measure(at, step, loss)))
        pay("gradient_noise", look=lambda: _add(found, self._noise.measure(run, gram, gradient)))
        pay("critical_sharpness", look=lambda: self._look_at_update(run, gradient))
        if drift is not None and not self._linear.begins(run, drift):
            pay("linearisation_error", look=lambda: self._look_at_linearisation(run))
        self._look_at_set(run, fit, pay, found)
        look("the frozen trunk", lambda: self._look_at_trunk(run, fit, pay, found))
        for what, it in (
            ("what the run can reach", lambda: found.extend(fit.findings(run.features, loss, step))),
            ("the inputs", lambda: found.append(self._start.look_at_inputs(run, loss))),
            ("the signal", lambda: found.extend(self._start.look_at_signal(run))),
            ("the movement", lambda: found.extend(self._start.look_at_movement(run))),
            ("the units", lambda: _add(found, self._units.look_at_units(run, equal_inputs=self._start.equal_inputs))),
            ("the layers", lambda: _add(found, self._units.look_at_layers(gram, step))),
            ("the regime", lambda: _add(found, self._regime(drift, step))),
            ("the labels", lambda: _add(found, self._audit(run, gram, fit))),
        ):
            look(what, it)
        self._measured = found
        look("the layers over training", lambda: self._note_layers(run, gram))

    def _note_layers(self, run: RunView, gram: KernelGram) -> None:
        names, shares = run.measurement.parameters, trace_shares(gram)
        self.over_training.note(run.step, names, shares, self._update.layers, self._units.activity)

    def _begin_fit(self, run: RunView, gram: KernelGram) -> None:
        """Look at the samples, once per fit."""
        self._fit = FitOfRun.of(run, gram.n_outputs)
        violations = data_violations(run)
        self._augmented = violated(violations, ["fixed data"])
        self._course.statistical = bool(violated(violations, ["full batch", "whole set"]))
        if not violated(violations, ["whole set"]):
            self._set.leave()  # the probe is the whole set
        elif self._fit.losses is None or self._fit.floor is None:
            self._set.leave("the smallest value of this loss is not known")
        elif why := self._augmented or drawn_in_part(run):
            self._set.leave(why)

    def _look_at_update(self, run: RunView, gradient: ProbeGradient) -> None:
        self._note_update(self._update.measure(run, gradient))

    def _note_update(self, why: str) -> None:
        known = self._update.finding() is not None
        if why and not (known and why == AFTER_THE_NEXT):
            self.undecided["critical_sharpness"] = why
        if known and self._course.ratios is None:
            self.undecided.pop("stability", None)

    @property
    def waits(self) -> bool:
        """Return whether the optimizer's next step is to be seen."""
        return self._update.watched.waits

    def before_step(self, run: RunView) -> None:
        """Keep the weights before a step that is waited for.

        Args:
            run: The run, when the optimizer is about to step.
        """
        self._update.watched.before(run)

    def after_step(self, run: RunView, affords: Callable[[float], bool]) -> int | None:
        """Look at the step that was waited for, if the run can afford it.

        Args:
            run: The run at this moment.
            affords: Whether a part may take so many seconds now.

        Returns:
            The number of steps before it; None: it has not been made yet, or nothing was found.
        """
        seen = self._update.watched.after(run)
        if seen is None or run.loss_unknown or run.loss_targets is None:
            return None
        self.undecided.pop("critical_sharpness", None)
        seconds = run.measurement.pass_seconds
        look, step = partial(self._update.observe, run, seen), seen.step
        why = self._parts.afford("watched_step", step, affords, look, pass_seconds=seconds)
        self._note_update(self.undecided.pop("watched_step", why or ""))
        return None if why is None else step

    def _look_at_linearisation(self, run: RunView) -> None:
        if why := self._linear.measure(run):
            self.undecided["linearisation_error"] = why

    def _regime(self, drift: Drift | None, step: int) -> Finding | None:
        self.undecided.pop("regime", None)
        found = self._linear.regime(drift, self._course.probe, step)
        if self._linear.regime_undecided:
            self.undecided["regime"] = self._linear.regime_undecided
        return found

    def _look_at_set(self, run: RunView, fit: FitOfRun, pay: Callable[..., Any], found: list[Finding]) -> None:
        """Read on in the training set, and add what is found of it."""
        losses = fit.losses
        self.undecided.pop("training_floor", None)
        if self._set.is_wanted and losses is not None:
            fair = self._parts.ahead("training_floor") <= AHEAD
            seconds = self._set.expected_seconds if fair else math.inf
            pay("training_floor", look=lambda: self._set.measure(run, losses), seconds=seconds)
        _add(found, self._set.finding(labels=fit.labels, step=run.step))
        if (why := self._set.state) and (self._set.known.read or "training_floor" not in self.undecided):
            self.undecided["training_floor"] = why

    def _look_at_trunk(self, run: RunView, fit: FitOfRun, pay: Callable[..., Any], found: list[Finding]) -> None:
        """Look for the least loss of the last layer, if it alone is trained, and add what is found."""
        trunk = self._trunk
        self.undecided.pop("frozen_trunk", None)
        if trunk.looks(run, fit, self._augmented):
            if trunk.wants(run):
                pay("frozen_trunk", look=lambda: trunk.solve(run), seconds=trunk.expected_seconds)
            _add(found, trunk.finding(run))
        if trunk.undecided:
            self.undecided["frozen_trunk"] = trunk.undecided

    def _audit(self, run: RunView, gram: KernelGram, fit: FitOfRun) -> Finding | None:
        if self.labels is None:
            return None
        found = self.labels.measure(run, gram, fit.losses)
        self.undecided.pop("labels", None)
        if found is None:
            self.undecided["labels"] = self.labels.undecided
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types, for a checkpoint."""
        return {
            "losses": self.losses.state_dict(),
            "measured": [each.to_json() for each in self._measured],
            "undecided": dict(self.undecided),
            "forecast": self._forecast.state_dict(),
            "noise": self._noise.state_dict(),
            "start": self._start.state_dict(),
            "labels": None if self.labels is None else self.labels.state_dict(),
            "update": self._update.state_dict(),
            "set": self._set.state_dict(),
            "linear": self._linear.state_dict(),
            "over_training": self.over_training.state_dict(),
            "past": [each.to_json() for each in self._past.values()],
        } | (self._units.state_dict() | self._course.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.losses.load_state_dict(state["losses"])
        self._measured = [Finding.from_json(each) for each in state["measured"]]
        self.undecided.clear()
        self.undecided.update(state["undecided"])
        self._course.load_state_dict(state)
        self._units.load_state_dict(state)
        self._start.load_state_dict(state["start"])
        self._forecast.load_state_dict(state["forecast"])
        self._noise.load_state_dict(state["noise"])
        if self.labels is not None and (labels := state.get("labels")) is not None:
            self.labels.load_state_dict(labels)
        if "update" in state:
            self._update.load_state_dict(state["update"])
            self._set.load_state_dict(state["set"])
        if "linear" in state:
            self._linear.load_state_dict(state["linear"])
        self.over_training.load_state_dict(state.get("over_training", {}))
        self._past = {each.name: each for each in map(Finding.from_json, state.get("past", ()))}


def _add(findings: list[Finding], found: Finding | None) -> None:
    if found is not None:
        findings.append(found)
