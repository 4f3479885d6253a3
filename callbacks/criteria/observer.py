"""``Observer``: the loss of a run on the probe, its gradient, and what the optimizer step after a measurement does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.clipping import RegularizedGradientClipping, gradients_of, total_norm
from lightning_conv.callbacks.run.assumptions import Violation
from lightning_conv.callbacks.run.callbacks import all_callbacks, find_callback
from lightning_conv.callbacks.run.deviation import step_departure
from lightning_conv.callbacks.run.steps import NOT_PLAIN, describe_optimizer
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.callbacks.run.violations import violations_of_loss
from lightning_conv.losses.gradient import inner, norm, wide
from lightning_conv.theory.tools.matrix_norms import largest_spectral_norm
from lightning_conv.theory.tools.observation import NOISE, Observation

FLOAT64_NOISE = 1e-14
"""Changes of the loss below this share of it are rounding where the network computes in float64."""


@dataclass
class Pending:
    """A measurement that waits for the step after it."""

    weights: dict[str, Tensor]  # a copy of w_t
    gradient: dict[str, Tensor]
    rate: float = math.nan  # of the step, noted just before it


class Observer:
    """Follows one run.

    Args:
        spectral: whether the spectral norms of the steps are needed.
    """

    def __init__(self, *, spectral: bool) -> None:
        self.history: list[Observation] = []  # what was measured, in order
        self.start: dict[str, Tensor] = {}  # the weights of the start, w_0; empty before the first measurement
        self.pending: Pending | None = None
        self.largest_rate = math.nan  # the largest rate of all steps so far that were plain descent
        self._spectral = spectral
        self._path: Tensor | float = 0.0
        self._path_known = True
        # The last optimizer whose step was passed over, and the group and the setting of SGD for which it was.
        self._passed: tuple[Optimizer | None, Mapping[str, Any], str] = None, {}, ""

    @property
    def measured_loss(self) -> bool:
        """Whether the loss could be measured at least once."""
        return any(not math.isnan(seen.loss) for seen in self.history)

    def begin(self) -> None:
        """Begin a fit, of a new run or of this one: no measurement waits for a step."""
        self.pending = None

    def measure(self, run: RunView, *, with_loss: bool, casts: bool = False) -> None:
        """Add an observation of the present weights, which then waits for the step after it.

        Args:
            run: at this moment.
            with_loss: whether the loss is measured.
            casts: whether the network casts to a narrower type inside; the loss of a float64 network is then rounded to that.
        """
        if run.steps.rate is None:  # before the first step nothing has shown yet whether the steps are plain ones
            self._path_known = False
        parameters = run.parameters
        if not self.start:
            self.start |= {name: value.detach().clone() for name, value in parameters.items()}
        moved = {name: value.detach() - self.start[name].to(value) for name, value in parameters.items()}
        self.pending = None
        loss, slope = self.wait(run) if with_loss else (math.nan, math.nan)
        exact = next(run.module.parameters()).dtype == torch.float64 and not casts
        path = float(self._path) if self._path_known else math.nan
        noise = FLOAT64_NOISE if exact else NOISE / 10
        self.history.append(Observation(run.step, loss, slope, norm(moved), path, noise=noise))

    def wait(self, run: RunView) -> tuple[float, float]:
        """Measure the loss and its gradient, keep them with the weights for the step to come, and return f and |grad f|."""
        loss, gradient = run.sample_loss().gradient(run.measurement.parameters)
        weights = {name: value.detach().clone() for name, value in run.parameters.items()}
        self.pending = Pending(weights, gradient)
        return loss - run.infimum, norm(gradient)

    def passes_over(self, optimizer: Optimizer) -> bool:
        """Note a step whose rule is no plain descent, whatever stands around it; False: ``before_step`` has to look at it.

        Args:
            optimizer: that makes the step.
        """
        last, group, setting = self._passed
        if last is optimizer and group.get(setting):  # as in the step before, which is told at once
            return True
        if describe_optimizer(optimizer).rate is not None:
            return False
        self._path_known = False
        settings = ((group, name) for group in optimizer.param_groups for name in NOT_PLAIN if group.get(name))
        self._passed = optimizer, *next(settings, ({}, ""))
        return True

    def before_step(self, run: RunView, optimizer: Optimizer, callback: pl.Callback) -> float:
        """Note the step that is about to be made, which is not one to pass over, without waiting for the device.

        Args:
            run: before the step.
            optimizer: that makes it.
            callback: which asks; callbacks behind it in the trainer's list have not changed the gradients yet.

        Returns:
            The rate of plain descent before clipping; NaN: the step is something else.
        """
        learning_rate = run.steps.rate
        if learning_rate is None:
            self._path_known = False
            return math.nan
        rate = learning_rate / run.processes_averaged
        self.largest_rate = rate if math.isnan(self.largest_rate) else max(rate, self.largest_rate)
        if self.pending is not None:
            self.pending.rate = rate
        order = all_callbacks(run.trainer) if self._path_known else []
        clipping = next((each for each in order if isinstance(each, RegularizedGradientClipping)), None)
        if clipping is not None and order.index(clipping) > order.index(callback):
            self._path_known = False  # the gradients will be clipped after they were seen here
        if self._path_known and (gradients := gradients_of(optimizer)):
            size = total_norm(gradients)
            path = self._path if isinstance(self._path, Tensor) else wide(torch.tensor(self._path, device=size.device))
            self._path = torch.add(path, size, alpha=learning_rate)  # one operation, since it is done in every step
        return rate

    def observe(self, run: RunView, *, compared: bool) -> Observation | None:
        """Complete the last observation by what the step after it has done.

        Args:
            run: after the step.
            compared: whether the step should be -h grad f with f as it is on the probe, so that a difference can be told.

        Returns:
            The observation; None if the step was missed.
        """
        seen, pending, self.pending = self.history[-1], self.pending, None
        if pending is None or run.step != seen.step + 1:
            return None
        clipping = find_callback(run.trainer, RegularizedGradientClipping)
        parameters = run.parameters
        moved = {name: parameters[name].detach() - before for name, before in pending.weights.items()}
        factor = 1.0 if clipping is None else clipping.metrics.get("clipping/factor", math.nan)
        step = pending.rate * factor
        departure = rounding = math.nan
        if compared:

            def gradient_again(dtype: torch.dtype) -> Mapping[str, Tensor]:
                return run.sample_loss(dtype=dtype).gradient(run.measurement.parameters, at=pending.weights)[1]

            departure, rounding = step_departure(moved, pending.weights, pending.gradient, step, gradient_again)
        self.history[-1] = replace(
            seen,
            departure=departure,
            rounding=rounding,
            next_loss=run.loss_now() - run.infimum,
            linear=inner(pending.gradient, moved),
            moved=norm(moved),
            spectral=largest_spectral_norm(moved) if self._spectral else math.nan,
            step_size=step,
        )
        return self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {
            "history": [seen.state() for seen in self.history],
            "start": {name: value.cpu() for name, value in self.start.items()},
            "path": float(self._path),
            "path_known": self._path_known,
            "largest_rate": self.largest_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.history[:] = [Observation.from_state(seen) for seen in state.get("history", [])]
        self.start = dict(state.get("start", {}))
        self._path, self._path_known = float(state.get("path", 0.0)), bool(state.get("path_known", True))
        self.largest_rate = float(state.get("largest_rate", math.nan))


def step_violations(run: RunView) -> list[Violation]:
    """Return the assumptions that the optimizer's present settings, an observed step, or a loss that has changed violate."""
    found = violations_of_loss(run) if run.measurement.probe_loss.changed and run.given_loss is None else []
    if run.steps.rate is None:
        return [*found, Violation("descent", f"a step is no plain gradient descent: {run.steps.reason}")]
    if (seen := next((seen for seen in run.history if seen.departed), None)) is not None:
        why = (
            f"step {seen.step} differs from -h grad f, f the loss on the probe, by {seen.departure:.2g} of it, where rounding explains "
            f"{seen.rounding:.2g}: another loss, a further term in it, random numbers in the forward, or samples left out"
        )
        found.append(Violation("descent", why))
    if find_callback(run.trainer, RegularizedGradientClipping) is not None:
        found.append(Violation("unclipped", "RegularizedGradientClipping scales the gradients"))
    return found
