r"""``critical_factor``: how long an update may be before it raises the loss, by a few evaluations of the loss along it.

Source: Kalra et al. 2026 (2601.16979), section 3: the critical rate :math:`\eta_c` is the smallest one with which the next step raises the
loss, and the critical sharpness :math:`2 / \eta_c`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lightning_conv.arguments import described, require_callable, require_number

MOST, LEAST = 2.0**10, 2.0**-10
"""Factors of the update between which it is searched."""

TOLERANCE = 0.05
"""Relative width of the interval that is found."""

ROUNDING = 1e-12
"""Part of the loss up to which it does not count as raised: that of a loss in float64."""


@dataclass(frozen=True, kw_only=True)
class CriticalFactor:
    r"""The factor c from which on an update u raises the loss: :math:`L(\theta + c u) > L(\theta)`.

    Attributes:
        lower: A factor after which the loss is not raised; 0: it is after every factor that was tried.
        upper: A larger one after which it is; ``inf``: it is after none.
        evaluations: How often the loss was computed.
    """

    lower: float
    upper: float
    evaluations: int

    @property
    def found(self) -> bool:
        """Return whether both ends are known."""
        return self.lower > 0 and math.isfinite(self.upper)

    @property
    def value(self) -> float:
        """Return c, the geometric middle of the ends; NaN: it was not found."""
        return math.sqrt(self.lower * self.upper) if self.found else math.nan

    @property
    def ratio(self) -> float:
        """Return 1 / c, the length of the update over the critical one: above 1 it raises the loss. NaN: c was not found."""
        return 1 / self.value

    def rate(self, rate: float) -> float:
        """Return the critical rate c eta.

        Args:
            rate: The learning rate eta, to which the update is proportional.
        """
        return self.value * rate

    def sharpness(self, rate: float) -> float:
        """Return the critical sharpness 2 / (c eta); NaN: c was not found, or the rate is 0.

        Args:
            rate: The learning rate eta, to which the update is proportional.
        """
        return 2 / self.rate(rate) if rate else math.nan


def critical_factor(
    loss: Callable[[float], float],
    *,
    start: float = 1.0,
    least: float = LEAST,
    most: float = MOST,
    tolerance: float = TOLERANCE,
    rounding: float = ROUNDING,
) -> CriticalFactor:
    r"""Search the smallest c > 0 with :math:`L(\theta + c u) > L(\theta)` for an update u: doubling or halving, then bisection.

    For plain descent, :math:`u = -\eta g`, on a quadratic with Hessian H it is :math:`c \eta = 2 |g|^2 / g^\top H g`, so that the critical
    sharpness is the curvature along the gradient: no more than the largest one, and equal to it if g is its eigenvector. 1 / c is then no
    more than the stability ratio. With momentum u is no descent direction at times, and every length of it raises the loss.

    The loss is looked at for few factors only: where it rises and falls again between two of them, that is not seen, and c is a larger
    crossing than the smallest.

    Args:
        loss: The loss after so many times the update, L(theta + c u) as a function of c; NaN and infinity count as raised.
        start: The first factor that is tried, such as that of an earlier search.
        least: Smallest factor that is tried.
        most: Largest one.
        tolerance: ``upper / lower - 1`` at which the bisection ends.
        rounding: Part of L(theta) by which the loss must be raised.

    Raises:
        TypeError: The loss cannot be called or returns no number, or another argument is no number.
        ValueError: The loss at theta is not finite, or not 0 < least <= start <= most, or ``tolerance`` is not positive and finite, or
            ``rounding`` is negative or not finite.

    Cost: one evaluation at theta, one for each doubling from ``start``, and four for 5 %: six to nine in all if ``start`` is within a
    factor of 8, and no more than 16.
    """
    require_callable("loss", loss, "a function of how many times the update is made, such as lambda c: ...")
    for name, value in (("start", start), ("least", least), ("most", most), ("tolerance", tolerance)):
        require_number(name, value, above=0.0)
    require_number("rounding", rounding, least=0.0)
    if not least <= start <= most:
        raise ValueError(f"least, start, most: {least}, {start}, {most}; need 0 < least <= start <= most")
    at, evaluations = _number(loss(0.0)), 1
    if not math.isfinite(at):
        raise ValueError(f"loss: {at} before the update; need a finite number")

    def raises(factor: float) -> bool:
        nonlocal evaluations
        evaluations += 1
        return not _number(loss(factor)) <= at + rounding * abs(at)

    low = high = start
    if raises(start):
        while high > least:
            low = max(high / 2, least)
            if not raises(low):
                break
            high = low
        if low == high:
            return CriticalFactor(lower=0.0, upper=high, evaluations=evaluations)
    else:
        while low < most:
            high = min(low * 2, most)
            if raises(high):
                break
            low = high
        if low == high:
            return CriticalFactor(lower=low, upper=math.inf, evaluations=evaluations)
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if raises(middle) else (middle, high)
    return CriticalFactor(lower=low, upper=high, evaluations=evaluations)


def _number(loss: object) -> float:
    """Return a loss as a number; a tensor of one number is one."""
    try:
        return float(loss)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"loss: returned {described(loss)}; need a number") from error
