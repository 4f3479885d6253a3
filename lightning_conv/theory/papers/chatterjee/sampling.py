"""Search for a small |grad f|^2 / f in a ball: an upper bound of alpha, which can refute the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_conv.losses.objective import Objective
from lightning_conv.reporting.progress import Report, equal_parts, silent
from lightning_conv.theory.papers.chatterjee.ratio import alpha_ratio
from lightning_conv.theory.tools.ball_points import ball_points


class Landscape(Protocol):
    """Interface of f that a search uses; ``Objective`` provides it."""

    start: Tensor  # x_0, (P,), float64

    @property
    def size(self) -> int:
        """Number P of weights."""

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Return f(x) and its gradient."""

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """Return Hess f(x) v. It only steers the search: every reported ratio comes from values and gradients."""


@dataclass(frozen=True)
class SampledInfimum:
    """The smallest ratio found in B(x_0, r): alpha(x_0, r) is at most this."""

    ratio: float
    radius: float  # r
    distance: float  # between x_0 and the point where it was found
    point: Tensor  # that point, (P,)
    evaluations: int  # number of gradients and Hessian products


def sampled_alpha(
    objective: Landscape,
    radius: float,
    *,
    centre: Tensor | None = None,
    points: int = 32,
    descents: int = 2,
    steps: int = 30,
    candidates: Sequence[Tensor] = (),
    seed: int = 0,
    report: Report = silent,
) -> SampledInfimum:
    r"""Search for the smallest a = |grad f|^2 / f in a ball.

    The search evaluates random points and then runs a projected descent on log a from the best ones. The random points
    are those of ``ball_points``. The descent follows

    .. math:: \nabla \log a = \frac{2 \nabla^2 f \, \nabla f}{|\nabla f|^2} - \frac{\nabla f}{f}

    in steps of a fraction of the radius, which is halved where a does not decrease, and is projected onto the ball.

    Args:
        objective: The loss f as a function of the flat weights.
        radius: Radius r of the ball, in weight space.
        centre: x_0; None: the model's own weights. The centre is always one of the points.
        points: Number of random points.
        descents: Number of descents, from the best points.
        steps: Largest number of steps of each descent.
        candidates: Further points to try, such as the path of a run or known stationary points; those outside the ball
            are ignored.
        seed: Seed of the random points.
        report: Called with the share of the work that is done.

    Raises:
        ValueError: The radius is not positive.

    Cost: one gradient per point; one Hessian product and one or more gradients per step. Memory: P numbers for each
    descent.
    """
    if not radius > 0:
        raise ValueError(f"radius: {radius}; need a positive number")
    search = _Search(
        objective, objective.start if centre is None else centre.detach().double(), radius, max(descents, 1)
    )
    search.look(search.centre)
    for candidate in candidates:
        if float((candidate - search.centre).norm()) <= radius:
            search.look(candidate.detach().double())
    work = points + descents * steps
    for k, point in enumerate(ball_points(search.centre, radius, points, seed)):
        search.look(point)
        report((k + 1) / work)
    for k, (ratio, start) in enumerate(search.best[:descents]):
        search.descend(start, ratio, steps)
        report((points + (k + 1) * steps) / work)
    ratio, point = search.best[0]
    return SampledInfimum(ratio, radius, float((point - search.centre).norm()), point, search.evaluations)


