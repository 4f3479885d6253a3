"""``RunRecord``: what ``ConvergenceCriteria`` has observed of a run and what its trackers have measured, across checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from matplotlib.figure import Figure
from torch.optim import Optimizer

from lightning_conv.callbacks.criteria.observer import Observer, step_violations
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker
from lightning_conv.callbacks.run.assumptions import EVERYWHERE, Assumption, Violation, violated, without_verdict
from lightning_conv.callbacks.run.guarded import Attempt, Failures, attempted, guarded
from lightning_conv.callbacks.run.layer_norms import LayerNorms
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.steps import may_be_plain
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.callbacks.run.violations import find_violations, loss_infimum
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.tools.observation import observed_metrics

COMPARED: frozenset[Assumption] = EVERYWHERE - {"unclipped"} | {"full batch", "whole set"}
"""Where the run violates none of these, a step must be -h grad f with f as it is on the probe."""

NOT_EVALUATED = (ValueError, TypeError, RuntimeError, IndexError)
"""Errors of a loss that is not one of outputs and targets."""

SHARED_ONCE = frozenset({"hidden_norm_min", "hidden_norm_max"})
"""Shared scalars that stay the same during a run."""


class RunRecord:
    """Follows one run with copies of the given trackers.

    Args:
        trackers: in the state that a run begins with.
        loss_fn: the loss of the training step; None: the one that is observed in it.
    """

    def __init__(self, trackers: Iterable[CriteriaTracker], loss_fn: LossFn | None) -> None:
        self.failures = Failures()
        self.trackers = {each.name: copy.deepcopy(each) for each in trackers}  # name -> tracker
        self._needs = frozenset(need for each in self.trackers.values() for need in each.needs)
        self.observer = Observer(spectral="step norms" in self._needs)  # of the steps
        self._loss_fn = loss_fn
        self._norms = LayerNorms()
        self._fixed: list[Violation] | None = None  # those that do not change during a fit; None: not looked for yet
        self._infimum = 0.0
        self._scalars: dict[str, float] = {}  # of the last measurement and the step after it

    @property
    def once(self) -> frozenset[str]:
        """Names of scalars that stay the same during a run."""
        return SHARED_ONCE.union(*(each.once for each in self.trackers.values()))

    @property
    def hypotheses(self) -> frozenset[str]:
        """Names of criteria whose refutation is no failure of the run."""
        return frozenset().union(*(each.hypotheses for each in self.trackers.values()))

    def view(self, trainer: pl.Trainer, measurement: Measurement) -> RunView:
        """Return the run at this moment."""
        return RunView(
            trainer,
            measurement,
            given_loss=self._loss_fn,
            start=self.observer.start,
            history=self.observer.history,
            infimum=self._infimum,
            largest_rate=self.observer.largest_rate,
            look_for_violations=lambda run: [*(self._fixed or []), *step_violations(run)],
            layer_norms=self._norms,
        )

    def begin(self) -> None:
        """Begin a fit, of a new run or of this one: module, data and optimizer are looked at again."""
        self._fixed = None
        self.observer.begin()

    def note_start(self, trainer: pl.Trainer, measurement: Measurement) -> None:
        """Keep the weights of the start, where the first measurement comes later."""
        if not self.observer.start:
            weights = self.view(trainer, measurement).parameters
            self.observer.start |= {name: value.detach().clone() for name, value in weights.items()}

    def measure(self, trainer: pl.Trainer, measurement: Measurement, gram: KernelGram, spectrum: Spectrum) -> RunView:
        """Observe the present weights, measure what the trackers and their needs ask for, and return the run at this moment."""
        self._look(trainer, measurement)
        self._observe_loss(trainer, measurement, casts=bool(gram.narrow))
        return self._measure(trainer, measurement, gram, spectrum)

    def resume(self, trainer: pl.Trainer, measurement: Measurement, gram: KernelGram, spectrum: Spectrum) -> None:
        """Measure again what waits for the step to come; the weights are those of the last observation."""
        self._look(trainer, measurement)
        if not (run := self.view(trainer, measurement)).violated(["known loss"]):
            self.observer.wait(run)
        self._measure(trainer, measurement, gram, spectrum)

    def notes_steps(self, optimizers: Iterable[Optimizer]) -> bool:
        """Return whether ``before_step`` has anything to note: one of the optimizers may make plain steps, or a tracker wants them all.

        Args:
            optimizers: those of the run.
        """
        return may_be_plain(optimizers) or any(each.notes_steps for each in self.trackers.values())

    def before_step(
        self, trainer: pl.Trainer, measurement: Measurement, optimizer: Optimizer, callback: pl.Callback
    ) -> None:
        """Note the optimizer step that is about to be made."""
        # What is done before every step must cost next to nothing: a view of the run takes longer than to see that none is needed.
        plain = not self.observer.passes_over(optimizer)
        noting = [each for each in self.trackers.values() if each.notes_steps]
        if not (noting or plain):
            return
        run = self.view(trainer, measurement)
        rate = self.observer.before_step(run, optimizer, callback) if plain else math.nan
        for tracker in noting:
            # Without the step, so that an error in every step is one warning.
            with self._attempt(tracker, "steps are not noted"):
                tracker.before_step(run, rate)

    def observe(self, trainer: pl.Trainer, measurement: Measurement) -> RunView | None:
        """Observe the step that the last measurement waited for and return the run after it; None if the step was missed."""
        run = self.view(trainer, measurement)
        if run.violated(["known loss"]):  # the loss was given up since the measurement
            self.observer.pending = None
            return None
        seen = self.observer.observe(run, compared=not violated(self._fixed or [], COMPARED))
        if seen is None:
            return None
        for tracker in self.trackers.values():
            with self._attempt(tracker, "the step after a measurement is left out", run):
                self._scalars |= _numbers(tracker.observe(run, seen))
        return run

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return the verdicts of all trackers; where an assumption is violated, ``not applicable`` with the measured number."""
        return [each for found in self.by_paper(run).values() for each in found]

    def by_paper(self, run: RunView) -> dict[str, list[Criterion]]:
        """Return the verdicts of each tracker by its name; one that fails has none."""
        by_paper: dict[str, list[Criterion]] = {}
        for name, tracker in self.trackers.items():
            found: list[Criterion] = by_paper.setdefault(name, [])
            with self._attempt(tracker, "nothing is judged", run):
                reason = run.violated(tracker.assumes)
                judged, always = tracker.criteria(run), tracker.unconditional(run)
                if odd := [each for each in (*judged, *always) if not isinstance(each, Criterion)]:
                    raise TypeError(f"criteria: {odd[0]!r}; need a list of Criterion")
                found += [*(_violating(each, reason) if reason else each for each in judged), *always]
        return by_paper

    def figures(self) -> dict[str, Callable[[], Figure]]:
        """Return the functions of all trackers that draw, by the name of the figure."""
        found: dict[str, Callable[[], Figure]] = {}
        for tracker in self.trackers.values():
            with self._attempt(tracker, "its figures are left out"):
                found |= tracker.figures()
        return found

    def finish(self, run: RunView) -> bool:
        """Return whether the end of the fit has brought any tracker something that must be judged again; all of them are asked."""
        brought = False
        for tracker in self.trackers.values():
            with self._attempt(tracker, "the end of the fit is left out", run):
                brought = tracker.finish(run) or brought
        return brought

    def scalars(self) -> dict[str, float]:
        """Return the scalars of the last measurement and the step after it, those that are finite."""
        found = observed_metrics(self.observer.history) | self._scalars
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        trackers: dict[str, Any] = {}
        for name, tracker in self.trackers.items():
            with self._attempt(tracker, "its state is not in the checkpoint"):
                trackers[name] = tracker.state_dict()
        return {"observer": self.observer.state_dict(), "trackers": trackers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; papers that it does not have begin anew."""
        self.observer.load_state_dict(state.get("observer", {}))
        for name, tracker in self.trackers.items():
            if name in state.get("trackers", {}):
                with self._attempt(tracker, "it begins anew, without its state in the checkpoint"):
                    tracker.load_state_dict(state["trackers"][name])

    def _look(self, trainer: pl.Trainer, measurement: Measurement) -> None:
        """Look at what does not change during a fit, at its first measurement."""
        if self._fixed is not None:
            return
        run = self.view(trainer, measurement)
        self._fixed, self._infimum = find_violations(run), loss_infimum(run)
        run = self.view(trainer, measurement)
        for tracker in self.trackers.values():
            with self._attempt(tracker, "the run is not looked at", run):
                tracker.begin(run)

    def _observe_loss(self, trainer: pl.Trainer, measurement: Measurement, *, casts: bool) -> None:
        """Add an observation; with the loss and its gradient where the loss is known and can be evaluated on the probe."""
        run = self.view(trainer, measurement)
        known = not run.violated(["known loss"])
        if not known or self.observer.measured_loss:
            self.observer.measure(run, with_loss=known, casts=casts)
            return
        with attempted(*NOT_EVALUATED) as attempt:
            self.observer.measure(run, with_loss=True, casts=casts)
        if attempt.failed:
            why = f"the loss could not be evaluated on the probe ({attempt.error}); pass loss_fn= or Probe(target_fn=, forward_fn=)"
            self._fixed = [*(self._fixed or []), Violation("known loss", why)]
            self.observer.measure(run, with_loss=False, casts=casts)

    def _measure(self, trainer: pl.Trainer, measurement: Measurement, gram: KernelGram, spectrum: Spectrum) -> RunView:
        run = self.view(trainer, measurement)
        scalars: dict[str, float] = {}
        for need in sorted(self._needs & {"layers", "activity"}):
            what = f"ConvergenceCriteria: the scalars of {need} are left out"
            with guarded(run.step, what, failures=self.failures):
                scalars |= run.layers if need == "layers" else run.activity
        for tracker in self.trackers.values():
            with self._attempt(tracker, "its measurement is left out", run):
                scalars |= _numbers(tracker.measure(run, gram, spectrum))
        self._scalars = scalars
        return run

    def _attempt(
        self, tracker: CriteriaTracker, what: str, run: RunView | None = None
    ) -> AbstractContextManager[Attempt]:
        """Guard a call of a tracker, whose errors must not keep the others from being judged."""
        step = None if run is None else run.step
        return guarded(step, f"ConvergenceCriteria, {tracker.name}: {what}", failures=self.failures)


def _violating(criterion: Criterion, reason: str) -> Criterion:
    """Return the criterion as not applicable for ``reason``, after a reason of its own: another network is the first thing to know."""
    own = criterion.reason.split("; ") if criterion.verdict == "not applicable" else []
    return without_verdict(criterion, "; ".join(dict.fromkeys([*own, *reason.split("; ")])))


def _numbers(scalars: Mapping[str, Any]) -> dict[str, float]:
    """Return scalars as floats.

    Raises:
        TypeError: one is not a number; the message names it.
    """
    found: dict[str, float] = {}
    for name, value in scalars.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name!r}: {value!r}; need a number") from error
    return found
