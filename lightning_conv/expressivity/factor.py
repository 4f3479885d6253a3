"""Cholesky factorisation of a matrix in tiles, and what its success proves about the smallest eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.kernels.products.precision import gamma, unit_roundoff
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.reporting.progress import Report


def tiled_cholesky(
    matrix: Tiles,
    factor: Tiles,
    shift: float,
    *,
    done: int = 0,
    report: Report,
    save: Callable[[int], None],
) -> int:
    """Lower factor L of A - shift I, column of tiles by column of tiles, each from those before it.

    Args:
        matrix: A; it stays as it is, so that a column can be computed again.
        factor: where L goes, in tiles of the same size.
        shift: subtracted from the diagonal.
        done: columns of tiles that ``factor`` holds already.
        report: told the share of the work that is done.
        save: called with the number of columns that are done.

    Returns:
        Rows of the largest leading tiles that have a factor: n if A - shift I has one, else a multiple of the tile.

    Cost: n^3 / 3 flops and as many bytes read as n^3 / (1.5 tile), from memory where the factor fits.
    """
    count = matrix.count
    work = torch.empty(matrix.tile, matrix.tile, dtype=torch.float64)
    for k in range(done, count):
        for i, original in matrix.column(k):
            target = factor[i, k]
            target.copy_(original)
            if i == k:
                target.diagonal().sub_(shift)
            part = work.flatten()[: target.numel()].view(target.shape)
            for j in range(k):
                # The product first, then the difference: the bound counts on short sums.
                target -= torch.mm(factor[i, j], factor[k, j].T, out=part)
            if i == k:
                lower, info = torch.linalg.cholesky_ex(target)
                if int(info) != 0:
                    return int(matrix.rows(k).start)
                target.copy_(lower)
            else:
                target.copy_(torch.linalg.solve_triangular(factor[k, k].T, target.clone(), upper=True, left=False))
        save(k + 1)
        # Columns on the left cost little, those in the middle most.
        report(_share(k + 1, count))
    return matrix.size


def _share(done: int, count: int) -> float:
    work = [(k + 1) * (count - k) for k in range(count)]
    return sum(work[:done]) / sum(work)


def lowest_eigenvalue(matrix: Tiles, shift: float) -> float:
    r"""Lower bound of lambda_min(A) that the success of ``tiled_cholesky`` proves, after Rump 2006 and Higham 2002, section 10.1.

    With L L^T = M + dM, M = A - t I as rounded: entry (i, j) of L follows from m_ij by subtracting products r_l of
    earlier entries. Through its own tile's product a term goes through at most b roundings (one product, b - 1 sums), and then
    shares those of m_ij, of which there are at most T subtractions of tiles and b operations within the last tile.
    Dividing by what m_ij went through (as in the proof of Higham's Lemma 8.4), every term is off by at most
    gamma_D, D = 2 b + T + 3, so

    .. math:: |dM| \le \gamma_D |L||L|^T, \qquad \|dM\|_2 \le \frac{\gamma_D}{1 - \gamma_D} \operatorname{tr} M,
        \qquad \lambda_{\min}(A) \ge t - \frac{\gamma_D}{1 - \gamma_D} \operatorname{tr} M - u \max_i m_{ii},

    the second as in ``eigenvalues.cholesky``. In one piece D would be n + 3: tiles of 1,024 prove 27 times as much for 60,000
    samples.

    Args:
        matrix: A.
        shift: t.
    """
    diagonal = matrix.diagonal() - shift
    return math.nextafter(shift - rounding(matrix, float(diagonal.sum()), float(diagonal.max())), -math.inf)


def rounding(matrix: Tiles, trace: float, largest: float) -> float:
    """What the factorisation of a matrix of this trace and largest diagonal entry leaves open."""
    g = gamma(2 * matrix.tile + matrix.count + 3, torch.float64)
    sums = 1 + gamma(matrix.size, torch.float64)
    return (g / (1 - g) * trace * sums + unit_roundoff(torch.float64) * largest) * OUTWARD


def solve(factor: Tiles, columns: Tensor) -> Tensor:
    """(L L^T)^-1 on columns (n, c): 2 n^2 c flops."""
    solution = columns.clone()
    for i in range(factor.count):
        mine = factor.rows(i)
        for j in range(i):
            solution[mine] -= factor[i, j] @ solution[factor.rows(j)]
        solution[mine] = torch.linalg.solve_triangular(factor[i, i], solution[mine], upper=False)
    for i in reversed(range(factor.count)):
        mine = factor.rows(i)
        solution[mine] = torch.linalg.solve_triangular(factor[i, i].T, solution[mine], upper=True)
        for j in range(i):
            solution[factor.rows(j)] -= factor[i, j].T @ solution[mine]
    return solution