def sampled_infima(
    objective: Landscape,
    radii: Sequence[float],
    *,
    points: int = 8,
    descents: int = 1,
    steps: int = 20,
    candidates: Sequence[Tensor] = (),
    seed: int = 0,
    report: Report = silent,
) -> list[SampledInfimum]:
    """Run ``sampled_alpha`` in balls of growing radius, each of which starts with the best point of the one before.

    Args:
        objective: The loss f as a function of the flat weights.
        radii: Radii in ascending order.
        points: Number of random points in each ball.
        descents: Number of descents in each ball.
        steps: Largest number of steps of each descent.
        candidates: Further points, tried in every ball that contains them.
        seed: Seed of the random points.
        report: Called with the share of the work that is done.

    Returns:
        One result per radius, in the order of ``radii``.

    Raises:
        ValueError: A radius is not positive.
    """
    tried, found = list(candidates), list[SampledInfimum]()
    for radius, own in zip(radii, equal_parts(report, len(radii)), strict=True):
        known = [*tried, *(each.point for each in found[-1:])]
        search = partial(sampled_alpha, points=points, descents=descents, steps=steps, candidates=known)
        found.append(search(objective, radius, seed=seed, report=own))
    return found


def aligned_points(objective: Objective, *, centre: Tensor | None = None, shares: int = 12) -> list[Tensor]:
    r"""Compute candidates for ``sampled_alpha``: points whose residual lies in the kernel's weakest direction.

    a = k r^T G r / (r^T r / 2) depends only on the direction of r = u - y and is smallest for the last left singular
    vector v of J. The candidates lie on the segment from x_0 to the end of two Gauss-Newton steps towards the residual
    v v^T r. A random search in P dimensions does not find such points.

    Args:
        objective: f, a multiple of sum (u - y)^2.
        centre: x_0; None: the model's own weights.
        shares: Number of points.

    Returns:
        ``shares`` points, each (P,), from near x_0 to the end of the segment.

    Cost: two Jacobians (N, P) and their singular value decompositions.
    """
    x0 = objective.start if centre is None else centre.detach().double()
    x = x0
    for _ in range(2):
        left, sizes, right = torch.linalg.svd(objective.jacobian(x), full_matrices=False)
        with torch.no_grad():
            coordinates = left.T @ objective.residual(x)
        coordinates[-1] = 0  # the weakest direction stays
        x = x - right.T @ torch.where(sizes > 1e-12 * sizes[0], coordinates / sizes, 0.0)
    return [x0 + (k + 1) / shares * (x - x0) for k in range(shares)]


class _Search:
    def __init__(self, objective: Landscape, centre: Tensor, radius: float, kept: int) -> None:
        self.objective, self.centre, self.radius, self._kept = objective, centre, radius, kept
        self.best: list[tuple[float, Tensor]] = []
        self.evaluations = 0

    def look(self, point: Tensor) -> float:
        """Compute a(x), and keep the point if its ratio is one of the smallest."""
        ratio = self._ratio(point)[0]
        self._keep(ratio, point)
        return ratio

    def descend(self, point: Tensor, ratio: float, steps: int) -> None:
        """Run a projected descent on log a, and keep the point where it ends."""
        size = self.radius / 4
        for _ in range(steps):
            _, value, gradient = self._ratio(point)
            square = float(gradient.square().sum())
            if value == 0 or square == 0:
                break
            self.evaluations += 1
            slope = 2 * self.objective.hessian_product(point, gradient) / square - gradient / value
            norm = float(slope.norm())
            if not norm > 0:
                break
            while size > 1e-6 * self.radius:
                trial = self._projected(point - size / norm * slope)
                found = self._ratio(trial)[0]
                if found < ratio:
                    point, ratio, size = trial, found, min(1.5 * size, self.radius)
                    break
                size /= 2
            else:
                break
        self._keep(ratio, point)

    def _keep(self, ratio: float, point: Tensor) -> None:
        self.best = sorted([*self.best, (ratio, point)], key=lambda entry: entry[0])[: self._kept]

    def _ratio(self, point: Tensor) -> tuple[float, float, Tensor]:
        value, gradient = self.objective.value_and_gradient(point)
        self.evaluations += 1
        return alpha_ratio(value, float(gradient.norm())), value, gradient

    def _projected(self, point: Tensor) -> Tensor:
        away = point - self.centre
        # A little inside, so that rounding does not carry the point out of the ball.
        return self.centre + away * min(1.0, self.radius * (1 - 1e-12) / max(float(away.norm()), 1e-300))
