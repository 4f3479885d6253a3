r"""Oymak and Soltanolkotabi's line between misfit and distance, its hypotheses, and where they can be proven.

Everything is in the scale of S = 1/2 |u - y|^2 = 1/2 |r|^2 (``LossScale.step_on_sum`` converts steps). J = du/dtheta
(N, P).

Theorem 2.1 of 1812.10004: let alpha <= sigma_min(J), |J|_2 <= beta and |J(t2) - J(t1)|_2 <= L |t2 - t1| on the ball of
radius 4 |r_0| / alpha around theta_0, and h <= min(1, alpha^2 / (L |r_0|)) / (2 beta^2). Then |r_k|^2 <= (1 - h alpha^2
/ 2)^k |r_0|^2, the path is at most 4 |r_0| / alpha long, and (1/4) alpha |theta_k - theta_0| + |r_k| <= |r_0|.

The constants can be halved. With J' the mean of J along a step, r_{k+1} = r - h J' J^T r and |J' - J| <= L h |J^T r| /
2, so

.. math:: |r_{k+1}|^2 \le |r|^2 - 2h \bigl(1 - \tfrac12 L h |r|\bigr) |J^T r|^2 + h^2 \beta^2 |J^T r|^2 \le |r|^2 - h
|J^T r|^2

for h <= 1 / (2 beta^2) and h <= 1 / (2 L |r_0|). With |J^T r| >= alpha |r| the square falls by a share h alpha^2 a
step, and |r_{k+1}| <= |r| - (alpha / 2) h |J^T r|, hence (1/2) alpha (path length) + |r_k| <= |r_0|: no step leaves the
ball of radius 2 |r_0| / alpha, and the constants need to hold only there. [derived]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.losses.objective import Objective
from lightning_conv.theory.criterion import Criterion, Verdict, at_least, at_most
from lightning_conv.theory.tools.ball_bounds import ball_bounds
from lightning_conv.theory.tools.descent import Descent
from lightning_conv.theory.tools.running_error import jacobian_sigma_min, outputs_with_error
from lightning_conv.theory.tools.smooth_mlp import above, below, read_mlp

SOURCE = "Oymak, Soltanolkotabi 1812.10004, Theorem 2.1"
SHARPER = f"{SOURCE}, with halved constants"
ROUNDING = 1e-9


@dataclass(frozen=True)
class Hypotheses:
    """The constants of the theorem on the ball of radius 2 |r_0| / alpha, and what follows from them."""

    misfit: float  # |r_0|
    alpha: float  # sigma_min(J) is at least this on the ball
    beta: float  # |J|_2 is at most this
    lipschitz: float  # of J; 0 for a model that is linear in its parameters

    @property
    def radius(self) -> float:
        """2 |r_0| / alpha: of the ball on which the constants must hold, and the longest path. The paper asks for twice that."""
        return 2 * self.misfit / self.alpha if self.alpha > 0 else math.inf

    @property
    def step(self) -> float:
        """Largest step on S: min(1 / (2 beta^2), 1 / (2 L |r_0|))."""
        return 1 / (2 * max(self.beta**2, self.lipschitz * self.misfit))

    @property
    def paper_step(self) -> float:
        """The paper's, smaller or equal: min(1, alpha^2 / (L |r_0|)) / (2 beta^2)."""
        move = self.lipschitz * self.misfit
        share = 1.0 if move <= self.alpha**2 else self.alpha**2 / move
        return share / (2 * self.beta**2)

    @property
    def rate(self) -> float:
        """Share of |r|^2 that a step of size ``step`` takes away at least: h alpha^2."""
        return self.step * self.alpha**2


@dataclass(frozen=True)
class CertifiedHypotheses:
    """Hypotheses that are proven on the ball they need, rounding included, or why they are not."""

    hypotheses: Hypotheses
    criterion: Criterion

    @property
    def holds(self) -> bool:
        """Whether they are proven."""
        return self.hypotheses.alpha > 0


