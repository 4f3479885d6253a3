"""The global optimum of a threshold network with weight decay: a LASSO over the patterns, and how far a solution is from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ThresholdOptimum:
    """The optimum of 1/2 |D w - y|^2 + beta |w|_1, and how far from it the solution can be."""

    weights: Tensor  # w, (p,)
    objective: float  # at w: an upper bound of the optimum
    gap: float  # objective - gap is a lower bound of the optimum

    @property
    def lower(self) -> float:
        """What no threshold network's regularised loss is below."""
        return self.objective - self.gap

    @property
    def units(self) -> int:
        """Nonzero weights: the units that a network needs."""
        return int((self.weights != 0).sum())


def lasso_objective(patterns: Tensor, targets: Tensor, weights: Tensor, beta: float) -> float:
    """1/2 |D w - y|^2 + beta |w|_1."""
    residual = patterns @ weights - targets
    return float(0.5 * residual @ residual + beta * weights.abs().sum())


def duality_gap(patterns: Tensor, targets: Tensor, weights: Tensor, beta: float) -> float:
    """The objective at w minus a value of the dual, hence at least objective - optimum; in float64.

    The dual is max 1/2 |y|^2 - 1/2 |y - theta|^2 over |D^T theta|_inf <= beta; theta is the residual y - D w, shrunk until it
    is feasible, which is the solution's own dual at the optimum.
    """
    residual = targets - patterns @ weights
    largest = float((patterns.T @ residual).abs().max())
    theta = residual * min(1.0, beta / largest if largest > 0 else 1.0)
    dual = float(0.5 * (targets @ targets) - 0.5 * (targets - theta) @ (targets - theta))
    return max(lasso_objective(patterns, targets, weights, beta) - dual, 0.0)


def solve_threshold_network(
    patterns: Tensor, targets: Tensor, beta: float, *, tolerance: float = 1e-10
) -> ThresholdOptimum:
    """The global optimum of the weight-decay problem of a two-layer threshold network, by scikit-learn's Lasso.

    Args:
        patterns: D, (n, p).
        targets: y, (n,).
        beta: of weight decay (beta / 2) |theta|^2 against 1/2 |f(X) - y|^2, without 1/n; above 0.
        tolerance: of the duality gap, over |y|^2.

    Raises:
        ValueError: beta is not positive, or the shapes do not fit.
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
            'solve_threshold_network uses scikit-learn, which is not installed; run: pip install "lightning-conv[recipes]"'
        ) from error
    matrix, y = patterns.detach().cpu().double(), targets.detach().cpu().double()
    # scikit-learn has 1 / (2 n) in front of the squares.
    solver = Lasso(alpha=beta / len(y), fit_intercept=False, tol=tolerance, max_iter=1_000_000)
    weights = fewest_units(matrix, torch.tensor(solver.fit(matrix.numpy(), y.numpy()).coef_, dtype=torch.float64))
    return ThresholdOptimum(weights, lasso_objective(matrix, y, weights, beta), duality_gap(matrix, y, weights, beta))


def fewest_units(patterns: Tensor, weights: Tensor) -> Tensor:
    """The same outputs D w from linearly independent patterns, hence at most n, with |w|_1 no larger (Caratheodory).

    While the patterns in use are dependent, D z = 0 for some z on them; w moves along z, or along -z, whichever does not raise |w|_1,
    until a weight is zero.

    Args:
        patterns: D, (n, p).
        weights: w, (p,).
    """
    weights = weights.clone()
    while True:
        used = weights.nonzero().flatten()
        _, values, right = torch.linalg.svd(patterns[:, used])
        rank = (
            int((values > max(patterns.shape) * torch.finfo(values.dtype).eps * values.amax()).sum())
            if len(used)
            else 0
        )
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
    r"""The optimum where every pattern in {0, 1}^n is reachable: min_d 1/2 |d - y|^2 + beta (|(d)_+|_inf + |(-d)_+|_inf).

    With all patterns, min |w|_1 over D w = d is max(d)_+ + max(-d)_+: layers {d > t} reach it, and e_max - e_min is dual feasible.
    The two signs separate, and each is clipped at the level c >= 0 with sum_i (|y_i| - c)_+ = beta (0 if the sum never gets there).

    Args:
        targets: y, (n,).
        beta: above 0.

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
    """The c >= 0 with sum (v_i - c)_+ = beta, or 0."""
    ordered: list[float] = values.sort(descending=True).values.tolist()
    total = 0.0
    for k, value in enumerate(ordered, 1):
        total += value
        level = (total - beta) / k
        if level >= (ordered[k] if k < len(ordered) else -math.inf):
            return max(level, 0.0)
    return 0.0
