"""``ForecastTrack``: the forecasts of one run in plain torch, the cheapest ones beside them, and what the product would have shown."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from lightning_conv.health.kernel.forecast import LinearisedRun
from lightning_conv.health.kernel.forecast_record import ForecastRecord, PredictedLoss, relative_error
from lightning_conv.health.step.optimizer_rules import UnknownStepError
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.recipes.lab.health.plain_step import PlainStep, operator_of
from lightning_conv.recipes.lab.health.step_record import batches_of, like, probe_of, ratio_at_start
from lightning_conv.recipes.lab.health.study_runs import StudyRun, Task, optimizer_of

MEASUREMENTS = 20
"""Measurements in a run, about."""

AHEAD = (1, 4)
"""Measurements ahead for which a forecast is made."""


@dataclass(frozen=True, kw_only=True)
class Forecast(PredictedLoss):
    """A forecast and what came, beside another cheap one.

    Attributes:
        ahead: Measurements ahead.
        previous: The loss one measurement earlier; None: there was none.
        shown: Whether the product would have shown it: only the next measurement, and only by its own record.
    """

    ahead: int
    previous: float | None
    shown: bool

    @property
    def error_extrapolated(self) -> float:
        """Return the relative error of the loss that goes on to fall by the same factor; that of the cheapest if none is before."""
        if self.previous is None or not self.previous > 0:
            return self.error_unchanged
        return relative_error(self.before * (self.before / self.previous) ** self.ahead, self.real)


@dataclass(frozen=True)
class ForecastTrack:
    """The forecasts of a run.

    Attributes:
        run: The run.
        ended_well: Whether its loss ended finite and below its start.
        forecasts: Those whose step came.
    """

    run: StudyRun
    ended_well: bool
    forecasts: tuple[Forecast, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the track in the types of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ForecastTrack:
        """Return what ``to_json`` wrote."""
        forecasts = tuple(Forecast(**each) for each in content["forecasts"])
        return cls(StudyRun(**content["run"]), content["ended_well"], forecasts)

    def some(self, ahead: int, since: float = 0.0, until: float = 1.0) -> list[Forecast]:
        """Return the forecasts so far ahead that were made in a part of the run.

        Args:
            ahead: Measurements ahead.
            since: Share of the run from which on, included.
            until: Share of the run before which.
        """
        return [each for each in self.forecasts if each.ahead == ahead and since <= each.share < until]


def middle(errors: Iterable[float]) -> float:
    """Return the median; NaN of none.

    Args:
        errors: The errors.
    """
    known = list(errors)
    return median(known) if known else math.nan


def track_run(run: StudyRun) -> ForecastTrack:
    """Train a run and forecast the loss of its probe at every measurement, as ``ConvergenceHealth`` does.

    Args:
        run: The run.

    Cost: 0.5 to 3 s.
    """
    task = Task.of(run)
    inputs, targets = probe_of(run, task)
    operator = operator_of(task.net, inputs)
    optimizer = optimizer_of(run, task.net, run.ratio / ratio_at_start(run, task, operator))
    every = max(1, run.size.steps // MEASUREMENTS)
    losses: list[float] = []
    made: list[tuple[int, list[float]]] = []  # number of the measurement and the losses of ``AHEAD``
    for step, (_, x, y) in enumerate(batches_of(run, task)):
        if step % every == 0:
            losses.append(_measure(task, operator, optimizer, inputs, targets, every, len(losses), made))
        task.net.train()
        optimizer.zero_grad()
        loss = task.loss(task.net(x), y)
        if not bool(torch.isfinite(loss)):
            return ForecastTrack(run, False, ())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    losses.append(_measure(task, operator, optimizer, inputs, targets, every, len(losses), []))
    return ForecastTrack(run, losses[-1] < losses[0], tuple(scored(losses, made)))


def scored(losses: list[float], made: list[tuple[int, list[float]]]) -> list[Forecast]:
    """Return the forecasts with what came, and whether each would have been shown.

    Args:
        losses: Of the measurements.
        made: Number of a measurement and the losses that were forecast there for ``AHEAD``.
    """
    found = []
    record = ForecastRecord()
    for number, predicted in made:
        record.compare(number, losses[number])
        record.keep(number, losses[number], {number + 1: predicted[0]})
        shown = record.shown() is not None
        for ahead, loss in zip(AHEAD, predicted, strict=True):
            if number + ahead < len(losses):
                found.append(
                    Forecast(
                        ahead=ahead,
                        share=number / (len(losses) - 1),
                        before=losses[number],
                        previous=losses[number - 1] if number else None,
                        predicted=loss if math.isfinite(loss) else 1e300,
                        real=losses[number + ahead],
                        shown=shown and ahead == 1,
                    )
                )
    return found


def _measure(
    task: Task,
    operator: NTKOperator,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    every: int,
    number: int,
    made: list[tuple[int, list[float]]],
) -> float:
    """Return the loss of the probe, and add the forecasts of now."""
    try:
        step = PlainStep(task.net, operator, inputs, lambda u: task.loss(u, like(targets, u)), optimizer)
    except UnknownStepError:
        with torch.no_grad():
            task.net.train()
            return float(task.loss(task.net(inputs), targets))
    loss = float(step.loss(step.outputs))
    following = step.linearised(2.0 / step.outputs.numel() if task.squared else None)
    if following is not None:
        made.append((number, [_after(following, ahead * every) for ahead in AHEAD]))
    return loss


def _after(run: LinearisedRun, steps: int) -> float:
    return copy.copy(run).advance(steps)