def certify_hypotheses(model: nn.Module, inputs: Tensor, targets: Tensor) -> CertifiedHypotheses:
    r"""Prove the hypotheses of the theorem for a smooth fully-connected network with one output, where that is possible.

    With L a Lipschitz constant of J on the ball, sigma_min(J) >= sigma_min(J_0) - L R there (Weyl), so alpha must
    satisfy alpha <= sigma_0 - 2 L |r_0| / alpha. The largest solution

    .. math:: \alpha = \tfrac12 \Bigl(\sigma_0 + \sqrt{\sigma_0^2 - 8 L |r_0|}\Bigr)

    is real if sigma_0^2 >= 8 L |r_0|. L = sqrt(n) max_i |Hess u_i| and beta come from ``ball_bounds`` on a ball of
    radius 4 |r_0| / sigma_0, the largest that can be needed; both are computed again on the ball that alpha then gives,
    as long as it shrinks. sigma_0 comes from ``jacobian_sigma_min``. [derived]

    Args:
        model: see ``read_mlp``; J is over its trained parameters.
        inputs: (n, d).
        targets: y, n numbers.

    Returns:
        ``certified``: proven, rounding included. ``undecided``: sigma_0 is too small for these bounds.

    Raises:
        ValueError: a network of another kind, or other numbers of targets.

    Cost: a forward and a backward pass, the smallest eigenvalue of an n x n matrix, and a few ``ball_bounds``.
    """
    mlp = read_mlp(model)
    if targets.numel() != len(inputs):
        raise ValueError(f"targets: {targets.numel()} for {len(inputs)} samples; need one number a sample")
    spectrum = jacobian_sigma_min(mlp, inputs)
    sigma = spectrum.lower
    outputs, error = outputs_with_error(mlp, inputs)
    residual = (outputs - targets.detach().cpu().double().flatten()).abs() + error
    misfit = above(float(residual.norm()))
    asks = "sigma_min(J_0)^2 >= 8 L |r_0|, L the Lipschitz constant of J on the ball of radius 2 |r_0| / alpha"
    if sigma == 0:
        seen = spectrum.reason or f"it is {spectrum.value:.4g}, at most {spectrum.upper:.4g}"
        reason = f"sigma_min(J_0) is not proven positive: {seen}"
        return CertifiedHypotheses(
            Hypotheses(misfit, 0.0, math.inf, math.inf),
            Criterion("jacobian_hypotheses", SOURCE, asks, 0.0, 1.0, "undecided", reason),
        )
    radius = above(4 * misfit / sigma)
    found, score = None, 0.0
    for _ in range(6):
        bounds = ball_bounds(mlp, inputs, radius)
        lipschitz = above(math.sqrt(len(inputs)) * bounds.curvature)
        room = below(sigma**2) - above(8 * lipschitz * misfit)
        score = sigma**2 / (8 * lipschitz * misfit) if lipschitz * misfit > 0 else math.inf
        if not room >= 0:  # NaN where nothing bounds the curvature
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
        reason += "; these bounds leave it open"
    return CertifiedHypotheses(found, Criterion("jacobian_hypotheses", SOURCE, asks, score, 1.0, verdict, reason))


def linear_hypotheses(features: Tensor, targets: Tensor, start: Tensor) -> Hypotheses:
    """The constants for u = features @ theta: alpha and beta are the singular values of the features, L = 0, and no ball matters.

    Args:
        features: J, (N, P), rank N.
        targets: y, (N,).
        start: theta_0, (P,).
    """
    sizes = torch.linalg.svdvals(features.double())
    misfit = float((features.double() @ start.double() - targets.double()).norm())
    least = float(sizes[-1]) if len(features) <= features.shape[1] else 0.0
    return Hypotheses(misfit, least, float(sizes[0]), 0.0)


@dataclass(frozen=True)
class SampledHypotheses:
    """The extremes that were seen at points of a ball: alpha is at most, beta and L are at least this."""

    sigma_min: float
    sigma_max: float
    lipschitz: float
    points: int


