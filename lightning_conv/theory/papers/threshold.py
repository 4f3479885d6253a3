r"""Threshold networks trained to the global optimum by a convex program (Ergen, Gulluk, Lacotte & Pilanci, ICLR 2023, 2303.03382).

A two-layer network f(x) = sum_j s_j w_j 1{<v_j, x> >= 0} with trainable amplitudes s_j has the weight-decay problem

.. math:: \inf \tfrac12 |f(X) - y|^2 + \tfrac\beta2 \sum_j (|v_j|^2 + s_j^2 + w_j^2).

The units only depend on the direction of v_j, so its norm may shrink to nothing (the infimum is approached, not attained), and
(s^2 + w^2) / 2 >= |s w| with equality for balanced amplitudes. What is left is the LASSO over the distinct patterns of the samples,

.. math:: \min_w \tfrac12 |D w - y|^2 + \beta |w|_1, \qquad D_{\cdot j} = 1\{X v_j \ge 0\} \in \{0, 1\}^n,

for networks with as many units as the solution has nonzeros, at most n. (No 1/n in front of the loss.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SOURCE = "Ergen et al. 2023 (2303.03382)"

MOST_PROGRAMS = 20_000
"""Linear programs that an enumeration may take: a millisecond or two each."""


@dataclass(frozen=True)
class Arrangement:
    """The patterns 1{X v >= 0} over all directions v, as columns."""

    patterns: Tensor  # D, (n, p), 0 and 1, distinct columns
    directions: Tensor  # (d, p), one v for each column
    general_position: bool  # any min(n, rank) rows of X are linearly independent, decided in exact arithmetic
    complete: bool  # proven to be all of them; otherwise that rests on the solver's word for what is infeasible

    @property
    def count(self) -> int:
        """p."""
        return self.patterns.shape[1]


def cell_count(n: int, rank: int) -> int:
    """2 sum_{k < r} C(n - 1, k): the sign patterns without zeros of n rows of rank r in general position (Cover 1965).

    For rows that are not in general position it is an upper bound of these.

    Example:
        >>> cell_count(4, 2), cell_count(5, 3), cell_count(3, 3)
        (8, 22, 8)
    """
    return 2 * sum(comb(n - 1, k) for k in range(rank))


def arrangement_patterns(inputs: Tensor) -> Arrangement:
    """All patterns 1{X v >= 0}, by a tree over the samples: a linear program decides whether a branch can be extended.

    A branch asks <x_i, v> >= 1 where the pattern is 1 and <= -1 where it is 0. Where only v with <x_i, v> = 0 would do (v = 0
    if no half-space holds all samples, and rows that are not in general position), the boundary is allowed. The directions that
    are found are verified in rational arithmetic, so every pattern listed is one. In general position the list is complete
    if it has `cell_count` patterns besides the pattern of v = 0, which is all ones.

    Args:
        inputs: X, (n, d); add a column of ones for a bias.

    Raises:
        ValueError: no matrix, or so many patterns that enumeration is out of reach; says how many.
        ModuleNotFoundError: scipy is missing.

    Cost: about 2 n programs a pattern of the end, of the order of n^r / r! patterns for rank r.
    """
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(f"inputs: shape {tuple(inputs.shape)}; need a matrix, one row a sample")
    rows: NDArray[np.float64] = inputs.detach().cpu().double().numpy()
    n, rank = len(rows), int(np.linalg.matrix_rank(rows))
    programs = sum(cell_count(i, min(rank, i)) for i in range(1, n + 1))
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"inputs: {n} samples of rank {rank} have up to {cell_count(n, rank):,} patterns, about {programs:,} linear programs; take "
            "fewer samples or fewer features"
        )
    found = [_Branch(np.zeros(rows.shape[1]), [], strict=True)]
    for i in range(1, n + 1):
        found = [longer for branch in found for bit in (1, 0) if (longer := branch.extended(rows[:i], bit)) is not None]
    exact = [[Fraction(value) for value in row] for row in rows.tolist()]
    kept = {tuple(branch.bits): branch.v for branch in found if branch.verified(exact)}
    general = _general_position(exact, rank)
    cells = sum(branch.strict for branch in found if tuple(branch.bits) in kept)
    patterns = torch.tensor(list(kept), dtype=torch.float64).T.contiguous()
    directions = torch.tensor(np.array(list(kept.values()))).T.contiguous()
    return Arrangement(patterns, directions, general, complete=general and cells == cell_count(n, rank))


@dataclass(frozen=True)
class _Branch:
    """A node of the tree: a pattern of the first samples and a direction that has it."""

    v: NDArray[np.float64]
    bits: list[int]
    strict: bool  # whether no sample lies on the boundary

    def extended(self, rows: NDArray[np.float64], bit: int) -> _Branch | None:
        """The branch with one more sample on the given side, or None where there is no such direction."""
        bits = [*self.bits, bit]
        value = float(rows[-1] @ self.v)
        if self.strict and bits[:-1] and (value >= 1 if bit else value <= -1):
            return _Branch(self.v, bits, strict=True)
        if self.strict and (v := _direction(rows, bits, margin=1.0)) is not None:
            return _Branch(v, bits, strict=True)
        v = _direction(rows, bits, margin=0.0)
        return None if v is None else _Branch(v, bits, strict=False)

    def verified(self, exact: list[list[Fraction]]) -> bool:
        """Whether v gives these bits, in rational arithmetic; on the boundary to 1e-7, as v is rounded."""
        v = [Fraction(value) for value in self.v.tolist()]
        values = [sum(a * b for a, b in zip(row, v, strict=True)) for row in exact]
        slack = Fraction(0) if self.strict else Fraction(1, 10**7)
        return all(value >= -slack if bit else value < 0 for value, bit in zip(values, self.bits, strict=True))


def _direction(rows: NDArray[np.float64], bits: list[int], margin: float) -> NDArray[np.float64] | None:
    """A v with <x_i, v> >= margin where the bit is 1 and <= -1 where it is 0."""
    try:
        from scipy.optimize import linprog
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'arrangement_patterns solves linear programs by scipy, which is not installed; run: pip install "lightning-conv[recipes]"'
        ) from error
    sides = np.where(np.array(bits) == 1, -1.0, 1.0)
    bounds = np.where(np.array(bits) == 1, -margin, -1.0)
    # Rows of norm one: the solver's tolerance is absolute.
    norms = np.maximum(np.linalg.norm(rows, axis=1), np.finfo(float).tiny)
    done = linprog(
        np.zeros(rows.shape[1]), A_ub=sides[:, None] * rows / norms[:, None], b_ub=2 * bounds, bounds=(None, None)
    )
    return None if done.x is None or done.status != 0 else np.asarray(done.x) / norms.min()


def _general_position(exact: list[list[Fraction]], rank: int) -> bool:
    """Whether any min(n, r) rows are linearly independent."""
    return all(
        _rank([exact[i] for i in chosen]) == min(rank, len(exact)) for chosen in combinations(range(len(exact)), rank)
    )


def _rank(rows: list[list[Fraction]]) -> int:
    """Rank by elimination in rational arithmetic."""
    rows, rank = [list(row) for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


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
