"""Looking for small |grad f|^2 / f in a ball: an upper bound of alpha, which can refute the criterion and never prove it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_conv.losses.objective import Objective
from lightning_conv.reporting.progress import Report, equal_parts, silent
from lightning_conv.theory.papers.chatterjee.ratio import alpha_ratio
from lightning_conv.theory.tools.ball_points import ball_points


class Landscape(Protocol):
    """What a search needs of f: an ``Objective``, or another one with these."""

    start: Tensor  # x_0, (P,), float64

    @property
    def size(self) -> int:
        """P."""

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """f(x) and its gradient."""

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """Hess f(x) v; it steers the search, no result depends on it."""


@dataclass(frozen=True)
class SampledInfimum:
    """The smallest ratio found in B(x_0, r): alpha(x_0, r) is at most this."""

    ratio: float
    radius: float  # r
    distance: float  # of the point where it was found, from x_0
    point: Tensor  # that point, (P,)
    evaluations: int  # gradients and Hessian products


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
    r"""Smallest |grad f|^2 / f at random points of the ball, then by projected descent on its logarithm from the best of them.

    Random points lie in uniform directions at uniform distances (uniform points of a ball in many dimensions all lie at
    its surface). The descent follows

    .. math:: \nabla \log a = \frac{2 \nabla^2 f \, \nabla f}{|\nabla f|^2} - \frac{\nabla f}{f}

    in steps of a share of the radius, halved where a does not fall, and is projected onto the ball.

    Args:
        objective: f.
        radius: r.
        centre: x_0; None: the model's own weights. Always one of the points.
        points: random ones.
        descents: from the best points, the centre among them if it is.
        steps: of each descent.
        candidates: further points to try, such as the path of a run or known stationary points; those outside the ball
            are left out.
        seed: of the directions.
        report: told the share that is done.

    Raises:
        ValueError: a radius that is not positive.

    Cost: a gradient a point; a Hessian product and one or more gradients a step. Memory: P numbers for each of the descents.
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
    """``sampled_alpha`` in balls of growing radius, each of which is told the best point of the one before.

    Args:
        objective: f.
        radii: ascending.
        points: random ones in each ball.
        descents: in each ball.
        steps: of each descent.
        candidates: tried in every ball that holds them.
        seed: of the directions.
        report: told the share that is done.

    Raises:
        ValueError: a radius that is not positive.
    """
    tried, found = list(candidates), list[SampledInfimum]()
    for radius, own in zip(radii, equal_parts(report, len(radii)), strict=True):
        last = [] if not found else [found[-1].point]
        found.append(
            sampled_alpha(
                objective,
                radius,
                points=points,
                descents=descents,
                steps=steps,
                candidates=[*tried, *last],
                seed=seed,
                report=own,
            )
        )
    return found


def aligned_points(objective: Objective, *, centre: Tensor | None = None, shares: int = 12) -> list[Tensor]:
    r"""Candidates for ``sampled_alpha`` with a squared loss: the residual is turned into the kernel's weakest direction.

    a = k r^T G r / (r^T r / 2) depends on the direction of r = u - y alone and is smallest for the last left singular
    vector v of J. The points lie on the segment from x_0 to the end of two Gauss-Newton steps for r := v v^T r, which
    random search in P dimensions does not find.

    Args:
        objective: f, a multiple of sum (u - y)^2.
        centre: x_0; None: the model's own weights.
        shares: number of points.

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
        """A(x), kept if it is one of the smallest."""
        ratio = self._ratio(point)[0]
        self._keep(ratio, point)
        return ratio

    def descend(self, point: Tensor, ratio: float, steps: int) -> None:
        """Projected descent on log a; keeps where it ends."""
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