def sampled_hypotheses(
    objective: Objective, radius: float, *, points: int = 8, path: tuple[Tensor, ...] = (), seed: int = 0
) -> SampledHypotheses:
    """Singular values of J and its relative changes at random points of the ball, and at given ones: these can refute a hypothesis only.

    Args:
        objective: gives J.
        radius: of the ball around its start.
        points: random ones, in uniform directions at uniform distances.
        path: further points, such as those of a run; those outside the ball are left out.
        seed: of the directions.

    Raises:
        ValueError: a radius that is not positive.

    Cost: a Jacobian (N, P) a point, and its singular values.
    """
    if not radius > 0:
        raise ValueError(f"radius: {radius}; need a positive number")
    generator = torch.Generator().manual_seed(seed)
    x0 = objective.start
    chosen = [x for x in path if float((x - x0).norm()) <= radius]
    for _ in range(points):
        direction = torch.randn(objective.size, generator=generator, dtype=torch.float64)
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        chosen.append(x0 + direction * (share * radius / direction.norm()))
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
    """Hold claimed constants against what was seen at points of the ball.

    Args:
        hypotheses: claimed.
        sampled: by ``sampled_hypotheses`` in the ball of radius 2 |r_0| / alpha or a smaller one.
    """
    where = f"at {sampled.points} points of the ball"
    return [
        at_least("sigma_min_jacobian", SOURCE, f"sigma_min(J) >= alpha, {where}", sampled.sigma_min, hypotheses.alpha),
        at_most("sigma_max_jacobian", SOURCE, f"|J|_2 <= beta, {where}", sampled.sigma_max, hypotheses.beta),
        at_most(
            "jacobian_lipschitz",
            SOURCE,
            f"|J(t2) - J(t1)|_2 <= L |t2 - t1|, {where}",
            sampled.lipschitz,
            hypotheses.lipschitz,
        ),
    ]


def misfits(path: Descent, scale: float) -> Tensor:
    """|r_t| = sqrt(2 f_t / k), (T + 1,), of a descent on f = k S."""
    return (2 * path.losses / scale).sqrt()


def judge_line(path: Descent, hypotheses: Hypotheses, *, scale: float = 1.0) -> list[Criterion]:
    """What the theorem promises, at every step of a run of plain gradient descent on f = k S.

    Args:
        path: the run.
        hypotheses: claimed or proven; alpha > 0.
        scale: k.

    Returns:
        ``oymak_step``: the largest step against the largest that is covered; a larger one makes the others
        observations. ``misfit_distance_line``: the paper's, with 1/4. ``misfit_length_line``, ``misfit_rate``: the
        sharper ones, for the path length and with the full rate.

    Raises:
        ValueError: alpha is 0.
    """
    if not hypotheses.alpha > 0:
        raise ValueError("hypotheses: alpha is 0; the theorem says nothing")
    r = misfits(path, scale)
    distance, length = (
        float((share * hypotheses.alpha * far + r)[1:].max()) / hypotheses.misfit if path.taken else 1.0
        for share, far in ((0.25, path.distances), (0.5, path.lengths))
    )
    steps = path.steps * scale
    allowed = torch.log1p(-(steps * hypotheses.alpha**2).clamp(max=1 - 1e-15)).cumsum(0)
    over = float((2 * (r[1:] / r[0]).log() - allowed).exp().max()) if path.taken else 0.0
    largest = float(steps.max()) if path.taken else 0.0
    most = 1 + ROUNDING
    return [
        at_most("oymak_step", SOURCE, "h <= min(1 / (2 beta^2), 1 / (2 L |r_0|))", largest, hypotheses.step * most),
        at_most(
            "misfit_distance_line",
            SOURCE,
            "(1/4) alpha |theta_k - theta_0| + |r_k| <= |r_0| at every step",
            distance,
            most,
        ),
        at_most(
            "misfit_length_line", SHARPER, "(1/2) alpha (path length) + |r_k| <= |r_0| at every step", length, most
        ),
        at_most("misfit_rate", SHARPER, "|r_k|^2 <= (1 - h alpha^2)^k |r_0|^2 at every step", over, most),
    ]
