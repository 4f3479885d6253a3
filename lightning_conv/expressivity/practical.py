"""The number of gradient steps that a certified rank with a tiny sigma_min leaves to take."""

from __future__ import annotations

import math

USEFUL_UP_TO = 1e6
"""Number of steps to halve the slowest direction from which on a certificate says that gradient steps do not profit from it."""


def halving_steps(sigma_max: float, sigma_min: float) -> float:
    r"""Compute the number of steps in which gradient descent on the last layer halves the error in its slowest direction.

    For the squared loss and steps of size 1 / L_H, with :math:`L_H = \frac{L_\ell}n \sigma_{\max}^2`, one step multiplies the
    part of the error along the n-th left singular vector of [h, 1] by :math:`1 - \sigma_{\min}^2 / \sigma_{\max}^2`. So it
    is halved after

    .. math:: k = \frac{\ln 2}{-\ln(1 - \sigma_{\min}^2 / \sigma_{\max}^2)}

    steps, about :math:`0.7 \, (\sigma_{\max} / \sigma_{\min})^2`.

    Args:
        sigma_max: largest singular value of [h, 1], above 0.
        sigma_min: n-th singular value of [h, 1].

    Returns:
        The number of steps; at least 1, and infinite if sigma_min is 0 or the square of the quotient vanishes.

    Example:
        >>> round(halving_steps(1000.0, 1.0))
        693147
    """
    share = (sigma_min / sigma_max) ** 2
    if share >= 0.5:
        return 1.0
    return math.log(2) / -math.log1p(-share) if share > 0 else math.inf


def impractical(sigma_max: float, sigma_min: float) -> str:
    """Return a clause that says how long gradient steps would take, if that is more than 1e6 steps; otherwise "".

    Args:
        sigma_max: largest singular value of [h, 1].
        sigma_min: n-th singular value of [h, 1].
    """
    if not sigma_max > 0 or halving_steps(sigma_max, sigma_min) <= USEFUL_UP_TO:
        return ""
    return (
        f"; of no practical use to gradient steps: at the step size 1 / L_H the slowest direction would take about "
        f'{halving_steps(sigma_max, sigma_min):.0e} steps to halve (squared loss); step_rule="solve" does not take them'
    )
