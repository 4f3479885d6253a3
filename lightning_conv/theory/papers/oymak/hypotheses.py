"""The hypotheses of Theorem 2.1: the constants of the Jacobian on a ball, proven for some networks, sampled for any."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.linalg.rounding import product_down, product_up, quotient_down, quotient_up
from lightning_conv.losses.objective import Objective
from lightning_conv.theory.criterion import Criterion, Verdict, at_least, at_most
from lightning_conv.theory.tools.ball_bounds import ball_bounds
from lightning_conv.theory.tools.ball_points import ball_points
from lightning_conv.theory.tools.running_error import jacobian_sigma_min, residual_with_error
from lightning_conv.theory.tools.smooth_mlp import above, below, read_mlp

SOURCE = "Oymak, Soltanolkotabi 1812.10004, Theorem 2.1"


@dataclass(frozen=True)
class Hypotheses:
    """The constants of the theorem on the ball of radius 2 |r_0| / alpha, and what follows from them."""

    misfit: float  # |r_0|
    alpha: float  # sigma_min(J) is at least this on the ball
    beta: float  # |J|_2 is at most this
    lipschitz: float  # of J; 0 for a model that is linear in its parameters

    @property
    def radius(self) -> float:
        """2 |r_0| / alpha, the radius of the ball and a bound of the path length; the paper has twice that."""
        return quotient_up(product_up(2.0, self.misfit), self.alpha) if self.alpha > 0 else math.inf

    @property
    def step(self) -> float:
        """Largest step on S of the sharper statement: min(1 / (2 beta^2), 1 / (2 L |r_0|)), rounded down."""
        largest = max(product_up(self.beta, self.beta), product_up(self.lipschitz, self.misfit))
        return quotient_down(0.5, largest) if largest > 0 else math.inf

    @property
    def papers_step(self) -> float:
        """Largest step on S of Theorem 2.1: min(1, alpha^2 / (L |r_0|)) / (2 beta^2), rounded down.

        It is at most ``step``, because alpha <= beta.
        """
        bent, square = product_up(self.lipschitz, self.misfit), product_up(self.beta, self.beta)
        share = min(1.0, quotient_down(product_down(self.alpha, self.alpha), bent)) if bent > 0 else 1.0
        return quotient_down(share, product_up(2.0, square)) if square > 0 else math.inf

    @property
    def rate(self) -> float:
        """h alpha^2, the least share of |r|^2 that a step of size ``step`` removes, rounded down."""
        return product_down(self.step, self.alpha, self.alpha)


@dataclass(frozen=True)
class CertifiedHypotheses:
    """Hypotheses with a proof on the ball that they require, rounding included, or with the reason why the proof failed."""

    hypotheses: Hypotheses
    criterion: Criterion

    @property
    def holds(self) -> bool:
        """Whether the hypotheses are proven."""
        return self.hypotheses.alpha > 0


def certify_hypotheses(model: nn.Module, inputs: Tensor, targets: Tensor) -> CertifiedHypotheses:
    r"""Try to prove the hypotheses of the theorem for a smooth fully connected network with one output.

    With sigma_0 = sigma_min(J_0) and L a Lipschitz constant of J on a ball of radius R, Weyl's inequality gives
    sigma_min(J) >= sigma_0 - L R there. So alpha must satisfy alpha <= sigma_0 - 2 L |r_0| / alpha. The largest
    solution

    .. math:: \alpha = \tfrac12 \Bigl(\sigma_0 + \sqrt{\sigma_0^2 - 8 L |r_0|}\Bigr)

    is real if sigma_0^2 >= 8 L |r_0|. L = sqrt(n) max_i |Hess u_i| and beta come from ``ball_bounds`` on a ball of
    radius 4 |r_0| / sigma_0, the largest that can be needed. Both are computed again on the ball that alpha determines,
    as long as this ball shrinks. sigma_0 comes from ``jacobian_sigma_min``. [derived]

    Args:
        model: See ``read_mlp``; J is taken with respect to its trained parameters.
        inputs: Samples, (n, d).
        targets: y, n numbers.

    Returns:
        The hypotheses; the verdict is ``certified`` (proven, rounding included) or ``undecided`` (sigma_0 is too small
        for these bounds).

    Raises:
        ValueError: The network is of another kind, or the number of targets is not n.

    Cost: one forward and one backward pass, the smallest eigenvalue of an n x n matrix, and a few ``ball_bounds``.
    """
    mlp = read_mlp(model)
    residual, error = residual_with_error(mlp, inputs, targets)
    misfit = above(float((residual + error).norm()))
    spectrum = jacobian_sigma_min(mlp, inputs)
    sigma = spectrum.lower
    asks = "sigma_min(J_0)^2 >= 8 L |r_0|, L the Lipschitz constant of J on the ball of radius 2 |r_0| / alpha"
    if sigma == 0:
        seen = spectrum.reason or f"it is {spectrum.value:.4g}, at most {spectrum.upper:.4g}"
        reason = f"sigma_min(J_0) is not proven positive: {seen}"
        unproven = Criterion("jacobian_hypotheses", SOURCE, asks, 0.0, 1.0, "undecided", reason)
        return CertifiedHypotheses(Hypotheses(misfit, 0.0, math.inf, math.inf), unproven)
    radius = above(4 * misfit / sigma)
    found, score = None, 0.0
    for _ in range(6):
        bounds = ball_bounds(mlp, inputs, radius)
        lipschitz = above(math.sqrt(len(inputs)) * bounds.curvature)
        room = below(sigma**2) - above(8 * lipschitz * misfit)
        score = sigma**2 / (8 * lipschitz * misfit) if lipschitz * misfit > 0 else math.inf
        if not room >= 0:  # NaN if there is no bound of the curvature
            break
        alpha = below((sigma + math.sqrt(room)) / 2)
        found = Hypotheses(misfit, alpha, bounds.jacobian_norm, lipschitz)
        if not above(found.radius) < 0.99 * radius:
            break
        radius = above(found.radius)
    verdict: Verdict = "certified" if found else "undecided"
    reason = f"sigma_min(J_0) = {sigma:.4g} at least, and {score:.4g} times what 8 L |r_0| asks of its square"
    if found is None:
        found = Hypotheses(misfit, 0.0, bounds.jacobian_norm, lipschitz)
        reason += "; these bounds decide nothing"
    return CertifiedHypotheses(found, Criterion("jacobian_hypotheses", SOURCE, asks, score, 1.0, verdict, reason))


@dataclass(frozen=True)
class SampledHypotheses:
    """Extreme values at some points of a ball: upper bounds of alpha, lower bounds of beta and L."""

    sigma_min: float
    sigma_max: float
    lipschitz: float
    points: int


def sampled_hypotheses(
    objective: Objective, radius: float, *, points: int = 8, path: tuple[Tensor, ...] = (), seed: int = 0
) -> SampledHypotheses:
    """Compute singular values and slopes of J at points of the ball, which can refute a hypothesis but not prove it.

    Args:
        objective: The function whose Jacobian is J.
        radius: Radius of the ball around its start.
        points: Number of random points (``ball_points``).
        path: Further points, such as those of a run; those outside the ball are ignored.
        seed: Seed of the random points.

    Raises:
        ValueError: The radius is not positive.

    Cost: one Jacobian (N, P) per point, and its singular values.
    """
    if not radius > 0:
        raise ValueError(f"radius: {radius}; need a positive number")
    x0 = objective.start
    chosen = [x for x in path if float((x - x0).norm()) <= radius]
    chosen += ball_points(x0, radius, points, seed)
    first = before = objective.jacobian(x0)
    last, sizes, slope = x0, [torch.linalg.svdvals(first)], 0.0
    for x in chosen:
        jacobian = objective.jacobian(x)
        sizes.append(torch.linalg.svdvals(jacobian))
        for other, at in ((first, x0), (before, last)):
            distance = float((x - at).norm())
            if distance > 0:
                slope = max(slope, float(torch.linalg.matrix_norm(jacobian - other, 2)) / distance)
        before, last = jacobian, x
    full = len(first) <= first.shape[1]
    least = min(float(each[-1]) for each in sizes) if full else 0.0
    return SampledHypotheses(least, max(float(each[0]) for each in sizes), slope, len(chosen) + 1)


def judge_hypotheses(hypotheses: Hypotheses, sampled: SampledHypotheses) -> list[Criterion]:
    """Judge claimed constants by the extreme values at points of the ball.

    Args:
        hypotheses: The claimed constants.
        sampled: Result of ``sampled_hypotheses`` in the ball of radius 2 |r_0| / alpha or a smaller one.

    Returns:
        The criteria ``sigma_min_jacobian``, ``sigma_max_jacobian`` and ``jacobian_lipschitz``, in this order.
    """
    where = f"at {sampled.points} points of the ball"
    slope = f"|J(t2) - J(t1)|_2 <= L |t2 - t1|, {where}"
    return [
        at_least("sigma_min_jacobian", SOURCE, f"sigma_min(J) >= alpha, {where}", sampled.sigma_min, hypotheses.alpha),
        at_most("sigma_max_jacobian", SOURCE, f"|J|_2 <= beta, {where}", sampled.sigma_max, hypotheses.beta),
        at_most("jacobian_lipschitz", SOURCE, slope, sampled.lipschitz, hypotheses.lipschitz),
    ]
