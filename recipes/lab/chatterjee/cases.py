"""Starts of a tanh network: the smallest ratios |grad f|^2 / f in balls around each, and gradient descent from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_conv.losses.objective import Objective
from lightning_conv.recipes.lab.data import TwoClasses
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.papers.chatterjee import (
    DescentCertificate,
    ScoreCeiling,
    aligned_points,
    alpha_ratio,
    certify_descent,
    positive_init_,
    sampled_infima,
    score_ceiling,
)
from lightning_conv.theory.tools.descent import Descent, gradient_descent

SECONDS_A_STEP = 3e-4
"""Rough duration of one step in seconds; it only decides whether a progress bar is shown."""


@dataclass(frozen=True)
class Case:
    """One start: the bounds of alpha, the infimum of |grad f|^2 / f, in the balls around it, and the descent from it."""

    name: str
    objective: Objective
    path: Descent
    step: float
    radii: list[float]
    infima: list[float]  # smallest ratio found in each ball, an upper bound of alpha
    proven: list[float]  # lower bound of alpha in each ball
    scores: list[float]  # lower bound of r^2 alpha / (4 f_0) in each ball
    ceiling: ScoreCeiling
    certificate: DescentCertificate | None  # of the step of the path; None: that step is not certified


@dataclass(frozen=True)
class Laboratory:
    """Data and settings that all cases share: number of balls, largest number of steps, final loss and seed."""

    data: TwoClasses
    count: int
    max_steps: int
    until: float
    seed: int

    def case(self, name: str, model: nn.Module, step: float, certified: DescentCertificate | None = None) -> Case:
        """Bound alpha in the balls around a start, and run gradient descent from it."""
        objective = Objective(model, self.data.inputs, self.data.targets, nn.MSELoss())
        value, gradient = objective.value_and_gradient(objective.start)
        still = _stationary(objective, self.data.targets)
        farthest = float((still - objective.start).norm()) * 1.2
        radii = torch.logspace(-4, 0, self.count, dtype=torch.float64).mul(farthest).tolist()
        found = sampled_infima(objective, radii, candidates=[still, *aligned_points(objective)], seed=self.seed)
        certificates = [certify_descent(model, self.data.inputs, self.data.targets, radius=radius) for radius in radii]
        points = [(0.0, alpha_ratio(value, float(gradient.norm()))), *((each.distance, each.ratio) for each in found)]
        ceiling, infima = score_ceiling(value, points), [each.ratio for each in found]
        path = self._path(name, objective, step)
        proven = [each.alpha.lower for each in certificates]
        scores = [each.flow.measured for each in certificates]
        return Case(name, objective, path, step, radii, infima, proven, scores, ceiling, certified)

    def descend(self, name: str, start: Case, step: float) -> Case:
        """Run gradient descent with another, uncertified step from the start of ``start``, and reuse its bounds of alpha."""
        path = self._path(name, start.objective, step)
        return replace(start, name=name, path=path, step=step, certificate=None)

    def _path(self, name: str, objective: Objective, step: float) -> Descent:
        with progress_bar(name, SECONDS_A_STEP * self.max_steps, None) as report:
            return gradient_descent(objective, step, steps=self.max_steps, until=self.until, report=report)


def tanh_network(inputs: int, width: int, depth: int, seed: int) -> nn.Sequential:
    """Return ``depth`` linear layers with tanh between them, in float64, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for wide, narrow in pairwise([inputs, *[width] * (depth - 1), 1]):
            modules += [nn.Linear(wide, narrow), nn.Tanh()]
        return nn.Sequential(*modules[:-1]).double()


def positive_twin(model: nn.Sequential, weight: float, seed: int) -> nn.Sequential:
    """Return a network of the same architecture with the positive initialisation."""
    shapes = [module for module in model if isinstance(module, nn.Linear)]
    twin = tanh_network(shapes[0].in_features, shapes[0].out_features, len(shapes), seed)
    positive_init_(twin, A=weight, seed=seed)
    return twin


def _stationary(objective: Objective, targets: Tensor) -> Tensor:
    """Return the point with all weights zero and the mean target as output bias, where the gradient vanishes."""
    point = torch.zeros_like(objective.start)
    point[-1] = targets.mean()
    return point


def largest_curvature(objective: Objective, steps: int = 100) -> float:
    """Estimate |Hess f|_2 at the start from below, by power iteration."""
    v = torch.ones(objective.size, dtype=torch.float64) / objective.size**0.5
    size = 0.0
    for _ in range(steps):
        product = objective.hessian_product(objective.start, v)
        size = float(product.norm())
        v = product / size
    return size
