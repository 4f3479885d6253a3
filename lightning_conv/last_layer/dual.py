"""Lower bounds of the loss over all heads by Fenchel duality, for heads too narrow to reach every output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.last_layer.gram import SmallGram, small_gram
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.last_layer.sigma import gram_sigma_min
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.rounding import gamma, unit_roundoff
from lightning_conv.losses.conjugate import Conjugate

RIDGE = 1e-11
"""Share of the trace that is added to the Gram matrix, so that rank-deficient features have a factor; refinement removes its effect."""

REFINED = 4
ROUNDS = 20
RADIUS = 1e3
"""If sigma_min([h, 1]) > 0 is not proven, the bound is about heads of at most this many times the current norm (plus 1)."""


@dataclass(frozen=True)
class DualBound:
    """A proven bound: L(W) >= ``lower`` for every W with |W|_F <= ``radius``."""

    lower: float
    radius: float  # infinite: the bound is valid for every W


class HeadDual:
    r"""Lower bounds of inf L over the last layer, from nearly optimal W.

    With conjugates :math:`\ell_i^*` and Z = [h, 1], the Fenchel-Young inequality gives for *any* A (n, C) and W

    .. math:: L(W) \ge \frac1n \sum_i \left( A_i \cdot b - \ell_i^*(A_i) \right) + \frac1n \langle Z^T A, W \rangle,

    where b is a fixed bias. A consists of the gradients at W, projected onto :math:`Z^T A = 0` and moved into the domain of
    :math:`\ell_i^*`. For Huber's and the absolute losses it is scaled towards 0. For cross-entropies A + q must be
    nonnegative, so small entries are raised and the projection is repeated. Let E be a bound of the remaining Z^T A, with
    rounding included. Then the bound is valid up to :math:`|E| |W| / n` for all W up to a radius. If Z is proven to have D
    independent columns (sigma_min > 0), it is valid for every W: some dA with :math:`|dA| \le |E| / \sigma_{\min}` makes A
    exactly feasible, and A + dA stays in the domain if A keeps that distance from its boundary.

    Args:
        problem: the problem of the head, with one of torch's losses.

    Raises:
        ValueError: the loss is the caller's own, whose conjugate is not known, or the features are refused by
            ``HeadProblem.require_moderate``.
        MemoryError: the smaller Gram matrix does not fit.

    Cost: the smaller Gram matrix of Z, its factor and a proven sigma_min, once.

    Source: Rockafellar 1970, theorem 31.1.
    """

    def __init__(self, problem: HeadProblem) -> None:
        if problem.losses.kind == "custom":
            raise ValueError("loss_fn: the conjugate of the caller's own loss is not known, so there is no dual bound")
        problem.require_moderate()
        self._problem = problem
        gram = small_gram(problem)
        self._project = _Projection(problem, gram)
        self._smallest = 0.0 if problem.samples < problem.columns else gram_sigma_min(gram).lower
        self._conjugate = Conjugate(problem.losses)

    def bound(self, w: Tensor) -> DualBound:
        """Compute a lower bound, which is sharper the closer W is to a minimiser, and may be -inf far from it.

        Args:
            w: last layer W, (D, C).

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
        # A bound for every head is preferred even if its gap is somewhat larger.
        return everywhere if loss - everywhere.lower <= 2 * (loss - within.lower) else within


def _evaluate(problem: HeadProblem, conjugate: Conjugate, a: Tensor, smallest: float, size: float) -> DualBound:
    n, g = problem.samples, gamma(problem.samples + problem.columns + 8, torch.float64)
    infeasible = float(problem.adjoint(a).norm())
    # Rounding of Z^T A. A itself is within a few u of a matrix whose rows have the required sums.
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
    """Map A -> A - P A, with P the projector onto the range of Z, by the smaller Gram matrix with a ridge and refinement."""

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
