"""Fit an exponential and a power law in depth to a quantity, and choose by the residuals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CLEAR = 0.5
"""Largest ratio of the residuals at which the better of the two laws counts as fitting."""

FLAT = 1.5
"""Largest ratio of the largest and the smallest value at which a quantity counts as independent of depth."""


@dataclass(frozen=True)
class DepthLaw:
    """ln y = a + rate H, and ln y = a + exponent ln H, each by least squares."""

    rate: float  # per layer, of ln y
    exponential_residual: float  # root mean square, in ln y
    exponent: float
    power_residual: float
    spread: float  # largest over smallest y
    points: int

    @property
    def better(self) -> str:
        """Law that fits: "flat", "exponential", "power"; "nearer ..." if the residuals do not decide; "not told": too few depths."""
        if self.spread <= FLAT:
            return "flat"
        if not self.points > 2:
            return "not told"
        small, large = sorted((self.exponential_residual, self.power_residual))
        name = "exponential" if small == self.exponential_residual else "power"
        return name if small <= CLEAR * large else f"nearer {name}"

    def __str__(self) -> str:
        """Return both laws with their residuals."""
        if self.points < 3:
            return f"{self.points} depths, too few"
        return (
            f"{self.better} (exp({self.rate:.3g} H) misses by {self.exponential_residual:.2f} in ln, H^{self.exponent:.2f} by "
            f"{self.power_residual:.2f}, {self.points} depths)"
        )


def depth_law(depths: Sequence[int], values: Sequence[float]) -> DepthLaw:
    """Fit both laws to one quantity. With fewer than three depths nothing is fitted: the numbers are NaN, the spread is infinite.

    Args:
        depths: numbers H of layers.
        values: the quantity y at each depth, above 0.

    Example:
        >>> depth_law([2, 4, 8, 16], [3 * 1.5**h for h in (2, 4, 8, 16)]).better
        'exponential'
    """
    if len(depths) < 2:
        return DepthLaw(math.nan, math.nan, math.nan, math.nan, math.inf, len(depths))
    h, y = np.array(depths, dtype=float), np.log(np.array(values, dtype=float))
    found = []
    for x in (h, np.log(h)):
        slope, start = np.polyfit(x, y, 1)
        found += [float(slope), float(np.sqrt(np.mean((y - slope * x - start) ** 2))) if len(h) > 2 else math.nan]
    return DepthLaw(found[0], found[1], found[2], found[3], max(values) / min(values), len(depths))
