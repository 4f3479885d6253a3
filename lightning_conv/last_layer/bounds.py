r"""The proven bounds of phase 2, as pure functions of numbers.

In this file L is the *mean* over samples of a loss that is convex in the outputs, W_0 is the last layer at the switch,
and t counts the steps of phase 2. The statements are those of Kawaguchi & Sun 2021, Theorem 2; the proofs are standard
(Nesterov 2004, section 2.1.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lightning_conv.checked import checked, real, whole
from lightning_conv.linalg.rounding import (
    FEW,
    gamma,
    ldexp_up,
    product_down,
    product_up,
    quotient_up,
    root_up,
    rounded_up,
    sum_down,
    sum_up,
    unit_roundoff,
)

STEPS = 2**1000
"""Numbers of steps beyond this count as infinite."""


@dataclass(frozen=True)
class Comparator:
    """A last layer with which the run is compared."""

    excess: float  # L(comparator) - L*, an upper bound; 0 for a minimiser
    distance: float  # |W_0 - comparator|_F, an upper bound


@checked(step=real(above=0), steps=whole(0))
def gradient_descent_bound(comparators: Comparator | Iterable[Comparator], step: float, steps: int) -> float:
    r"""Bound L(w_t) - L* after t steps of gradient descent; the bound is rounded up.

    .. math:: L(w_t) - L^* \le \min_{\bar w} \; L(\bar w) - L^* + \frac{|w_0 - \bar w|^2}{2 \eta t},
        \qquad 0 < \eta \le \frac1{L_H}.

    With eta = 1 / L_H and a minimiser this is :math:`L_H R^2 / (2t)`. Any matrix may be a comparator. If the infimum is not
    attained, as for cross-entropy, take one that comes close (``comparators``). If W_0 itself is a comparator, so is every
    point on the straight lines from it, where L is at most the linear interpolation. The bound then starts at L(w_0) - L*
    and falls.

    Proof: by convexity and the descent lemma
    :math:`2\eta (L(w_{k+1}) - L(\bar w)) \le |w_k - \bar w|^2 - |w_{k+1} - \bar w|^2`. Sum over k; L(w_k) does not rise. For
    steps of different sizes, each at most 1 / L_H, the sum has :math:`\sum \eta_k` in place of eta t: pass it as ``step``
    with ``steps`` = 1.

    Args:
        comparators: one comparator or several; the bound is the smallest over them.
        step: eta, at most ``HeadCurvature.step``; the bound is not valid for a larger one.
        steps: number t of steps, 0 or more.

    Raises:
        ValueError: there is no comparator, the step is not positive, or the number of steps is negative.
    """
    family = _family(comparators)
    _require(step, steps)
    stay = min((found.excess for found in family if found.distance == 0), default=math.inf)
    if steps == 0:
        return stay
    return min(_between(stay, found, _price(found, step, steps)) for found in family)


def _price(found: Comparator, step: float, steps: int) -> float:
    """Compute |w_0 - w|^2 / (2 eta t), rounded up."""
    square = Fraction(found.distance) ** 2 if math.isfinite(found.distance) else None
    return math.inf if square is None else rounded_up(square / (2 * Fraction(step) * steps))


def _between(stay: float, found: Comparator, price: float) -> float:
    """Minimise (1 - s) stay + s excess + s^2 price over s in [0, 1]."""
    saved = stay - found.excess
    if not math.isfinite(stay) or saved >= 2 * price:
        return sum_up(found.excess, price)
    if saved <= 0 or not math.isfinite(price):
        return stay
    # Exact, since subnormal numbers have few digits.
    given = Fraction(stay)
    return min(rounded_up(given - (given - Fraction(found.excess)) ** 2 / (4 * Fraction(price))), stay)


@checked(step=real(above=0), gap=real())
def gradient_descent_steps(comparators: Comparator | Iterable[Comparator], step: float, gap: float) -> float:
    """Return the number of steps after which ``gradient_descent_bound`` is at most ``gap``; infinite if it never is.

    Args:
        comparators: one comparator or several.
        step: step size eta, at most 1 / L_H.
        gap: value of L(w_t) - L* to reach.
    """
    family = _family(comparators)
    _require(step, 0)
    if min((found.excess for found in family if found.distance == 0), default=math.inf) <= gap:
        return 0
    # Enough for one comparator alone. Points between W_0 and it may need fewer, and the bound falls with the steps.
    needed = [
        Fraction(found.distance) ** 2 / (2 * Fraction(step) * (Fraction(gap) - Fraction(found.excess)))
        for found in family
        if found.excess < gap and math.isfinite(found.distance)
    ]
    if not needed or min(needed) > STEPS:
        return math.inf
    low, high = 0, max(1, math.ceil(min(needed)))
    while gradient_descent_bound(family, step, high) > gap:  # by the rounding of the bound
        high += 1 + high // 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gradient_descent_bound(family, step, middle) <= gap else (middle, high)
    return high


@checked(gap=real(), step=real(above=0), curvature_min=real(least=0), steps=whole(0))
def linear_bound(gap: float, step: float, curvature_min: float, steps: int) -> float:
    r"""Bound L(w_t) - L* after t steps of gradient descent on a *squared* loss: :math:`(1 - \eta \mu)^{2t} (L(w_0) - L^*)`.

    Here :math:`\mu = \frac{L_\ell}n \sigma_{\min}([h, 1])^2`. Each step multiplies the residual,

    .. math:: r \leftarrow (I - \eta \frac{L_\ell}n [h,1][h,1]^T) r,

    by a factor in [0, 1 - eta mu] in every direction if eta <= 1 / L_H. (Strong convexity or the Polyak-Lojasiewicz
    inequality gives only the factor 1 - eta mu per step, the square root.)

    Args:
        gap: L(w_0) - L* of the whole problem if rank [h, 1] = n, otherwise L(w_0) minus the head's own minimum.
        step: eta, at most ``HeadCurvature.step``.
        curvature_min: a lower bound of mu, from the n-th singular value of [h, 1] (for a narrow head the D-th).
        steps: number t of steps, 0 or more.

    Raises:
        ValueError: eta mu is not in [0, 1], or the step or the number of steps is not valid.
    """
    _require(step, steps)
    contraction = step * curvature_min
    if not 0 <= contraction <= 1:
        raise ValueError(f"curvature_min: eta mu = {contraction}; need 0 <= eta mu <= 1, as for eta <= 1 / L_H")
    contraction = min(product_down(step, curvature_min), 1.0)
    if steps == 0 or gap == 0 or contraction == 0:
        return gap
    if contraction == 1:
        return 0.0
    # Logarithm, product and exponential err by a few units; an error of the exponent is one of the result times it.
    shrink = math.exp(2 * steps * math.log1p(-contraction) * (2 - FEW)) * FEW
    return product_up(gap, min(sum_up(shrink, 2 * math.ulp(0.0)), 1.0))  # the result may be subnormal


def rounded_bound(bound: float, drift: float, curvature: float) -> float:
    r"""Extend a bound of gradient descent to steps with errors d_k: :math:`(\sqrt B + \sqrt{L_H / 2} \sum_k d_k)^2`.

    A step of gradient descent with eta <= 2 / L_H does not increase the distance of two points (Nesterov 2004, Theorem
    2.1.5). So the run and the exact descent from the same start are at most D = sum d_k apart. By
    :math:`|\nabla L|^2 \le 2 L_H (L - L^*)` the function :math:`\sqrt{L - L^*}` has slope at most :math:`\sqrt{L_H / 2}`.

    Args:
        bound: B, for exact steps.
        drift: an upper bound of D, the sum of :math:`|w_{k+1} - (w_k - \eta_k \nabla L(w_k))|_F`.
        curvature: an upper bound of L_H.

    Example:
        >>> rounded_bound(4.0, 0.5, 8.0)
        9.0
    """
    root = sum_up(root_up(bound), product_up(root_up(ldexp_up(curvature, -1)), drift))
    return product_up(root, root)


@checked(gradient_bound=real(least=0, finite=False))
def sgd_bound(comparators: Comparator | Iterable[Comparator], gradient_bound: float, steps: Tensor) -> float:
    r"""Bound E[min_{k < t} L(w_k)] - L* for stochastic gradients: :math:`\frac{R^2 + G^2 \sum \eta_k^2}{2 \sum \eta_k}`.

    The gradients are unbiased with :math:`E|g_k|^2 \le G^2`, and the step sizes are arbitrary. The sums and the minimum run
    over the steps k < t. The bound is one in expectation; a single run may exceed it.

    Args:
        comparators: R is |w_0 - comparator|; the comparator's excess is added.
        gradient_bound: G, such as ``step_size.gradient_bound``.
        steps: eta_0, ..., eta_{t-1}.

    Source: Nemirovski, Juditsky, Lan & Shapiro 2009, section 2.2; Kawaguchi & Sun 2021, Theorem 2.

    Raises:
        ValueError: there is no comparator, or a step is not positive.
    """
    total, squares = _sums(steps)
    family = _family(comparators)
    noise = product_up(gradient_bound, gradient_bound, squares)
    return min(_weighted(f, sum_up(product_up(f.distance, f.distance), noise), total) for f in family)


def _weighted(found: Comparator, numerator: float, total: float) -> float:
    """Compute excess + numerator / (2 total), rounded up."""
    return sum_up(found.excess, quotient_up(numerator, 2 * total))


@checked(batch_curvature=real(least=0, finite=False))
def sgd_interpolation_bound(
    comparators: Comparator | Iterable[Comparator], batch_curvature: float, steps: Tensor
) -> float:
    r"""Bound the gap of stochastic gradients under interpolation, where constant steps keep the rate O(1/t).

    Interpolation means that every sample's infimum is reached at once, as with rank [h, 1] = n. With delta the excess of the
    comparator,

    .. math:: E[\min_{k < t} L(w_k)] - L^* \le \frac{R^2 + 2 \delta \sum \eta_k}{2 \sum \eta_k (1 - \eta_k L_B)},
        \qquad \eta_k < \frac1{L_B}.

    A batch loss of curvature L_B satisfies :math:`|\nabla L_B|^2 \le 2 L_B (L_B(w) - \inf L_B)`, and the mean of the batches'
    infima is L*. So the noise of the gradient vanishes with the gap, and no bound G is needed.

    Args:
        comparators: see ``sgd_bound``.
        batch_curvature: L_B, an upper bound for every batch (``step_size.batch_curvature``).
        steps: eta_0, ..., eta_{t-1}, each below 1 / L_B.

    Source: Vaswani, Bach & Schmidt 2019, section 3 (for the last step); the statement is derived as above.

    Raises:
        ValueError: there is no comparator, or a step is not in (0, 1 / L_B).
    """
    total, _ = _sums(steps)
    family = _family(comparators)
    if not float(steps.max()) * batch_curvature < 1:
        raise ValueError(f"steps: up to {float(steps.max()):.3e}; need less than 1 / L_B = {1 / batch_curvature:.3e}")
    # Each factor 1 - eta L_B errs by 2 u, which counts where it is small.
    exact = steps.to(torch.float64)
    useful = exact * (1 - exact * batch_curvature - 4 * unit_roundoff(torch.float64)).clamp(min=0)
    # Products that are subnormal err by half a unit each.
    least = sum_down(
        product_down(float(useful.sum()), 1 - gamma(len(exact) + 4, torch.float64)), -len(exact) * math.ulp(0.0)
    )
    if not least > 0:
        return math.inf
    most = total * (1 + 2 * gamma(len(exact) + 4, torch.float64))
    return min(
        quotient_up(sum_up(product_up(f.distance, f.distance), product_up(2.0, f.excess, most)), 2 * least)
        for f in family
    )


def _family(comparators: Comparator | Iterable[Comparator]) -> list[Comparator]:
    family = [comparators] if isinstance(comparators, Comparator) else list(comparators)
    if not family:
        raise ValueError("comparators: none; pass at least one")
    return family


def _sums(steps: Tensor) -> tuple[float, float]:
    """Return the sum of the steps, rounded down, and that of their squares, rounded up."""
    if steps.ndim != 1 or len(steps) == 0 or not bool((steps > 0).all()):
        raise ValueError(f"steps: shape {tuple(steps.shape)}; need a vector of one or more positive steps")
    exact = steps.to(torch.float64)
    relative = gamma(len(exact) + 4, torch.float64)
    squares = product_up(float(exact.square().sum()), 1 + relative)
    # Squares that are subnormal err by half a unit each.
    return product_down(float(exact.sum()), 1 - relative), sum_up(squares, len(exact) * math.ulp(0.0))


def _require(step: float, steps: int) -> None:
    if not 0 < step < math.inf:
        raise ValueError(f"step: {step}; need a positive number")
    if steps < 0:
        raise ValueError(f"steps: {steps}; need 0 or more")
