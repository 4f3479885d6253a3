"""``power_law``: the exponent of the dependence of one measured quantity on another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """y = c x^p fitted to logarithms."""

    exponent: float  # p
    error: float  # standard error of p; NaN for two points
    factor: float  # c
    points: int


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit ln y against ln x by least squares; points with a zero are left out.

    Raises:
        ValueError: There are fewer than two positive points, or all have the same x.

    Example:
        >>> round(power_law([1, 4, 16], [3, 6, 12]).exponent, 12)
        0.5
    """
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    if len({a for a, _ in pairs}) < 2:
        raise ValueError(f"x, y: {len(pairs)} positive points; need two or more, at different x")
    u, v = np.array(pairs).T
    centred = u - u.mean()
    slope = float(centred @ v / (centred @ centred))
    rest = v - v.mean() - slope * centred
    error = math.sqrt(float(rest @ rest) / (len(u) - 2) / float(centred @ centred)) if len(u) > 2 else math.nan
    return PowerLaw(slope, error, math.exp(float(v.mean() - slope * u.mean())), len(u))
