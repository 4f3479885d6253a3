"""``Bounded``: a number with an interval that contains the true one; quotients of such numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_conv.linalg.rounding import product_up, quotient_down, quotient_up, sum_down, sum_up

SAYS_NOTHING = "the interval says nothing"


@dataclass(frozen=True)
class Bounded:
    """A number with an interval that contains the true one.

    If ``certified``, the interval is proven; otherwise it is based on an estimate. An interval that excludes nothing
    proves nothing: with a NaN end, or without an upper end and a lower end of 0 or -inf, it is never ``certified``, and
    ``reason`` says so.
    """

    value: float
    lower: float
    upper: float
    certified: bool
    method: str
    reason: str = ""
    """Why this method was used, if it was not the first choice."""

    def __post_init__(self) -> None:
        unknown = math.isnan(self.lower) or math.isnan(self.upper)
        if self.certified and (unknown or (self.upper == math.inf and self.lower in (0.0, -math.inf))):
            object.__setattr__(self, "certified", False)
            object.__setattr__(self, "reason", "; ".join(filter(None, (self.reason, SAYS_NOTHING))))

    @classmethod
    def around(
        cls, value: float, absolute: float, relative: float = 0.0, *, certified: bool, method: str, reason: str = ""
    ) -> Bounded:
        """Return the interval of all numbers within absolute + relative |value| of ``value``, rounded outwards.

        Args:
            value: the number as computed.
            absolute: bound of its error, 0 or more.
            relative: bound of its relative error, 0 or more.
            certified: see the class.
            method: see the class.
            reason: see the class.
        """
        radius = sum_up(absolute, product_up(relative, abs(value)))
        return cls(value, sum_down(value, -radius), sum_up(value, radius), certified, method, reason)

    @property
    def resolved(self) -> bool:
        """Whether the value is well above its error: each end of the interval is within a tenth of the value."""
        return self.value > 0 and max(self.value - self.lower, self.upper - self.value) <= 0.1 * self.value


def quotient(numerator: Bounded, denominator: Bounded) -> Bounded:
    """Return numerator / denominator, with an interval that contains the true quotient; its ends are rounded outwards.

    Args:
        numerator: a number of any sign.
        denominator: a number that should be positive. If its lower end is not, the quotient has no upper bound.
    """
    low, high = denominator.lower, denominator.upper
    if numerator.lower >= 0:
        lower = quotient_down(numerator.lower, high) if high > 0 else 0.0
    else:  # the quotient is then smallest at the other end of the denominator
        lower = quotient_down(numerator.lower, low) if low > 0 else -math.inf
    if numerator.upper < 0 < high:
        upper = quotient_up(numerator.upper, high)
    elif low > 0:
        upper = quotient_up(numerator.upper, low)
    else:
        upper = math.inf
    return Bounded(
        value=divide(numerator.value, denominator.value),
        lower=lower,
        upper=upper,
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
