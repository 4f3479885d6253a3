"""``FigureTurns``: at which measurements a figure is drawn: steps that are evenly spaced on a logarithmic scale, as far as time allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning_conv.callbacks.run.schedule import Schedule

FIRST_DRAWING = 0.1
"""Seconds that a figure is taken to need before it was drawn: 0.03 to 0.15 on one core of a server (2026), fonts are read for the first."""

GROWTH = 2.0
"""The next figure of a kind is due when the step is so many times that of the last one: twenty pictures in a million steps."""

PART = 1.0 / 3.0
"""Of a monitor's share of the time of the run, what all of its figures may take."""


class FigureTurns:
    """Decides for one monitor which figures are drawn at a measurement, and notes what each of them took.

    A figure is due at the first measurement, and again when the step has doubled. It is drawn if all figures of the monitor stay within a
    third of its share of the time; with ``every_n_steps`` whenever it is due. At the end of the fit every figure that is not of this step
    is due: the first one is drawn in any run in which none was, the others if the run can afford it.

    Attributes:
        spent: Seconds that the figures of this fit took.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._steps: dict[str, int] = {}  # of the last figure of each tag
        self._seconds: dict[str, float] = {}  # what it took

    def begin(self) -> None:
        """Begin a fit, whose budget is its own; which figures there are already is still known."""
        self.spent = 0.0

    def may(self, tag: str, schedule: Schedule, share: float, step: int, *, last: bool, since: float = 0.0) -> bool:
        """Return whether a figure is drawn now.

        Args:
            tag: Its tag.
            schedule: Of the monitor.
            share: Of the time of the run that the monitor may take.
            step: Optimizer steps done.
            last: Whether this is the end of the fit.
            since: Seconds of this measurement that the schedule does not know of yet.
        """
        before, seconds = self._steps.get(tag), self._seconds.get(tag, FIRST_DRAWING)
        if before is not None and before >= step:
            return False
        if last:
            return not self._steps or schedule.allows_at_end(since + seconds, step)
        if before is not None and step < GROWTH * before:
            return False
        if schedule.every_n_steps is not None:
            return True
        return self.spent + seconds <= PART * share * schedule.elapsed and schedule.allows_beside(since + seconds, step)

    def draw(self, tag: str, step: int, draw: Callable[[], object]) -> None:
        """Draw a figure and note what it took.

        Args:
            tag: Its tag.
            step: Optimizer steps done.
            draw: Draws and logs it.
        """
        begun = time.perf_counter()
        draw()
        self._steps[tag], self._seconds[tag] = step, time.perf_counter() - begun
        self.spent += self._seconds[tag]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        return {"steps": dict(self._steps), "seconds": dict(self._seconds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; an empty state empties it."""
        self._steps = {tag: int(step) for tag, step in state.get("steps", {}).items()}
        self._seconds = {tag: float(seconds) for tag, seconds in state.get("seconds", {}).items()}
