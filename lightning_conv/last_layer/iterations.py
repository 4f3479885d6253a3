"""Iterative solvers for the last layer that need only passes over the features: L-BFGS and, for squared loss, CG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.linalg.rounding import unit_roundoff

HISTORY = 20
REMEMBERED = 4
STALLED = 1e-15
"""Relative decrease of the loss below which an iteration counts as no progress, because it may be rounding."""


@dataclass(frozen=True)
class Iterate:
    """One iterate of a solver."""

    w: Tensor  # (D, C)
    loss: float
    gradient: float  # |grad L|_F
    count: int  # number of passes over the features so far


class _Objective:
    """L and its gradient for torch's optimizer, with a memory of recent points, since a line search ends at a known one."""

    def __init__(self, problem: HeadProblem, w: Tensor) -> None:
        self.parameter = w.clone().requires_grad_()
        self._problem = problem
        self._seen: list[tuple[Tensor, float, Tensor]] = []
        self.count = 0

    def __call__(self) -> float:
        point = self.parameter.detach()
        for w, loss, gradient in reversed(self._seen):
            if torch.equal(w, point):
                self.parameter.grad = gradient.clone()
                return loss
        loss, gradient = self._problem.loss_and_gradient(point)
        self._seen = [*self._seen[1 - REMEMBERED :], (point.clone(), loss, gradient)]
        self.parameter.grad = gradient.clone()
        self.count += 1
        return loss


def lbfgs(problem: HeadProblem, start: Tensor) -> Iterator[Iterate]:
    """Iterate L-BFGS with a strong Wolfe line search (``torch.optim.LBFGS``, 20 pairs) until rounding stops progress.

    Args:
        problem: the problem of the head.
        start: initial last layer W_0, (D, C).

    Yields:
        W_0 and every iterate. The loss never rises.

    Cost: mostly one pass per iteration, and 40 D C numbers of memory.
    """
    objective = _Objective(problem, start)
    loss = objective()
    yield Iterate(start, loss, float(_gradient(objective).norm()), objective.count)
    optimizer = torch.optim.LBFGS(
        [objective.parameter],
        max_iter=1,
        max_eval=25,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )
    best, idle = loss, 0
    while idle < 2:
        before = objective.parameter.detach().clone()
        with torch.enable_grad():
            optimizer.step(objective)  # type: ignore[no-untyped-call]
        loss = objective()
        if not math.isfinite(loss) or loss > best:
            # The line search failed: start again from the gradient's direction, once.
            with torch.no_grad():
                objective.parameter.copy_(before)
            optimizer.state.clear()
            idle += 1
            continue
        idle = idle + 1 if best - loss <= STALLED * abs(best) else 0
        best = loss
        yield Iterate(objective.parameter.detach().clone(), loss, float(_gradient(objective).norm()), objective.count)


def _gradient(objective: _Objective) -> Tensor:
    objective()
    assert objective.parameter.grad is not None
    return objective.parameter.grad


def conjugate_gradients(problem: HeadProblem, start: Tensor) -> Iterator[Iterate]:
    r"""Iterate CGLS for squared loss, which minimises :math:`|[h,1] (W_0 + dW) - Y|_F` over dW, for all C columns at once.

    In exact arithmetic dW stays in the range of [h, 1]^T, so the limit is the minimiser closest to W_0, whatever the rank
    is. The residual comes from the recurrence.

    Args:
        problem: the problem of the head, with a squared loss.
        start: initial last layer W_0, (D, C).

    Yields:
        W_0 and every iterate, until rounding stops progress.

    Cost: two passes per iteration.

    Source: Hestenes & Stiefel 1952; Björck 1996, algorithm 7.4.1.
    """
    losses = problem.losses
    scale = 1 / (problem.samples * (losses.outputs if losses.mean else 1))
    w = start
    residual = losses.targets - problem.outputs(w)
    normal = problem.adjoint(residual)
    direction, square = normal.clone(), normal.square().sum(0)
    count, rounding = 2, unit_roundoff(torch.float64) * float(problem.row_norms.norm())
    while True:
        loss = scale * float(residual.square().sum())
        yield Iterate(w, loss, 2 * scale * float(square.sum().sqrt()), count)
        if not float(square.sum().sqrt()) > rounding * float(residual.norm()):
            return  # beyond this point the recurrence only follows its rounding errors
        image = problem.product(direction)
        size = image.square().sum(0)
        length = torch.where(size > 0, square / size, torch.zeros_like(size))
        w, residual = w + length * direction, residual - length * image
        normal = problem.adjoint(residual)
        before, square = square, normal.square().sum(0)
        direction = normal + torch.where(before > 0, square / before, torch.zeros_like(before)) * direction
        count += 2
