"""``HealthRecord``: what the measurements of one run have shown so far, and the findings that follow from it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.health.fit_of_run import FitOfRun, is_constant
from lightning_conv.callbacks.health.forecast_of_run import ForecastOfRun
from lightning_conv.callbacks.health.losses_seen import LossesSeen
from lightning_conv.callbacks.health.noise_of_run import NoiseOfRun
from lightning_conv.callbacks.health.start_of_run import StartOfRun
from lightning_conv.callbacks.health.step_of_run import NoStepError, StepOfRun, optimizer_of
from lightning_conv.callbacks.run.assumptions import violated
from lightning_conv.callbacks.run.data.samples import data_violations
from lightning_conv.callbacks.run.guarded import Failures, guarded
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.activity import unit_activity
from lightning_conv.health.course import LossCourse, StabilityCourse
from lightning_conv.health.finding import Finding, in_order
from lightning_conv.health.finding_of_course import finding_of_regime
from lightning_conv.health.finding_of_losses import findings_of_losses
from lightning_conv.health.finding_of_step import SAFE, SAFE_MOMENTUM
from lightning_conv.health.finding_of_units import finding_of_layers, finding_of_not_finite, finding_of_units
from lightning_conv.health.optimizer_rules import UnknownStepError, common_rate, has_momentum, largest_rate
from lightning_conv.health.regime import training_regime
from lightning_conv.kernels.drift import Drift
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.layers import trace_shares
from lightning_conv.networks.batch_norm import has_batch_norm

PASSES: Mapping[str, int] = {"stability": 60, "forecast": 40, "gradient_noise": 25}
"""Forward and backward passes of the probe that each costly part takes, roughly, before it is known."""

Made = TypeVar("Made")


class HealthRecord:
    """Follows one run.

    Attributes:
        losses: The training losses.
        findings: Those of the last measurement, the most severe first, with what the losses have shown since.
        undecided: What could not be judged, and why.
        failures: Parts of a measurement that ended in an error.
        spent: Seconds that the costly parts took so far: stability, forecast and noise.
    """

    def __init__(self) -> None:
        self.failures = Failures()
        self.losses = LossesSeen()
        self.undecided: dict[str, str] = {}
        self._measured: list[Finding] = []
        self._probe: LossCourse | None = None
        self._ratios: StabilityCourse | None = None
        self._rate: float | None = None
        self._optimizer: weakref.ref[Optimizer] | None = None  # its rate may be raised between two measurements
        self._safe = SAFE_MOMENTUM
        self._vector: Tensor | None = None
        self._fit: FitOfRun | None = None  # looked at once per fit
        self._out: dict[str, int] = {}  # layers whose units are all out, with the step from which on
        self._shares: dict[str, float] | None = None
        self._statistical = False
        self._noise = NoiseOfRun()
        self._seconds: dict[str, float] = {}  # what a part took the last time
        self.spent = 0.0
        self._forecast = ForecastOfRun()
        self._start = StartOfRun()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_optimizer": None}  # weak references are neither copied nor pickled

    def begin(self) -> None:
        """Begin a fit, of a new run or of this one: the samples are looked at again."""
        self._fit = None

    @property
    def findings(self) -> list[Finding]:
        """All findings, the most severe first."""
        losses = self.losses
        step = 0 if losses.course is None else losses.course.step
        found = [*self._measured, *self._of_losses()]
        if losses.course is not None or losses.not_finite is not None:
            found.append(finding_of_not_finite(losses.not_finite, step=step, inputs_checked=_is_input(losses)))
        return in_order(found)

    def measure(
        self,
        run: RunView,
        gram: KernelGram,
        affords: Callable[[float], bool],
        *,
        total: int | None = None,
        drift: Drift | None = None,
    ) -> None:
        """Measure the run at the weights of now; costly parts are left out where the run cannot afford them, which is noted.

        Args:
            run: The run at this moment.
            gram: The kernel on the probe.
            affords: Whether a part may take so many seconds now.
            total: Number of steps of the run; None: not known.
            drift: How the kernel differs from that of the start; None: not known.
        """
        step, self._forecast.record.total = run.step, total
        found: list[Finding] = []
        self.losses.fetch(step, run.trainer.accumulate_grad_batches)
        if self._fit is None:
            self._fit = FitOfRun.of(run, gram.n_outputs)
            self._statistical = bool(violated(data_violations(run), ["full batch", "whole set"]))
        loss = self._guarded(step, "the loss of the probe", lambda: self._loss_of(run))
        fit, at = self._fit, self._paid("stability", run, affords, lambda: self._read_ratio(run))
        if at is not None and loss is not None:
            self._paid("forecast", run, affords, lambda: _add(found, self._forecast.measure(at, step, loss)))
        self._paid("gradient_noise", run, affords, lambda: _add(found, self._noise.measure(run, gram)))
        for what, look in (
            ("what the run can reach", lambda: found.extend(fit.findings(run.features, loss, step))),
            ("the inputs", lambda: found.append(self._start.look_at_inputs(run, loss))),
            ("the signal", lambda: found.extend(self._start.look_at_signal(run))),
            ("the movement", lambda: found.extend(self._start.look_at_movement(run))),
            ("the units", lambda: found.extend(self._look_at_units(run))),
            ("the layers", lambda: found.extend(self._look_at_layers(gram, step))),
            ("the regime", lambda: _add(found, self._regime(drift, step))),
        ):
            self._guarded(step, what, look)
        self._measured = found

    def _guarded(self, step: int, what: str, look: Callable[[], Any]) -> Any:
        made = None
        with guarded(step, f"ConvergenceHealth: {what} could not be looked at", failures=self.failures):
            made = look()
        return made

    def _paid(self, name: str, run: RunView, affords: Callable[[float], bool], look: Callable[[], Made]) -> Made | None:
        """Look at a costly part, if it is affordable."""
        expected = self._seconds.get(name, PASSES[name] * run.measurement.pass_seconds)
        self.undecided.pop(name, None)
        if not affords(expected):
            self.undecided[name] = "a look takes longer than the run allows for now; every_n_steps= asks for it"
            return None
        begun = time.perf_counter()
        made: Made | None = self._guarded(run.step, f"the {name.replace('_', ' ')}", look)
        self._seconds[name] = time.perf_counter() - begun
        self.spent += self._seconds[name]
        return made

    def _loss_of(self, run: RunView) -> float | None:
        """Return the loss on the probe in eval mode, and add it to its course."""
        if run.loss_unknown or run.loss_targets is None:
            self.undecided["loss"] = run.loss_unknown or "no targets are known"
            return None
        loss = run.sample_loss().value()
        if has_batch_norm(run.network) and run.measurement.probe.batch_norm == "eval":
            return loss  # running statistics lag behind: this loss may rise in a run that is well
        if self._probe is None:
            self._probe = LossCourse.begin(run.step, loss)
        elif run.step > self._probe.step:
            self._probe = self._probe.then(run.step, loss)
        return loss

    def _read_ratio(self, run: RunView) -> StepOfRun | None:
        """Read the stability ratio and return the next step; None: nothing can be said of it, which is noted."""
        self._start.look_at_curvature(run)
        if self._start.downward_since is not None:
            self.undecided["stability"] = "the loss curves downward in the outputs of every sample"
            return None
        try:
            step = StepOfRun.of(run)
            reading, self._vector = step.stability(self._vector)
        except (NoStepError, UnknownStepError) as error:
            self.undecided["stability"] = str(error)
            return None
        optimizer = optimizer_of(step.run)
        self._rate, self._optimizer = common_rate(optimizer), weakref.ref(optimizer)
        self._safe = SAFE_MOMENTUM if has_momentum(optimizer) else SAFE
        if self._ratios is None:
            self._ratios = StabilityCourse.begin(reading)
        elif reading.step > self._ratios.now.step:
            self._ratios = self._ratios.then(reading)
        return step

    def _of_losses(self) -> list[Finding]:
        """Return what the losses say, with the stability ratios beside them."""
        descent = self._start.descent(self._probe or self.losses.course)
        training, statistical = self.losses.course, self._statistical
        optimizer = None if self._optimizer is None else self._optimizer()
        said = findings_of_losses(
            self._ratios,
            self._probe,
            training,
            rate=self._rate,
            largest_rate=None if optimizer is None else largest_rate(optimizer),
            safe=self._safe,
            statistical=statistical,
        )
        return [*descent, *said]

    def _look_at_units(self, run: RunView) -> list[Finding]:
        if self._start.equal_inputs:
            return []  # all units are constant then, whatever they are
        layers = unit_activity(run.network, run.inputs, batch_norm=run.measurement.probe.batch_norm)
        out = {each.name: self._out.get(each.name, run.step) for each in layers if each.is_out}
        self._out = out
        since = min(out.values()) if out else None
        silent = is_constant(run.outputs)
        return [finding_of_units(layers, samples=run.samples, step=run.step, since=since, outputs_constant=silent)]

    def _look_at_layers(self, gram: KernelGram, step: int) -> list[Finding]:
        shares = trace_shares(gram)
        found = finding_of_layers(shares, self._shares, step=step)
        self._shares = shares or None
        return [] if found is None else [found]

    def _regime(self, drift: Drift | None, step: int) -> Finding | None:
        course = self._probe
        if drift is None or course is None or step == 0 or not course.now > 0:
            return None
        progress = course.first / course.now
        regime = training_regime(drift.alignment, drift.relative_frobenius, None, progress=progress, floor=drift.floor)
        return finding_of_regime(regime, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types, for a checkpoint."""
        return {
            "losses": self.losses.state_dict(),
            "measured": [each.to_json() for each in self._measured],
            "undecided": dict(self.undecided),
            "probe": None if self._probe is None else asdict(self._probe),
            "ratios": None if self._ratios is None else self._ratios.state_dict(),
            "rate": self._rate,
            "safe": self._safe,
            "vector": None if self._vector is None else self._vector.cpu(),
            "out": dict(self._out),
            "shares": None if self._shares is None else dict(self._shares),
            "statistical": self._statistical,
            "forecast": self._forecast.state_dict(),
            "noise": self._noise.state_dict(),
            "start": self._start.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.losses.load_state_dict(state["losses"])
        self._measured = [Finding.from_json(each) for each in state["measured"]]
        self.undecided = dict(state["undecided"])
        self._probe = None if state["probe"] is None else LossCourse(**state["probe"])
        self._ratios = None if state["ratios"] is None else StabilityCourse.from_state(state["ratios"])
        self._rate, self._vector = state["rate"], state["vector"]
        self._safe = state.get("safe", SAFE_MOMENTUM)
        self._out, self._statistical = dict(state["out"]), state["statistical"]
        self._start.load_state_dict(state["start"])
        self._shares = None if state["shares"] is None else dict(state["shares"])
        self._forecast.load_state_dict(state["forecast"])
        self._noise.load_state_dict(state["noise"])


def _add(findings: list[Finding], found: Finding | None) -> None:
    if found is not None:
        findings.append(found)


def _is_input(losses: LossesSeen) -> bool:
    return losses.not_finite is not None and losses.not_finite.kind == "input"
