"""``UpdateOfRun``: the gradient of the probe, the update that the optimizer makes of it or has made, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.health.search_along import TOO_LARGE, fits_in_memory, search_factor
from lightning_conv.callbacks.health.step_of_run import NoStepError, batch_over_probe, optimizer_of
from lightning_conv.callbacks.health.watched_step import AFTER_THE_NEXT, StepSeen, WatchedStep, trained_weights
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.steps import changed_steps, clip_as_trainer
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_update import finding_of_update, reading_of
from lightning_conv.health.layers.layer_gradients import LayerGradient, layer_gradients
from lightning_conv.health.step.course import StabilityCourse
from lightning_conv.health.step.critical_sharpness import LEAST, MOST, CriticalFactor
from lightning_conv.health.step.next_update import next_update
from lightning_conv.health.step.optimizer_rules import UnknownStepError, has_rule, is_of_torch, only_rate


class ProbeGradient:
    """The gradient of the run's loss on the probe at one moment, computed when it is first asked for.

    Args:
        run: The run at this moment.
    """

    def __init__(self, run: RunView) -> None:
        self._run = run

    @cached_property
    def value(self) -> dict[str, Tensor]:
        """Return the gradient by the name of the weight, of those that the kernel is over; empty: the loss is not known.

        Cost: a forward and a backward pass of the probe.
        """
        run = self._run
        if run.loss_unknown or run.loss_targets is None:
            return {}
        return run.sample_loss().gradient(run.measurement.parameters)[1]


class UpdateOfRun:
    """Follows the updates of one run.

    Attributes:
        layers: Gradient and update of each layer at the last measurement.
        scalars: ``critical_sharpness`` and ``critical_ratio`` of the last measurement, as far as they were found.
        watched: The run's own step after a measurement, of an optimizer whose step no copy of it may take.
    """

    def __init__(self) -> None:
        self.layers: list[LayerGradient] = []
        self.scalars: dict[str, float] = {}
        self._factor = 1.0  # the last critical one, with which the next search begins
        self._course: StabilityCourse | None = None  # of an optimizer without a rule
        self._optimizer, self._own = "", False  # its name, and whether its own step was looked at
        self.watched = WatchedStep()

    def clear(self) -> None:
        """Forget the numbers of the last measurement, before another one: those that are not found again become NaN.

        Those of a step that was watched stand until another one was: it comes after the measurement.
        """
        self.layers, self.scalars = [], {} if self._own else dict.fromkeys(self.scalars, math.nan)

    def measure(self, run: RunView, gradient: ProbeGradient) -> str:
        r"""Measure how long the next update u is against the length from which on it raises the loss of the probe.

        u is what the run's optimizer would make of the probe's gradient now, clipped as the trainer does: a deep copy of it takes the step
        (``next_update``), if its class is torch's. The step of any other one is code that may count, draw, or write elsewhere. This is
        done for optimizers with a known rule as well, since the rule takes the preconditioner as fixed and the copy does not. Where no copy
        may take the step, or none can, the run's own step after this one is waited for (``observe``).

        The loss is computed in the network's type, and again in float64 where its change may be lost in rounding. What ``weight_decay``
        adds is part of the update, and no part of the loss.

        Args:
            run: The run at this moment.
            gradient: Of the probe.

        Returns:
            Why nothing was found; empty if something was.

        Cost: a forward and a backward pass of the probe, a step on copies of the weights and of the optimizer's state, and six to sixteen
        forward passes, in float64 if need be: about ``COPIES`` bytes per weight.
        """
        weights = run.parameters
        found = gradient.value
        if not found:
            return run.loss_unknown or "no targets are known"
        self.layers = layer_gradients(found, weights, {})
        if not is_of_torch(optimizer_of(run)):
            return self._ask(run)
        try:
            updates = self._updates(run, found)
        except NoStepError as error:
            return str(error)
        except UnknownStepError:
            return self._ask(run)
        self.layers = layer_gradients(found, weights, updates)
        if not any(bool((each != 0).any()) for each in updates.values()):
            return "the update is zero"
        optimizer = optimizer_of(run)
        factor = search_factor(run, found, updates, run.parameters, start=self._factor)
        return self._note(factor, optimizer, run.step, only_rate(optimizer))

    def _ask(self, run: RunView) -> str:
        if not fits_in_memory(run, run.parameters):
            return TOO_LARGE
        return self.watched.ask(run) or AFTER_THE_NEXT

    def observe(self, run: RunView, seen: StepSeen) -> str:
        r"""Measure how long the step that the run has made, u, is against the length from which on it raises the loss of the probe.

        u is the difference of the weights, so it is what came of the gradient of the step's own batch, and of all that stands between it
        and the weights. The loss is :math:`L(\theta + c\,u)` with the weights :math:`\theta` before the step, and BatchNorm as in training.

        Args:
            run: The run after the step.
            seen: The step.

        Returns:
            Why nothing was found; empty if something was.

        Cost: two forward passes and a backward pass of the probe, and six to sixteen forward passes, in float64 if need be.
        """
        self.scalars = dict.fromkeys(self.scalars, math.nan)  # those of the step that was watched before
        own = dict(run.network.named_parameters())
        weights = {name: each for name, each in trained_weights(run).items() if name in seen.before and name in own}
        updates = seen.update(weights)
        if not all(bool(each.isfinite().all()) for each in updates.values()):
            return "the step has made weights that are not finite"
        if not any(bool((each != 0).any()) for each in updates.values()):
            return "the update is zero"
        before = {name: seen.before[name] for name in updates}
        loss, found = run.sample_loss(as_trained=True).gradient(list(before), at=before)
        if not math.isfinite(loss):
            return "the loss is not finite"
        factor = search_factor(run, found, updates, before, start=self._factor, as_trained=True)
        return self._note(factor, optimizer_of(run), seen.step, seen.rate, own=True)

    def _updates(self, run: RunView, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return u by the name of the weight.

        Raises:
            NoStepError: Something stands between gradient and step, the weights are complex, or their copies take too much memory.
            UnknownStepError: A copy of the optimizer takes no step.
        """
        optimizer, weights = optimizer_of(run), run.parameters
        if why := changed_steps(run.trainer, accumulated=True, clips=True):
            raise NoStepError(why)
        own = {id(each) for each in weights.values()}
        every = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
        if run.trainer.gradient_clip_val and any(id(each) not in own for each in every):
            raise NoStepError("gradients are clipped together with those of weights that are not measured")
        if any(each.is_complex() for each in weights.values()):
            raise NoStepError("some weights are complex")
        if not fits_in_memory(run, run.parameters):
            raise NoStepError(TOO_LARGE)
        scale = batch_over_probe(run)
        scaled = {name: scale * each for name, each in gradients.items()}
        with isolated():
            return next_update(optimizer, weights, clip_as_trainer(run.trainer, scaled))

    def _note(
        self, found: CriticalFactor, optimizer: Optimizer, step: int, rate: float | None, *, own: bool = False
    ) -> str:
        if not has_rule(optimizer):
            self._optimizer, self._own, reading = type(optimizer).__name__, own, reading_of(found, step)
            if self._course is None:
                self._course = StabilityCourse.begin(reading)
            elif step > self._course.now.step:
                self._course = self._course.then(reading)
        if not found.found:
            if found.lower:
                return f"the update does not raise the loss of the probe, even at {MOST:g} times its length"
            return f"the update raises the loss of the probe even at 1/{1 / LEAST:g} of its length, as momentum does at times"
        self._factor = min(max(found.value, LEAST), MOST)
        values = {"critical_ratio": found.ratio, "critical_sharpness": found.sharpness(rate) if rate else math.nan}
        self.scalars |= {name: value for name, value in values.items() if math.isfinite(value)}
        return ""

    def finding(self) -> Finding | None:
        """Return what is said of the step where the optimizer has no rule; None: it has one, or nothing is known."""
        if self._course is None:
            return None
        return finding_of_update(self._course, optimizer=self._optimizer, own=self._own)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        return {
            "layers": [asdict(each) for each in self.layers],
            "scalars": dict(self.scalars),
            "factor": self._factor,
            "course": None if self._course is None else self._course.state_dict(),
            "optimizer": self._optimizer,
            "own": self._own,
            "watched": self.watched.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.layers = [LayerGradient(**each) for each in state["layers"]]
        self.scalars, self._factor, self._optimizer = dict(state["scalars"]), state["factor"], state["optimizer"]
        self._course = None if state["course"] is None else StabilityCourse.from_state(state["course"])
        self._own = state.get("own", False)
        if "watched" in state:
            self.watched.load_state_dict(state["watched"])
