r"""``head_floor``: the least loss that a last layer can reach on features that stay as they are, with a proven lower end.

Source: Rockafellar 1970, theorem 31.1 (the dual bound); Nesterov 2004, theorem 2.1.10 (the gap of a strongly convex function).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.arguments import require_number, require_type, require_whole
from lightning_conv.last_layer.iterations import lbfgs
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.last_layer.solve import solve_head
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.rounding import gamma

ITERATIONS = 500
"""Iterations of each solver at most: what is proven from below holds wherever it ends."""

STEP = 4.0
"""Factor between two weights of the ridge until the minimiser leaves the ball."""


@dataclass(frozen=True, kw_only=True)
class HeadFloor:
    """The least loss over the weights of the last layer, in the scale of the loss: a mean, or a sum.

    Attributes:
        lower: No last layer of norm ``radius`` or less has a smaller loss on these features: proven.
        upper: The loss of one that was found among these.
        radius: Norm of weights and bias together up to which ``lower`` holds; ``inf``: it holds for all.
    """

    lower: float
    upper: float
    radius: float = math.inf


def head_floor(problem: HeadProblem, *, tol: float, radius: float, iterations: int = ITERATIONS) -> HeadFloor | None:
    r"""Bound :math:`\min_W L(W)`, :math:`L(W) = \frac1n \sum_i \ell(W^T [h_i, 1], y_i)`, from both sides; h: features of a frozen trunk.

    The problem is convex. ``solve_head`` bounds it from below over all W, by the infimum over all outputs and by duality. Where that
    leaves more than ``tol``, as for cross-entropy whose minimiser lies far away, W is kept in a ball: with
    :math:`F(W) = L(W) + \frac\mu2 |W|^2`, strongly convex, and any W

    .. math:: L(W') \ge F(W) - \frac{|\nabla F(W)|^2}{2 \mu} - \frac\mu2 R^2 \qquad \text{for all } |W'|_F \le R,

    for every mu > 0: the best one is the multiplier of the ball, with which the minimiser of F lies on its edge.

    Args:
        problem: The features, in float64, and the loss. The bound is about these numbers: a network in float32 computes others, and
            its loss may be below by what that rounding does.
        tol: Distance of the two ends that is aimed at, in the units of the mean loss.
        radius: R.
        iterations: Iterations after which each of the two ends in any case.

    Returns:
        Both ends; None: nothing is known from below.

    Raises:
        TypeError: The problem is none, or another argument is no number.
        ValueError: The radius or ``tol`` is not positive and finite, ``iterations`` is below 1; otherwise as ``solve_head``.

    Cost: at most ``iterations`` passes of 4 n D C flops, twice, and more for the line searches; the smaller Gram matrix of the features,
    its factor and its least eigenvalue.

    Example:
        >>> import torch
        >>> h, y = torch.ones(4, 1), torch.tensor([[0.0], [0.0], [2.0], [2.0]])
        >>> found = head_floor(HeadProblem(h, y, torch.nn.MSELoss(), bias=False), tol=1e-6, radius=10.0)
        >>> round(found.lower, 3), round(found.upper, 3)  # equal features: a constant is the best
        (1.0, 1.0)
    """
    require_type("problem", problem, HeadProblem, "HeadProblem(features, targets, loss_fn)")
    require_number("tol", tol, above=0.0)
    require_number("radius", radius, above=0.0)
    require_whole("iterations", iterations, least=1)
    found = solve_head(problem, tol=tol, max_iterations=iterations, progress=False)
    known = []
    if found.infimum is not None and found.infimum.certified:
        known.append(HeadFloor(lower=found.infimum.lower, upper=found.loss.upper))
    if (dual := found.head_infimum) is not None and dual.radius > radius:
        known.append(HeadFloor(lower=dual.lower, upper=found.loss.upper, radius=dual.radius))
    if all(each.upper - each.lower > tol for each in known) and problem.smoothness is not None:
        known.append(_within(problem, tol, radius, iterations))
    if not known:
        return None
    close = [each for each in known if each.upper - each.lower <= 2 * tol]
    best = (
        max(close, key=lambda each: (each.radius, each.lower))
        if close
        else min(known, key=lambda each: each.upper - each.lower)
    )
    scale = problem.samples if problem.losses.loss.summed else 1
    return HeadFloor(lower=scale * best.lower, upper=scale * max(best.upper, best.lower), radius=best.radius)


@dataclass(frozen=True)
class _Ridged:
    """F, as ``lbfgs`` takes a problem."""

    problem: HeadProblem
    mu: float

    def loss_and_gradient(self, w: Tensor) -> tuple[float, Tensor]:
        loss, gradient = self.problem.loss_and_gradient(w)
        return loss + self.mu / 2 * float(w.square().sum()), gradient + self.mu * w


def _within(problem: HeadProblem, tol: float, radius: float, iterations: int) -> HeadFloor:
    """Bound L over the ball: mu is lowered until its minimiser leaves the ball, and searched from there on."""
    w = problem.zeros()
    least = tol / radius**2  # with which mu / 2 R^2 is half of the tolerance
    mu = max(float(problem.loss_and_gradient(w)[1].norm()) / radius, least)
    inside = math.inf  # the last mu whose minimiser was in the ball
    best = HeadFloor(lower=-math.inf, upper=problem.value(w).upper, radius=radius)
    while iterations > 0:
        w, used = _minimised(problem, w, mu, tol, iterations)
        iterations -= used
        scaled = w * min(1.0, radius / max(float(w.norm()) * OUTWARD, radius))
        lower = max(best.lower, _bound(problem, w, mu, radius))
        best = HeadFloor(lower=lower, upper=min(best.upper, problem.value(scaled).upper), radius=radius)
        if best.upper - best.lower <= tol or (mu == least and float(w.norm()) <= radius):
            break
        if float(w.norm()) <= radius:
            inside, mu = mu, max(mu / STEP, least)
        else:
            mu = math.sqrt(mu * min(inside, STEP * mu))
    return best


def _minimised(problem: HeadProblem, start: Tensor, mu: float, tol: float, iterations: int) -> tuple[Tensor, int]:
    """Return a nearly smallest W of F, and how many iterations were made."""
    at, used = start, 1
    for found in lbfgs(_Ridged(problem, mu), start):  # type: ignore[arg-type]
        at, used = found.w, used + 1
        if found.gradient**2 / (2 * mu) <= tol / 8 or used >= iterations:
            break
    return at, used


def _bound(problem: HeadProblem, w: Tensor, mu: float, radius: float) -> float:
    """Return the lower bound of L over the ball at W, rounded down."""
    slope = (_slope(problem, w, mu) * OUTWARD) ** 2 / (2 * mu)
    square = float(w.square().sum()) * (1 - gamma(w.numel() + 8, torch.float64))
    value = problem.value(w).lower + mu / 2 * (square - radius**2 * OUTWARD)
    return value - slope * OUTWARD - 1e-14 * (abs(value) + mu * radius**2)


def _slope(problem: HeadProblem, w: Tensor, mu: float) -> float:
    """Return an upper bound of the norm of grad F, rounding included: that of the outputs, of the sum over samples, and of the rest."""
    size, outputs = float(w.norm()) * OUTWARD, problem.outputs(w)
    _, by_outputs = problem.losses.gradients(outputs, slice(0, problem.samples))
    norms, depth = problem.row_norms, problem.columns + problem.outputs_each
    smoothness = problem.smoothness or 0.0
    moved = gamma(problem.columns + 2, torch.float64) * norms * size
    if problem.offset is not None:
        moved = moved + gamma(1, torch.float64) * (outputs.norm(dim=1) + float(problem.offset.norm()))
    rounded = gamma(problem.samples + depth + 16, torch.float64) * (by_outputs.norm(dim=1) + smoothness)
    off = float((norms * (smoothness * moved + rounded)).sum()) / problem.samples
    gradient = problem.loss_and_gradient(w)[1] + mu * w
    return float(gradient.norm()) * OUTWARD + off + gamma(8, torch.float64) * mu * size
