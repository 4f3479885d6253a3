"""``Bounded``: a number and an interval that holds it; quotients of such."""

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


def quotient(numerator: Bounded, denominator: Bounded) -> Bounded:
    """Numerator / denominator, with an interval that holds the true quotient.

    Args:
        numerator: of any sign.
        denominator: meant to be positive. Where its lower end is not, the quotient has no upper bound.
    """
    if numerator.lower >= 0:
        lower = numerator.lower / denominator.upper if denominator.upper > 0 else 0.0
    else:  # the quotient is then smallest at the other end
        lower = numerator.lower / denominator.lower if denominator.lower > 0 else float("-inf")
    return Bounded(
        value=divide(numerator.value, denominator.value),
        lower=lower,
        upper=numerator.upper / denominator.upper
        if numerator.upper < 0 < denominator.upper
        else divide(numerator.upper, denominator.lower),
        certified=numerator.certified and denominator.certified,
        method=f"quotient of intervals: {numerator.method}",
    )


def divide(numerator: float, denominator: float) -> float:
    """Numerator / denominator; by a denominator that is not positive: infinite for a positive numerator, else NaN."""
    if denominator > 0:
        return numerator / denominator
    return float("inf") if numerator > 0 else float("nan")
