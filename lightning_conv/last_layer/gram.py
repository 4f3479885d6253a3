"""The smaller Gram matrix of [h, 1], and least-norm solutions by its Cholesky factor, in memory or in tiles."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lightning_conv.expressivity import plan_stream
from lightning_conv.expressivity.factor import solve as solve_tiled
from lightning_conv.expressivity.factor import tiled_cholesky
from lightning_conv.expressivity.stream import stream_gram
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.last_layer.features import WORD
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.linalg.rounding import gamma
from lightning_conv.machine.memory import mebibytes
from lightning_conv.reporting.progress import Report, part, silent

REFINEMENTS = 3
DONE = 1e-13
"""Relative residual at which refinement stops, close to the rounding error of the products."""


class SingularError(ValueError):
    """[h, 1] does not have full rank in floating point, so the Gram matrix has no Cholesky factor."""


@dataclass(frozen=True)
class SmallGram:
    """The smaller of the Gram matrices [h, 1] [h, 1]^T (n x n) and [h, 1]^T [h, 1] (D x D)."""

    matrix: Tensor
    by_rows: bool  # whether it is the n x n matrix
    rounding: float  # proven bound of the spectral norm of the rounding error


def small_gram(problem: HeadProblem) -> SmallGram:
    r"""Compute the smaller Gram matrix as a dense matrix.

    Entries err by at most gamma_k |x||y| with k = n or D products, so the error matrix has norm at most
    gamma_k |[h, 1]|_F^2.

    Raises:
        MemoryError: it does not fit, or it is the n x n matrix and the features are not held in memory.

    Cost: n D min(n, D) flops twice over, min(n, D)^2 numbers, one pass.
    """
    n, d = problem.samples, problem.columns
    size, by_rows = min(n, d), n <= d
    if 2 * WORD * size**2 > problem.allowed or (by_rows and not problem.held):
        raise MemoryError(
            f"max_memory: the Gram matrix of [h, 1] and its factor take {mebibytes(2 * WORD * size**2)} in addition to the "
            f"features, but only {mebibytes(problem.allowed)} are allowed; allow more"
        )
    matrix = torch.zeros(size, size, dtype=torch.float64, device=problem.device)
    for _, h in problem.rows():
        if by_rows:
            torch.mm(h, h.T, out=matrix)
            matrix += float(problem.bias)
        else:
            inner = matrix[: problem.width, : problem.width]
            inner += h.T @ h
            if problem.bias:
                sums = h.sum(0)
                matrix[-1, :-1] += sums
                matrix[:-1, -1] += sums
                matrix[-1, -1] += len(h)
    square = float(problem.row_norms.square().sum()) * (1 + gamma(n + 2, torch.float64))
    return SmallGram(matrix, by_rows, gamma(max(n, d) + len(problem.strips) + 2, torch.float64) * square)


class _Factor(Protocol):
    def __call__(self, columns: Tensor) -> Tensor:
        """Apply the inverse of the Gram matrix to columns."""


class LeastChange:
    """Solver for the matrix dW of least norm whose change of the outputs, [h, 1] dW, is closest to a required change T.

    For n <= D, dW = [h, 1]^T K^-1 T with K = [h, 1] [h, 1]^T; otherwise the normal equations are solved. The residual is
    refined up to three times.

    Args:
        problem: the problem with the features [h, 1].
        factor: function that applies the inverse of the small Gram matrix.
    """

    def __init__(self, problem: HeadProblem, factor: _Factor) -> None:
        self._problem, self._factor = problem, factor
        self._by_rows = problem.samples <= problem.columns

    def __call__(self, change: Tensor, *, refine: bool = True) -> Tensor:
        """Compute dW for a change of the outputs.

        Args:
            change: required change of the outputs, (n, C).
            refine: whether to reduce the residual to rounding.

        Raises:
            SingularError: refinement does not converge.

        Cost: one pass, and two per refinement.
        """
        size = float(change.norm())
        total, before = self._once(change), float("inf")
        if not refine:
            return total
        for _ in range(REFINEMENTS if size else 0):
            residual = change - self._problem.product(total)
            # For n > D the residual itself remains; only its part in the range must vanish.
            correction = self._once(residual)
            moved = float(correction.norm()) / max(float(total.norm()), 1e-300)
            if not moved < 0.5 * before:
                break
            total, before = total + correction, moved
            if moved <= DONE:
                break
        if not before < 1e-2 and size:
            raise SingularError(
                "[h, 1] is numerically singular: the refinement of its least-norm solutions does not converge"
            )
        return total

    def _once(self, change: Tensor) -> Tensor:
        if self._by_rows:
            return self._problem.adjoint(self._factor(change))
        return self._factor(self._problem.adjoint(change))


@contextmanager
def least_change(problem: HeadProblem, report: Report = silent) -> Iterator[LeastChange]:
    """Factor the smaller Gram matrix: dense, or n x n in tiles (on disk if necessary) if the features are not held in memory.

    Args:
        problem: the problem with the features [h, 1].
        report: called with the share of the work that is done.

    Yields:
        The solver.

    Raises:
        SingularError: there is no Cholesky factor.
        MemoryError: the matrix does not fit into ``max_memory``.
        ValueError: the features are all zero without a trained bias, or their products vanish or overflow.

    Cost: n D min(n, D) flops for the Gram matrix, min(n, D)^3 / 3 for the factor.
    """
    problem.require_moderate()
    if problem.samples <= problem.columns and not problem.held:
        with _tiled(problem, report) as solver:
            yield solver
        return
    gram = small_gram(problem)
    report(0.8)
    factor, info = torch.linalg.cholesky_ex(gram.matrix)
    if int(info) != 0:
        raise SingularError(
            f"[h, 1] does not have rank {len(factor)} in floating point (the Cholesky factorisation stops at row {int(info)})"
        )
    report(1.0)
    yield LeastChange(problem, lambda columns: torch.cholesky_solve(columns, factor))


@contextmanager
def _tiled(problem: HeadProblem, report: Report) -> Iterator[LeastChange]:
    plan = plan_stream(problem.samples, problem.width, max_memory=problem.allowed)
    with tempfile.TemporaryDirectory(prefix="last-layer-") as name:
        paths = [Path(name) / f"{kind}.tiles" if plan.on_disk else None for kind in ("gram", "factor")]
        gram, factor = (Tiles(problem.samples, plan.tile, path) for path in paths)
        weight = problem.samples**2 * problem.width / plan.flops
        gram_report = part(report, 0, weight)
        stream_gram(problem.source, gram, bias=problem.bias, panel=plan.panel, report=gram_report, save=lambda _: None)
        rows = tiled_cholesky(gram, factor, 0.0, report=part(report, weight, 1 - weight), save=lambda _: None)
        if rows < problem.samples:
            raise SingularError(
                f"[h, 1] does not have rank {problem.samples} in floating point (the Cholesky factorisation stops at row {rows})"
            )
        yield LeastChange(problem, lambda columns: solve_tiled(factor, columns))
