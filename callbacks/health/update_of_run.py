"""``UpdateOfRun``: the gradient of the probe, the update that the optimizer makes of it, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.health.step_of_run import NoStepError, batch_over_probe, loss_in_outputs, optimizer_of
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.steps import changed_steps, clip_as_trainer
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.course import StabilityCourse
from lightning_conv.health.critical_sharpness import LEAST, MOST, CriticalFactor, critical_factor
from lightning_conv.health.finding import Finding
from lightning_conv.health.finding_of_update import finding_of_update, reading_of
from lightning_conv.health.layer_gradients import LayerGradient, layer_gradients
from lightning_conv.health.next_update import next_update
from lightning_conv.health.optimizer_rules import UnknownStepError, has_rule, is_of_torch, only_rate
from lightning_conv.losses.gradient import inner, wide
from lightning_conv.losses.of_outputs import evaluate
from lightning_conv.machine.memory import allowed_memory

COPIES = 40
"""Bytes per weight that the search takes, roughly: two copies in float64, and weights, gradient, update and state in float32."""


TOLD = 0.02
"""Rounding of the loss over its change to first order at the critical factor, up to which the network's own type is enough."""

UNITS = 16
"""Units in the last place by which outputs are off, roughly."""


class ProbeGradient:
    """The gradient of the run's loss on the probe at one moment, computed when it is first asked for.

    Args:
        run: The run at this moment.
    """

    def __init__(self, run: RunView) -> None:
        self._run = run

    @cached_property
    def value(self) -> dict[str, Tensor]:
        """The gradient by the name of the weight, of those that the kernel is over; empty: the loss is not known.

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
    """

    def __init__(self) -> None:
        self.layers: list[LayerGradient] = []
        self.scalars: dict[str, float] = {}
        self._factor = 1.0  # the last critical one, with which the next search begins
        self._course: StabilityCourse | None = None  # of an optimizer without a rule
        self._optimizer = ""

    def clear(self) -> None:
        """Forget the numbers of the last measurement, before another one: those that are not found again become NaN."""
        self.layers, self.scalars = [], dict.fromkeys(self.scalars, math.nan)

    def measure(self, run: RunView, gradient: ProbeGradient) -> str:
        r"""Measure how long the next update u is against the length from which on it raises the loss of the probe.

        u is what the run's optimizer would make of the probe's gradient now, clipped as the trainer does: a deep copy of it takes the step
        (``next_update``), if its class is torch's. The step of any other one is code that may count, draw, or write elsewhere. This is
        done for optimizers with a known rule as well, since the rule takes the preconditioner as fixed and the copy does not.

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
        try:
            updates = self._updates(run, found)
        except (NoStepError, UnknownStepError) as error:
            self.layers = layer_gradients(found, weights, {})
            return str(error)
        self.layers = layer_gradients(found, weights, updates)
        if not any(bool((each != 0).any()) for each in updates.values()):
            return "the update is zero"
        return self._note(run, self._search(run, found, updates), optimizer_of(run))

    def _updates(self, run: RunView, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return u by the name of the weight.

        Raises:
            NoStepError: Something stands between gradient and step, the optimizer is not torch's, the weights are complex, or their copies
                take too much memory.
            UnknownStepError: A copy of the optimizer takes no step.
        """
        optimizer, weights = optimizer_of(run), run.parameters
        if why := changed_steps(run.trainer, accumulated=True, clips=True):
            raise NoStepError(why)
        own = {id(each) for each in weights.values()}
        every = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
        if run.trainer.gradient_clip_val and any(id(each) not in own for each in every):
            raise NoStepError("gradients are clipped together with those of weights that are not measured")
        if not is_of_torch(optimizer):
            raise NoStepError(f"the step of {type(optimizer).__name__} is code that may reach outside of a copy of it")
        if any(each.is_complex() for each in weights.values()):
            raise NoStepError("some weights are complex")
        needed = COPIES * sum(each.numel() for each in weights.values())
        if needed > allowed_memory(run.measurement.probe.max_memory, run.module.device):
            raise NoStepError("copies of the weights take more memory than is allowed (Probe(max_memory=...))")
        scale = batch_over_probe(run)
        scaled = {name: scale * each for name, each in gradients.items()}
        with isolated():
            return next_update(optimizer, weights, clip_as_trainer(run.trainer, scaled))

    def _search(self, run: RunView, gradients: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> CriticalFactor:
        """Search the critical factor with the network in its own type, and in float64 where rounding could decide."""
        found = self._search_in(run, updates, None)
        reach = found.upper if math.isfinite(found.upper) else found.lower
        slope = abs(inner(gradients, {name: each.to(gradients[name]) for name, each in updates.items()}))
        if _rounding(run) <= TOLD * reach * slope:
            return found
        return self._search_in(run, updates, torch.float64)

    def _search_in(self, run: RunView, updates: Mapping[str, Tensor], dtype: torch.dtype | None) -> CriticalFactor:
        loss = run.sample_loss(dtype=dtype)
        device = "cpu" if run.module.device.type == "mps" else run.module.device  # Apple's GPUs do not have float64
        pairs = {name: (run.parameters[name].detach().to(device), each.to(device)) for name, each in updates.items()}

        def at(factor: float) -> float:
            return loss.value(at={name: w.double() + factor * u.double() for name, (w, u) in pairs.items()})

        return critical_factor(at, start=self._factor)

    def _note(self, run: RunView, found: CriticalFactor, optimizer: Optimizer) -> str:
        if not has_rule(optimizer):
            self._optimizer, reading = type(optimizer).__name__, reading_of(found, run.step)
            if self._course is None:
                self._course = StabilityCourse.begin(reading)
            elif run.step > self._course.now.step:
                self._course = self._course.then(reading)
        if not found.found:
            if found.lower:
                return f"the update does not raise the loss of the probe, even at {MOST:g} times its length"
            return f"the update raises the loss of the probe even at 1/{1 / LEAST:g} of its length, as momentum does at times"
        self._factor = min(max(found.value, LEAST), MOST)
        rate = only_rate(optimizer)
        values = {"critical_ratio": found.ratio, "critical_sharpness": found.sharpness(rate) if rate else math.nan}
        self.scalars |= {name: value for name, value in values.items() if math.isfinite(value)}
        return ""

    def finding(self) -> Finding | None:
        """Return what is said of the step where the optimizer has no rule; None: it has one, or nothing is known."""
        return None if self._course is None else finding_of_update(self._course, optimizer=self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        return {
            "layers": [asdict(each) for each in self.layers],
            "scalars": dict(self.scalars),
            "factor": self._factor,
            "course": None if self._course is None else self._course.state_dict(),
            "optimizer": self._optimizer,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.layers = [LayerGradient(**each) for each in state["layers"]]
        self.scalars, self._factor, self._optimizer = dict(state["scalars"]), state["factor"], state["optimizer"]
        self._course = None if state["course"] is None else StabilityCourse.from_state(state["course"])


def _rounding(run: RunView) -> float:
    """Return how far the loss of the probe is off: roughly the sum of |s u|, of outputs u and its gradient s by them, in units of u."""
    u = run.shaped_outputs
    exact = wide(u)
    slope = evaluate(loss_in_outputs(run), exact).slope
    return UNITS * torch.finfo(u.dtype).eps * float((slope.reshape(exact.shape) * exact).abs().sum())
