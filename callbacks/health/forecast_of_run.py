"""``ForecastOfRun``: forecasts of the probe's loss from the present kernel, scored by the run itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_conv.callbacks.health.step_of_run import StepOfRun
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_course import finding_of_forecast
from lightning_conv.health.kernel.forecast import LinearisedRun
from lightning_conv.health.kernel.forecast_record import ForecastRecord

FARTHEST = 200
"""Steps that a loss other than the squared one is continued for at most, since each takes an evaluation."""


class ForecastOfRun:
    """Continues the linearised run of the last measurement to the present one, compares, and makes the next forecast.

    Args:
        total: Number of steps of the run; None: not known.
    """

    def __init__(self, total: int | None = None) -> None:
        self.record = ForecastRecord(total)
        self._last: tuple[int, float, LinearisedRun] | None = None  # step, loss and run of the last measurement
        self._stored: tuple[int, float, dict[str, Any]] | None = None  # the same from a checkpoint

    def measure(self, step: StepOfRun | None, now: int, loss: float) -> Finding | None:
        """Compare the last forecast with the present loss, and return the next one as far as it may be shown.

        Args:
            step: The next step of the run; None: it is not known.
            now: Optimizer steps done.
            loss: The present loss of the probe.
        """
        last, self._last = self._last, None
        if self._stored is not None and step is not None:
            made, before, state = self._stored
            last = made, before, LinearisedRun.from_state(state, step.loss)
        self._stored = None
        ahead = None if last is None else now - last[0]
        if last is not None and ahead:
            made, before, continued = last
            if (predicted := _continued(continued, ahead)) is not None:
                self.record.keep(made, before, {now: predicted})
                self.record.compare(now, loss)
        if step is None or (following := step.linearised()) is None:
            return None
        self._last = now, loss, following
        if not ahead or (predicted := _continued(copy.copy(following), ahead)) is None:
            return None
        shown = copy.deepcopy(self.record)  # the next measurement may come at another step
        shown.keep(now, loss, {now + ahead: predicted})
        return finding_of_forecast(shown.shown())

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types and tensors."""
        last = self._stored
        if self._last is not None:
            made, loss, run = self._last
            last = made, loss, run.state_dict()
        return {"record": self.record.state_dict(), "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.record.load_state_dict(state["record"])
        self._last, self._stored = None, None if state["last"] is None else tuple(state["last"])


def _continued(run: LinearisedRun, steps: int) -> float | None:
    """Return the loss so many steps later; None: that takes too long."""
    return None if not run.is_squared and steps > FARTHEST else run.advance(steps)


def steps_of_run(trainer: pl.Trainer) -> int | None:
    """Return the number of optimizer steps of the run; None: not known.

    Args:
        trainer: Trainer of the run.
    """
    if trainer.max_steps > 0:
        return trainer.max_steps
    batches, epochs, accumulated = trainer.num_training_batches, trainer.max_epochs, trainer.accumulate_grad_batches
    if epochs is None or epochs < 0 or batches == float("inf"):
        return None
    return math.ceil(batches / accumulated) * epochs
