"""Lower bounds of what a head can reach, by Fenchel duality: for heads too narrow to reach every output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.products.precision import gamma, unit_roundoff
from lightning_conv.last_layer.gram import SmallGram, small_gram
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.last_layer.sigma import gram_sigma_min
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.losses.conjugate import Conjugate

RIDGE = 1e-11
"""Of the trace, added to the Gram matrix: rank-deficient features have a factor too, and refinement takes its effect away."""

REFINED = 4
ROUNDS = 20
RADIUS = 1e3
"""Where no bound of sigma_min([h, 1]) is proven, the statement is about heads up to this many times the norm of the present one."""


@dataclass(frozen=True)
class DualBound:
    """L(W) >= ``lower`` for every W with |W|_F <= ``radius``, proven."""

    lower: float
    radius: float  # infinite: for every W


class HeadDual:
    r"""Lower bounds of inf L over the last layer from nearly optimal W.

    With conjugates :math:`\ell_i^*` and Z = [h, 1], for *any* A (n, C) and W, Fenchel-Young gives

    .. math:: L(W) \ge \frac1n \sum_i \left( A_i \cdot b - \ell_i^*(A_i) \right) + \frac1n \langle Z^T A, W \rangle

    (b: a fixed bias). A is made of the gradients at W, projected onto :math:`Z^T A = 0` and taken into the domain of
    :math:`\ell_i^*`: scaled towards 0 for Huber's and the absolute losses; for cross-entropies A + q must be nonnegative, so
    small entries are raised and the projection is repeated. What is left of Z^T A is computed with its rounding: E. Then the
    bound holds up to :math:`|E| |W| / n` for all W up to a radius; or, where Z has D independent columns (proven:
    sigma_min > 0), for every W: some dA with :math:`|dA| \le |E| / \sigma_{\min}` makes A feasible exactly, and stays in the
    domain if A keeps that distance.

    Args:
        problem: the head's, with one of torch's losses.

    Raises:
        ValueError: the caller's own loss, whose conjugate is not known.
        MemoryError: the smaller Gram matrix does not fit.

    Cost: that matrix, its factor and a proven sigma_min, once.

    Source: Rockafellar 1970, theorem 31.1.
    """

    def __init__(self, problem: HeadProblem) -> None:
        if problem.losses.kind == "custom":
            raise ValueError("loss_fn: the conjugate of the caller's own loss is not known, so there is no dual bound")
        self._problem = problem
        gram = small_gram(problem)
        self._project = _Projection(problem, gram)
        self._smallest = 0.0 if problem.samples < problem.columns else gram_sigma_min(gram).lower
        self._conjugate = Conjugate(problem.losses)

    def bound(self, w: Tensor) -> DualBound:
        """A lower bound; the nearer W to a minimiser, the closer. Far from it, it may say nothing.

        Args:
            w: W, (D, C).

        Cost: eight passes for each of a few projections.
        """
        problem, conjugate = self._problem, self._conjugate
        total, a = problem.losses.gradients(problem.outputs(w), slice(0, problem.samples))
        size = float(w.norm()) + 1
        within = everywhere = DualBound(-math.inf, 0.0)
        floor, idle = 0.0, 0
        for _ in range(ROUNDS):
            a = self._project(conjugate.inside(a, floor))
            candidate = conjugate.inside(a, 0.0)
            found = _evaluate(problem, conjugate, candidate, self._smallest, size)
            if math.isinf(found.radius):
                everywhere = found
                break
            idle = 0 if found.lower > within.lower else idle + 1
            within = max(within, found, key=lambda bound: bound.lower)
            if self._smallest == 0 and idle > 2:
                break
            floor = max(4 * floor, -2 * conjugate.slack(a), 1e-14)
        loss = total / problem.samples
        # A statement about every head is worth a somewhat larger gap.
        return everywhere if loss - everywhere.lower <= 2 * (loss - within.lower) else within


def _evaluate(problem: HeadProblem, conjugate: Conjugate, a: Tensor, smallest: float, size: float) -> DualBound:
    n, g = problem.samples, gamma(problem.samples + problem.columns + 8, torch.float64)
    infeasible = float(problem.adjoint(a).norm())
    # Rounding of Z^T A; and A itself is within a few u of matrices whose rows sum up as they must.
    norms = problem.row_norms
    infeasible += g * float(norms.norm()) * float(a.norm())
    infeasible += (a.shape[1] + 4) * unit_roundoff(torch.float64) * float((norms * conjugate.sizes(a)).sum())
    infeasible *= OUTWARD
    terms = -conjugate.values(a)
    if problem.offset is not None:
        terms = terms + a * problem.offset
    value = float(terms.sum()) / n
    value -= gamma(terms.numel() + 32, torch.float64) * (float(terms.abs().sum()) + float(conjugate.sizes(a).sum())) / n
    moved = infeasible / smallest if smallest > 0 else math.inf
    if math.isfinite(moved) and 2 * moved <= conjugate.slack(a):
        offset = 0.0 if problem.offset is None else float(problem.offset.norm()) * n**0.5
        loss = moved * (conjugate.slope(a, moved) + offset) / n
        return DualBound(math.nextafter(value - loss * OUTWARD, -math.inf), math.inf)
    return DualBound(math.nextafter(value - RADIUS * size * infeasible / n, -math.inf), RADIUS * size)


class _Projection:
    """A -> A - P A, P onto the range of Z, by the smaller Gram matrix with a ridge whose effect is refined away."""

    def __init__(self, problem: HeadProblem, gram: SmallGram) -> None:
        self._problem, self._by_rows = problem, gram.by_rows
        self._ridge = RIDGE * float(gram.matrix.trace())
        matrix = gram.matrix.clone()
        matrix.diagonal().add_(self._ridge)
        self._factor = torch.linalg.cholesky(matrix)

    def __call__(self, a: Tensor) -> Tensor:
        for _ in range(REFINED):
            if self._by_rows:
                a = self._ridge * torch.cholesky_solve(a, self._factor)
            else:
                a = a - self._problem.product(torch.cholesky_solve(self._problem.adjoint(a), self._factor))
        return a
