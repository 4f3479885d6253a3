"""``LossCourse`` and ``StabilityCourse``: what of a run's losses and stability ratios has to be remembered to judge a rise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

RISEN = 3.0
"""Factor above its smallest value from which on a loss counts as risen."""

RECENT = 16
"""Readings of the stability ratio that are kept, beside the first one."""

TREND = 4
"""Readings back that the present one is compared with."""


@dataclass(frozen=True)
class LossCourse:
    """The losses of a run so far, of one kind: of the probe, or of its training set.

    Attributes:
        first: The first loss.
        smallest: The smallest one.
        at: Step of the smallest one, the first time.
        now: The last one.
        step: Its step.
        since: First step from which on all losses were ``RISEN`` times the smallest one, or not finite; None: it has not risen.
    """

    first: float
    smallest: float
    at: int
    now: float
    step: int
    since: int | None = None

    @classmethod
    def begin(cls, step: int, loss: float) -> LossCourse:
        """Return the course of one loss."""
        return cls(loss, loss, step, loss, step, None if math.isfinite(loss) else step)

    def then(self, step: int, loss: float) -> LossCourse:
        """Return the course with one loss more.

        Raises:
            ValueError: The step is not later than the last one.
        """
        if step <= self.step:
            raise ValueError(f"step: {step}; need one after {self.step}")
        return self.through([loss], step)

    def through(self, losses: Sequence[float], step: int, batches: int = 1) -> LossCourse:
        """Return the course after the losses of consecutive batches, as ``then`` would for each; steps that are known already are left out.

        Args:
            losses: The losses, the last one of ``step``.
            step: Step of the last one.
            batches: Number of batches in a step.

        Cost: a fraction of a microsecond for each loss.
        """
        smallest, at, since, now, last = self.smallest, self.at, self.since, self.now, self.step
        for back in range(len(losses) - 1, -1, -1):
            loss, number = losses[-1 - back], step - back // batches
            if number <= last:
                continue
            now, last = loss, number
            finite = loss - loss == 0.0
            if loss < smallest or (finite and smallest - smallest != 0.0):
                smallest, at, since = loss, number, None
            elif not finite or (smallest > 0 and loss >= RISEN * smallest):
                since = number if since is None else since
            else:
                since = None
        return replace(self, smallest=smallest, at=at, since=since, now=now, step=last)

    @property
    def fold(self) -> float:
        """The last loss over the smallest one; ``inf``: the last one is not finite, NaN: the smallest one is not positive."""
        return _fold(self.now, self.smallest)

    @property
    def of_first(self) -> float:
        """The last loss over the first one, in the same way."""
        return _fold(self.now, self.first)


@dataclass(frozen=True)
class StabilityReading:
    """The stability ratio at one step.

    Attributes:
        step: The step.
        lower: A lower bound: the Ritz value.
        upper: An estimate of an upper end.
    """

    step: int
    lower: float
    upper: float

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.upper:
            raise ValueError(f"lower, upper: {self.lower}, {self.upper}; need 0 <= lower <= upper")


@dataclass(frozen=True)
class StabilityCourse:
    """The stability ratios of a run so far.

    Attributes:
        first: The first reading.
        recent: The last ``RECENT`` ones, the last one last.
        since: Step from which on the lower ends of all readings were above 1; None: that of the last one is not.
    """

    first: StabilityReading
    recent: tuple[StabilityReading, ...]
    since: int | None = None

    @classmethod
    def begin(cls, reading: StabilityReading) -> StabilityCourse:
        """Return the course of one reading."""
        return cls(reading, (reading,), reading.step if reading.lower > 1 else None)

    def then(self, reading: StabilityReading) -> StabilityCourse:
        """Return the course with one reading more.

        Raises:
            ValueError: Its step is not later than the last one.
        """
        if reading.step <= self.now.step:
            raise ValueError(f"reading: step {reading.step}; need one after {self.now.step}")
        since = (reading.step if self.since is None else self.since) if reading.lower > 1 else None
        return StabilityCourse(self.first, (*self.recent, reading)[-RECENT:], since)

    @property
    def now(self) -> StabilityReading:
        """The last reading."""
        return self.recent[-1]

    @property
    def trend(self) -> Literal["rising", "falling", "steady"]:
        """How the last reading lies to the one ``TREND`` readings back; intervals that overlap are steady."""
        then = self.recent[-1 - min(TREND, len(self.recent) - 1)]
        if self.now.lower > then.upper:
            return "rising"
        return "falling" if self.now.upper < then.lower else "steady"

    def before(self, loss: LossCourse) -> StabilityReading | None:
        """Return the reading with the largest lower end of those that may explain a rise of the loss.

        These are the last one before the smallest loss and all from there until the loss had risen; None: the loss has not risen, or
        there is none.
        """
        if loss.since is None:
            return None
        known = {each.step: each for each in (self.first, *self.recent)}
        until = [each for step, each in sorted(known.items()) if step <= loss.since]
        later = [each for each in until if each.step > loss.at]
        earlier = [each for each in until if each.step <= loss.at]
        return max(earlier[-1:] + later, key=lambda each: each.lower, default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the course in plain types."""
        return {"first": asdict(self.first), "recent": [asdict(each) for each in self.recent], "since": self.since}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StabilityCourse:
        """Return the course that ``state_dict`` wrote."""
        first, *recent = (StabilityReading(**each) for each in (state["first"], *state["recent"]))
        return cls(first, tuple(recent), state["since"])


def _fold(loss: float, of: float) -> float:
    if not math.isfinite(loss):
        return math.inf
    return loss / of if of > 0 else math.nan
