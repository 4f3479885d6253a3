"""Chatterjee's criterion as plain formulas, in the scale of whatever loss f is.

With f' = k f everywhere, alpha' = k alpha and steps h' = h / k: scores, radii and lengths do not depend on the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def alpha_ratio(value: float, gradient_norm: float) -> float:
    """a(x) = |grad f|^2 / f at one point; infinite where f = 0. An upper bound of alpha over every ball that holds x.

    For S = 1/2 |u - y|^2 it is twice the Rayleigh quotient of the kernel G = J J^T at r = u - y, between 2
    lambda_min(G) and 2 lambda_max(G).

    Args:
        value: f(x) >= 0.
        gradient_norm: |grad f(x)|.

    Raises:
        ValueError: a negative loss.

    Example:
        >>> alpha_ratio(2.0, 3.0)
        4.5
    """
    if value < 0:
        raise ValueError(f"value: {value}; the criterion is about losses that are never negative")
    return gradient_norm**2 / value if value > 0 else math.inf


def criterion_score(value: float, alpha: float, radius: float, *, epsilon: float = 0.0) -> float:
    """(1 - eps)^2 r^2 alpha / (4 f(x_0)): the criterion asks for more than 1 (eps = 0: gradient flow; eps > 0: descent).

    Args:
        value: f(x_0).
        alpha: infimum of |grad f|^2 / f over the ball, or a bound of it.
        radius: r.
        epsilon: share of the descent that may be lost to curvature.

    Source: Chatterjee 2203.16462, the criterion 4 f(x_0) < r^2 alpha(x_0, r).
    """
    return ((1 - epsilon) * radius) ** 2 * alpha / (4 * value) if value > 0 else math.inf


def least_radius(value: float, alpha: float, *, epsilon: float = 0.0) -> float:
    """2 sqrt(f(x_0) / alpha) / (1 - eps): the ball must be larger than this, and no descent path is longer.

    Args:
        value: f(x_0).
        alpha: as in ``criterion_score``.
        epsilon: as in ``criterion_score``.
    """
    return 2 * math.sqrt(value / alpha) / (1 - epsilon) if alpha > 0 else math.inf


def length_bound(value: float, now: float, alpha: float, *, epsilon: float = 0.0) -> float:
    r"""Longest path of a descent from f = ``value`` to f = ``now``: 2 (sqrt f_0 - sqrt f_t) / ((1 - eps) sqrt alpha).

    For any step sizes h_s along -grad f whose every step obeys f_s - f_{s+1} >= (1 - eps) h_s |grad f_s|^2 and |grad
    f_s|^2 >= alpha f_s:

    .. math:: h_s |\nabla f_s| \le \frac{f_s - f_{s+1}}{(1 - \varepsilon) |\nabla f_s|}
        \le \frac{f_s - f_{s+1}}{(1 - \varepsilon) \sqrt{\alpha f_s}}
        \le \frac{2 (\sqrt{f_s} - \sqrt{f_{s+1}})}{(1 - \varepsilon) \sqrt\alpha},

    because f_s - f_{s+1} = (sqrt f_s - sqrt f_{s+1})(sqrt f_s + sqrt f_{s+1}); the sum telescopes. [derived]

    Args:
        value: f_0.
        now: f_t.
        alpha: smallest |grad f|^2 / f on the way.
        epsilon: 1 minus the smallest descent efficiency on the way.
    """
    if not (alpha > 0 and epsilon < 1):
        return math.inf
    return 2 * (math.sqrt(value) - math.sqrt(now)) / ((1 - epsilon) * math.sqrt(alpha))


@dataclass(frozen=True)
class ScoreCeiling:
    """An upper bound of the score over all radii from 0 to the largest that was tried."""

    score: float
    radius: float  # where the ceiling is reached
    refuted_to: float  # every radius up to here fails the criterion; 0: not refuted


def score_ceiling(value: float, ratio_at_start: float, radii: Sequence[float], infima: Sequence[float]) -> ScoreCeiling:
    """An upper bound of the score at every radius, from upper bounds of alpha at a few: below 1, the criterion is refuted for all of them.

    alpha(x_0, r) falls as r grows. So for r between two radii r_k and r_{k+1} the score is at most r_{k+1}^2 alpha(r_k)
    / (4 f(x_0)), and below r_1 at most r_1^2 a(x_0) / (4 f(x_0)). Beyond the last radius the score stays below 1 up to
    2 sqrt(f(x_0) / alpha(r_K)): far, if a point of tiny ratio was found.

    Args:
        value: f(x_0).
        ratio_at_start: a(x_0).
        radii: ascending.
        infima: an upper bound of alpha(x_0, r) for each, such as the smallest ratio that was found in the ball.

    Raises:
        ValueError: other numbers of radii than of infima, or radii that do not ascend.
    """
    if len(radii) != len(infima) or not radii or any(b <= a for a, b in zip([0.0, *radii], radii, strict=False)):
        raise ValueError(
            f"radii: {len(radii)} for {len(infima)} infima; need as many, one or more, positive and ascending"
        )
    smallest, scores = ratio_at_start, []
    for radius, infimum in zip(radii, infima, strict=True):
        scores.append((criterion_score(value, smallest, radius), radius))
        smallest = min(smallest, infimum)
    score, radius = max(scores)
    refuted_to = max(radii[-1], least_radius(value, smallest)) if score < 1 else 0.0
    return ScoreCeiling(score, radius, refuted_to)
