"""``Bounded``: a number with an interval that contains the true one; quotients of such numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounded:
    """A number with an interval that contains the true one.

    If ``certified``, the interval is proven; otherwise it is based on an estimate.
    """

    value: float
    lower: float
    upper: float
    certified: bool
    method: str
    reason: str = ""
    """Why this method was used, if it was not the first choice."""

    @property
    def resolved(self) -> bool:
        """Whether the value is well above its error: each end of the interval is within a tenth of the value."""
        return self.value > 0 and max(self.value - self.lower, self.upper - self.value) <= 0.1 * self.value


def quotient(numerator: Bounded, denominator: Bounded) -> Bounded:
    """Return numerator / denominator, with an interval that contains the true quotient.

    Args:
        numerator: a number of any sign.
        denominator: a number that should be positive. If its lower end is not, the quotient has no upper bound.
    """
    if numerator.lower >= 0:
        lower = numerator.lower / denominator.upper if denominator.upper > 0 else 0.0
    else:  # the quotient is then smallest at the other end of the denominator
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
    """Return numerator / denominator.

    If the denominator is not positive, the result is infinity for a positive numerator and NaN otherwise.
    """
    if denominator > 0:
        return numerator / denominator
    return float("inf") if numerator > 0 else float("nan")
