"""``LossCourse`` and ``StabilityCourse``: what of a run's losses and stability ratios has to be remembered to judge a rise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

RISEN = 3.0
"""Factor above its smallest value from which on a loss counts as risen."""

BLOWN = 20.0
"""Loss over its start from which on the run counts as blown up."""

WINDOW = 16
"""Losses before one, all of which it has to exceed by ``RISEN`` to count as a leap."""

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
        leap: The first loss since the smallest one, and since the loss was back, that was ``RISEN`` times all of the ``WINDOW`` before
            it, over the largest of them; ``inf``: it was not finite, and none of those before it had blown up. None: there was none, so
            that a rise was gradual.
        leapt: Step of the leap.
        level: Largest loss of the window before it: at it or below the loss is back.
        last: The last losses, at most ``WINDOW``.
    """

    first: float
    smallest: float
    at: int
    now: float
    step: int
    since: int | None = None
    leap: float | None = None
    leapt: int | None = None
    level: float = 0.0
    last: tuple[float, ...] = ()

    @classmethod
    def begin(cls, step: int, loss: float) -> LossCourse:
        """Return the course of one loss."""
        return cls(loss, loss, step, loss, step, None if math.isfinite(loss) else step, last=(loss,))

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

        Raises:
            ValueError: There is less than one batch in a step.

        Cost: a fraction of a microsecond for each loss.
        """
        if batches < 1:
            raise ValueError(f"batches: {batches}; need at least 1 in a step")
        smallest, at, since, now, known = self.smallest, self.at, self.since, self.now, self.step
        leap, leapt, level, seen = self.leap, self.leapt, self.level, [*self.last]
        for back in range(len(losses) - 1, -1, -1):
            loss, number = losses[-1 - back], step - back // batches
            if number <= known:
                continue
            now, known = loss, number
            finite = loss - loss == 0.0
            if loss < smallest or (finite and smallest - smallest != 0.0):
                smallest, at, since, leap, leapt = loss, number, None, None, None
            elif not finite or (smallest > 0 and loss >= RISEN * smallest):
                since = number if since is None else since
                if leap is not None and loss <= level:
                    leap, leapt = None, None  # the loss is back
                most = max(seen[-WINDOW:], default=math.nan)
                broken = not finite and most < BLOWN * self.first  # from a loss that had not blown up
                if broken or (leap is None and loss >= RISEN * most > 0):
                    leap, leapt, level = math.inf if broken else loss / most, number, most
            else:
                since = None
            seen.append(loss)
        return LossCourse(self.first, smallest, at, now, known, since, leap, leapt, level, tuple(seen[-WINDOW:]))

    @property
    def fold(self) -> float:
        """Return the last loss over the smallest one; ``inf``: the last one is not finite, NaN: the smallest one is not positive."""
        return _fold(self.now, self.smallest)

    @property
    def of_first(self) -> float:
        """Return the last loss over the first one, in the same way."""
        return _fold(self.now, self.first)


@dataclass(frozen=True)
class StabilityReading:
    """The stability ratio at one step.

    Attributes:
        step: The step.
        lower: A lower bound: the Ritz value.
        upper: An estimate of an upper end.
        rate: Largest learning rate of the optimizer then; None: not known.
    """

    step: int
    lower: float
    upper: float
    rate: float | None = None

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
        """Return the last reading."""
        return self.recent[-1]

    @property
    def trend(self) -> Literal["rising", "falling", "steady"]:
        """Return how the last reading lies to the one ``TREND`` readings back; intervals that overlap are steady."""
        then = self.recent[-1 - min(TREND, len(self.recent) - 1)]
        if self.now.lower > then.upper:
            return "rising"
        return "falling" if self.now.upper < then.lower else "steady"

    def before(self, loss: LossCourse) -> StabilityReading | None:
        """Return the last reading before the loss had risen; None: it has not risen, or there is none.

        A reading at the step from which on it had risen is one of the weights after the rise, and does not count.
        """
        if loss.since is None:
            return None
        return next((each for each in reversed(self.readings) if each.step < loss.since), None)

    @property
    def readings(self) -> list[StabilityReading]:
        """Return all that are kept, the earliest first."""
        return [self.first, *(each for each in self.recent if each.step > self.first.step)]

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
