"""Chatterjee's criterion as plain formulas, for a loss f of any scale.

For f' = k f the infimum is alpha' = k alpha, and steps are h' = h / k. Scores, radii and lengths do not depend on the
scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_conv.theory.criterion import Criterion

SOURCE = "Chatterjee 2203.16462"


def alpha_ratio(value: float, gradient_norm: float) -> float:
    """Compute a(x) = |grad f|^2 / f at one point; infinite where f = 0.

    It is an upper bound of alpha for every ball that contains x. For S = 1/2 |u - y|^2 it is twice the Rayleigh
    quotient of the kernel G = J J^T at r = u - y, and lies between 2 lambda_min(G) and 2 lambda_max(G).

    Args:
        value: Loss f(x), 0 or more.
        gradient_norm: Norm of the gradient, |grad f(x)|.

    Raises:
        ValueError: The loss is negative.

    Example:
        >>> alpha_ratio(2.0, 3.0)
        4.5
    """
    if value < 0:
        raise ValueError(f"value: {value}; the criterion is about losses that are never negative")
    return gradient_norm**2 / value if value > 0 else math.inf


def criterion_score(value: float, alpha: float, radius: float, *, epsilon: float = 0.0) -> float:
    """Compute (1 - eps)^2 r^2 alpha / (4 f(x_0)), which the criterion asks to be above 1.

    Args:
        value: Initial loss f(x_0).
        alpha: Infimum of |grad f|^2 / f over the ball, or a bound of it.
        radius: Radius r of the ball, in weight space.
        epsilon: Share eps of the first-order decrease h |grad f|^2 that a step may lose to curvature: 0 for gradient flow,
            positive for gradient descent.

    Source: Chatterjee 2203.16462, the criterion 4 f(x_0) < r^2 alpha(x_0, r).
    """
    return ((1 - epsilon) * radius) ** 2 * alpha / (4 * value) if value > 0 else math.inf


def least_radius(value: float, alpha: float, *, epsilon: float = 0.0) -> float:
    """Compute 2 sqrt(f(x_0) / alpha) / (1 - eps): the radius must be larger than this, and no descent path is longer.

    Args:
        value: Initial loss f(x_0).
        alpha: See ``criterion_score``.
        epsilon: See ``criterion_score``.
    """
    return 2 * math.sqrt(value / alpha) / (1 - epsilon) if alpha > 0 else math.inf


def length_bound(value: float, now: float, alpha: float, *, epsilon: float = 0.0) -> float:
    r"""Bound the length of a descent path from f_0 = ``value`` to f_t = ``now``.

    The bound is 2 (sqrt f_0 - sqrt f_t) / ((1 - eps) sqrt alpha). The step sizes h_s along -grad f are arbitrary, as
    long as f_s - f_{s+1} >= (1 - eps) h_s |grad f_s|^2 and |grad f_s|^2 >= alpha f_s at every step:

    .. math:: h_s |\nabla f_s| \le \frac{f_s - f_{s+1}}{(1 - \varepsilon) |\nabla f_s|}
        \le \frac{f_s - f_{s+1}}{(1 - \varepsilon) \sqrt{\alpha f_s}}
        \le \frac{2 (\sqrt{f_s} - \sqrt{f_{s+1}})}{(1 - \varepsilon) \sqrt\alpha},

    because f_s - f_{s+1} = (sqrt f_s - sqrt f_{s+1})(sqrt f_s + sqrt f_{s+1}); the sum telescopes. [derived]

    Args:
        value: Loss f_0 at the beginning of the path.
        now: Loss f_t at its end.
        alpha: Smallest |grad f|^2 / f on the path.
        epsilon: 1 minus the smallest descent efficiency on the path.
    """
    if not (alpha > 0 and epsilon < 1):
        return math.inf
    return 2 * (math.sqrt(value) - math.sqrt(now)) / ((1 - epsilon) * math.sqrt(alpha))


@dataclass(frozen=True)
class ScoreCeiling:
    """Upper bound of the score at every radius that follows from the ratios at a few points."""

    score: float  # the largest possible score at a radius up to the farthest point, or up to the requested radius
    radius: float  # where it is attained
    refuted_to: float  # every radius up to here violates the criterion

    @property
    def refuted(self) -> bool:
        """Whether the criterion is false at every requested radius."""
        return self.score <= 1


def score_ceiling(value: float, points: Iterable[tuple[float, float]], *, radius: float | None = None) -> ScoreCeiling:
    """Bound the score at every radius by the ratios at points around x_0; a bound of at most 1 refutes the criterion.

    alpha(x_0, r) is at most the ratio of every point within r, so it decreases as r grows. Between two points at
    distances d_k and d_{k+1} the score is therefore below d_{k+1}^2 min(a_0, ..., a_k) / (4 f(x_0)). With a the least
    ratio, the criterion is false at all radii up to 2 sqrt(f(x_0) / a), unless a gap between the points leaves a radius
    undecided.

    Args:
        value: Initial loss f(x_0).
        points: Pairs (distance from x_0, |grad f|^2 / f) of x_0 itself, at distance 0, and of other points.
        radius: Largest radius in question; points farther away are ignored. None: the distance of the farthest point.

    Raises:
        ValueError: There is no point at distance 0, or the radius is not positive.
    """
    if radius is not None and not radius > 0:
        raise ValueError(f"radius: {radius}; need a positive number")
    known = sorted((distance, ratio) for distance, ratio in points if radius is None or distance <= radius)
    if not known or known[0][0] != 0:
        raise ValueError(f"points: {len(known)} of them, the nearest not x_0 itself; need (0, a(x_0)) among them")
    farthest = known[-1][0] if radius is None else radius
    ends = [*(distance for distance, _ in known[1:]), farthest]
    smallest, best, refuted_to, open_from = math.inf, (0.0, farthest), 0.0, False
    for (_, ratio), end in zip(known, ends, strict=True):
        smallest = min(smallest, ratio)
        best = max(best, (criterion_score(value, smallest, end), end))
        if not open_from:
            reach = least_radius(value, smallest)
            refuted_to, open_from = max(refuted_to, reach), reach < end
    return ScoreCeiling(*best, refuted_to)


def judge_ball(
    value: float, points: Iterable[tuple[float, float]], *, radius: float | None = None, source: str = SOURCE
) -> Criterion:
    """Judge the criterion by the ratios found at points around x_0, which can refute it but never support it.

    The criterion requires *some* r, and a bounded search leaves larger radii undecided. The verdict ``refuted``
    therefore needs a largest radius in question.

    Args:
        value: Initial loss f(x_0).
        points: See ``score_ceiling``.
        radius: Largest radius r in question; None: all radii.
        source: Source of the criterion.

    Returns:
        ``criterion_in_the_ball``, with the largest score that remains possible, against 1.
    """
    ceiling = score_ceiling(value, points, radius=radius)
    limit = "" if radius is None else f" <= {radius:.4g}"
    asks = f"4 f(x_0) < r^2 alpha(x_0, r) for some r{limit}, alpha the infimum of |grad f|^2 / f over the ball"
    reach = f"it fails for every r up to {ceiling.refuted_to:.4g}, by the smallest |grad f|^2 / f found"
    if radius is None:
        reason = f"{reach}; larger ones are open"
        return Criterion("criterion_in_the_ball", source, asks, ceiling.score, 1.0, "undecided", reason)
    if ceiling.refuted:
        return Criterion("criterion_in_the_ball", source, asks, ceiling.score, 1.0, "refuted", reach)
    reason = f"a score of up to {ceiling.score:.4g} is left possible at r = {ceiling.radius:.4g}, which proves nothing; {reach}"
    return Criterion("criterion_in_the_ball", source, asks, ceiling.score, 1.0, "undecided", reason)
