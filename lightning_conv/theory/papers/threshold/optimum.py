"""The global optimum of a threshold network with weight decay: a LASSO over the patterns, with a duality gap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ThresholdOptimum:
    """A solution of min 1/2 |D w - y|^2 + beta |w|_1, with a bound of its distance from the optimum."""

    weights: Tensor  # w, (p,)
    objective: float  # at w: an upper bound of the optimum
    gap: float  # objective - gap is a lower bound of the optimum

    @property
    def lower(self) -> float:
        """Lower bound of the regularised loss of every threshold network."""
        return self.objective - self.gap

    @property
    def units(self) -> int:
        """Number of nonzero weights, which is the number of units that a network needs."""
        return int((self.weights != 0).sum())


def lasso_objective(patterns: Tensor, targets: Tensor, weights: Tensor, beta: float) -> float:
    """Compute 1/2 |D w - y|^2 + beta |w|_1."""
    residual = patterns @ weights - targets
    return float(0.5 * residual @ residual + beta * weights.abs().sum())


def duality_gap(patterns: Tensor, targets: Tensor, weights: Tensor, beta: float) -> float:
    """Compute the objective at w minus a value of the dual problem, an upper bound of objective - optimum, in float64.

    The dual is max 1/2 |y|^2 - 1/2 |y - theta|^2 over |D^T theta|_inf <= beta. theta is the residual y - D w, scaled
    down until it is feasible; at the optimum this is the solution of the dual.
    """
    residual = targets - patterns @ weights
    largest = float((patterns.T @ residual).abs().max())
    theta = residual * min(1.0, beta / largest if largest > 0 else 1.0)
    dual = float(0.5 * (targets @ targets) - 0.5 * (targets - theta) @ (targets - theta))
    return max(lasso_objective(patterns, targets, weights, beta) - dual, 0.0)


def solve_threshold_network(
    patterns: Tensor, targets: Tensor, beta: float, *, tolerance: float = 1e-10
) -> ThresholdOptimum:
    """Compute the global optimum of a two-layer threshold network with weight decay by scikit-learn's Lasso.

    Args:
        patterns: D, (n, p).
        targets: y, (n,).
        beta: Strength of the weight decay (beta / 2) |theta|^2 next to 1/2 |f(X) - y|^2, without 1/n; positive.
        tolerance: Tolerance of the duality gap, relative to |y|^2.

    Raises:
        ValueError: beta is not positive, or the shapes do not match.
        ModuleNotFoundError: scikit-learn is missing.
    """
    if not beta > 0:
        raise ValueError(f"beta: {beta}; need positive weight decay, without which the optimum is any interpolation")
    if patterns.ndim != 2 or targets.shape != (patterns.shape[0],):
        raise ValueError(f"patterns, targets: {tuple(patterns.shape)}, {tuple(targets.shape)}; need (n, p) and (n,)")
    try:
        from sklearn.linear_model import Lasso
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "solve_threshold_network uses scikit-learn, which is not installed; run: pip install scikit-learn"
        ) from error
    matrix, y = patterns.detach().cpu().double(), targets.detach().cpu().double()
    # scikit-learn has 1 / (2 n) in front of the squares.
    solver = Lasso(alpha=beta / len(y), fit_intercept=False, tol=tolerance, max_iter=1_000_000)
    weights = fewest_units(matrix, torch.tensor(solver.fit(matrix.numpy(), y.numpy()).coef_, dtype=torch.float64))
    return ThresholdOptimum(weights, lasso_objective(matrix, y, weights, beta), duality_gap(matrix, y, weights, beta))


def fewest_units(patterns: Tensor, weights: Tensor) -> Tensor:
    """Find weights with the same outputs D w on linearly independent patterns, and with |w|_1 no larger (Caratheodory).

    At most n weights are nonzero. While the patterns in use are linearly dependent, D z = 0 for some z on them. Then w
    moves along z or -z, whichever does not increase |w|_1, until a weight is zero.

    Args:
        patterns: D, (n, p).
        weights: w, (p,).

    Returns:
        The new weights, (p,).
    """
    weights = weights.clone()
    while True:
        used = weights.nonzero().flatten()
        _, values, right = torch.linalg.svd(patterns[:, used])
        smallest = max(patterns.shape) * torch.finfo(values.dtype).eps
        rank = int((values > smallest * values.amax()).sum()) if len(used) else 0
        if rank == len(used):
            return weights
        z = right[-1]
        if float(z @ weights[used].sign()) > 0:
            z = -z
        # Only weights that shrink along z can become zero.
        shrinking = z * weights[used] < 0
        steps = torch.where(shrinking, -weights[used] / torch.where(shrinking, z, 1.0), math.inf)
        first = int(steps.argmin())
        weights[used] = weights[used] + float(steps[first]) * z
        weights[used[first]] = 0.0


def shattered_optimum(targets: Tensor, beta: float) -> tuple[Tensor, float]:
    r"""Compute the optimum if every pattern in {0, 1}^n occurs.

    It is min_d 1/2 |d - y|^2 + beta (|(d)_+|_inf + |(-d)_+|_inf). With all patterns, min |w|_1 over D w = d is
    max(d)_+ + max(-d)_+: the patterns {d > t} attain it, and e_max - e_min is dual feasible. The positive and the
    negative part separate. Each is clipped at the level c >= 0 with sum_i (|y_i| - c)_+ = beta (c = 0 if the sum is
    always smaller).

    Args:
        targets: y, (n,).
        beta: Strength of the weight decay, positive.

    Returns:
        (d, the objective).

    Raises:
        ValueError: beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta: {beta}; need positive weight decay")
    y = targets.detach().cpu().double()
    d, penalty = torch.zeros_like(y), 0.0
    for sign in (1.0, -1.0):
        side = (sign * y).clamp(min=0)
        level = _clip_level(side, beta)
        d += sign * side.clamp(max=level)
        penalty += beta * level
    return d, float(0.5 * (d - y).square().sum()) + penalty


def _clip_level(values: Tensor, beta: float) -> float:
    """Find the c >= 0 with sum (v_i - c)_+ = beta; 0 if there is none."""
    ordered: list[float] = values.sort(descending=True).values.tolist()
    total = 0.0
    for k, value in enumerate(ordered, 1):
        total += value
        level = (total - beta) / k
        if level >= (ordered[k] if k < len(ordered) else -math.inf):
            return max(level, 0.0)
    return 0.0
