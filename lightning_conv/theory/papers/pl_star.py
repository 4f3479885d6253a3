"""The PL* condition of Liu, Zhu and Belkin: |grad L|^2 >= mu L on a ball, what it gives and what it shares with its neighbours.

Scale: the ratio |grad L|^2 / L is k times that of S = 1/2 |u - y|^2 for L = k S. For S it is at least 2 lambda_min(G),
G = J J^T, so a kernel with lambda_min(G) >= mu / 2 on the ball gives it. Liu, Zhu and Belkin write the condition with
1/2 |grad L|^2: their constant is half of mu here, and for S just lambda_min(G).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.theory.criterion import Criterion, at_least

SOURCE = "Liu, Zhu, Belkin 2003.00307, PL*"


@dataclass(frozen=True)
class PLStar:
    """What |grad L|^2 >= mu L and |Hess L| <= beta on a ball around x_0 give for gradient descent with steps h <= 1 / beta."""

    mu: float
    step: float  # h
    rate: float  # L_{k+1} <= (1 - rate) L_k: h mu / 2
    radius: float  # the ball has to be larger than this, and no path is longer: 4 sqrt(L_0 / mu)


def pl_star_constant(lambda_min: Bounded, scale: float = 1.0) -> Bounded:
    """The constant mu = 2 k lambda_min(G) that a smallest eigenvalue gives for L = k S, at the points where it holds.

    Args:
        lambda_min: of the full kernel, with its bounds.
        scale: k, ``LossScale.k``: 2/(n C) for ``nn.MSELoss()``.

    Raises:
        ValueError: a scale that is not positive.

    Example:
        >>> pl_star_constant(Bounded(0.5, 0.4, 0.6, True, "test")).value
        1.0
    """
    if not scale > 0:
        raise ValueError(f"scale: {scale}; need the positive factor k of L = k S")
    factor = 2 * scale
    return Bounded(
        factor * lambda_min.value,
        math.nextafter(factor * lambda_min.lower, -math.inf),
        math.nextafter(factor * lambda_min.upper, math.inf),
        lambda_min.certified, lambda_min.method, lambda_min.reason,
    )  # fmt: skip


def pl_star(value: float, mu: float, smoothness: float, *, step: float | None = None) -> PLStar:
    r"""Rate and radius that follow from PL*: :math:`L_k \le (1 - h \mu / 2)^k L_0`.

    With h <= 1 / beta every step loses at least (h / 2) |grad L|^2 >= (h mu / 2) L, and the path is no longer than 4
    sqrt(L_0 / mu): Chatterjee's criterion with eps = 1/2, for which the radius 2 sqrt(L_0 / alpha) / (1 - eps) is the
    same. In the constant of Liu, Zhu and Belkin, mu' = mu / 2, the rate is 1 - h mu'. [derived]

    Args:
        value: L(x_0).
        mu: infimum of |grad L|^2 / L on the ball.
        smoothness: beta, an upper bound of |Hess L| there.
        step: h; None: 1 / beta.

    Raises:
        ValueError: numbers that are not positive, or a step above 1 / beta.
    """
    if not (value >= 0 and mu > 0 and smoothness > 0):
        raise ValueError(
            f"value, mu, smoothness: {value}, {mu}, {smoothness}; need a loss of 0 or more and positive constants"
        )
    h = 1 / smoothness if step is None else step
    if not 0 < h <= (1 / smoothness) * (1 + 1e-12):
        raise ValueError(f"step: {h}; need a positive step up to 1 / smoothness = {1 / smoothness:.4g}")
    return PLStar(mu, h, h * mu / 2, 4 * math.sqrt(value / mu))


def judge_pl_star(value: float, mu: Bounded, radius: float, *, on_the_ball: bool = False) -> Criterion:
    """Whether a ball of this radius is large enough for its own mu: r >= 4 sqrt(L_0 / mu).

    Args:
        value: L(x_0).
        mu: infimum of |grad L|^2 / L on the ball: proven, or the smallest ratio that was found.
        radius: r.
        on_the_ball: whether ``mu`` bounds the ratio everywhere in the ball; otherwise it was found at points of it, and
            an upper bound.

    Returns:
        ``certified`` only for a certified ``mu`` that holds on the ball.
    """
    asks = "r^2 mu >= 16 L(x_0): the ball holds every path of descent with h <= 1 / beta"
    score = Bounded(
        radius**2 * mu.value / (16 * value), radius**2 * mu.lower / (16 * value) * (1 - 1e-12),
        radius**2 * mu.upper / (16 * value) * (1 + 1e-12), mu.certified, mu.method,
    )  # fmt: skip
    return at_least("pl_star_score", SOURCE, asks, score, 1.0, proves=on_the_ball)
