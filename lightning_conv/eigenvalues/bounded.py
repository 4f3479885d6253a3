"""``Bounded``: a number and an interval that holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounded:
    """A number with an interval that holds the true one. ``certified``: the interval has a proof; otherwise it rests on an estimate."""

    value: float
    lower: float
    upper: float
    certified: bool
    method: str
    reason: str = ""
    """Why this method, where another would have been the first choice."""

    @property
    def resolved(self) -> bool:
        """Whether the value stands well above its error: the interval is at most a tenth of the value to either side."""
        return self.value > 0 and max(self.value - self.lower, self.upper - self.value) <= 0.1 * self.value
