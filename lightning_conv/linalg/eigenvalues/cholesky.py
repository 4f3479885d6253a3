"""``shifted_cholesky``: a proof of positive definiteness in floating-point arithmetic, after Rump."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD, TILE, Symmetric
from lightning_conv.linalg.rounding import gamma, unit_roundoff


@dataclass(frozen=True)
class ShiftedFactor:
    """A matrix L with L L^T = A - shift I up to rounding, and the bound that its existence proves."""

    factor: Tensor  # L, (N, N), lower triangular
    shift: float
    lower: float  # lambda_min(A) is at least this, proven

    def solve(self, columns: Tensor) -> Tensor:
        """Apply (A - shift I)^-1 to columns (N, b) by two substitutions, at 2 N^2 b flops."""
        # Not cholesky_solve, which is ten times slower for one column on the CPU.
        half = torch.linalg.solve_triangular(self.factor, columns, upper=False)
        solution: Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return solution


def shifted_cholesky(
    a: Symmetric, shift: float, *, sign: int = 1, out: Tensor | None = None, a_posteriori: bool | None = None
) -> ShiftedFactor | None:
    r"""Compute the Cholesky factor of sA - t I, s = +-1, and the lower bound of lambda_min(sA) that it proves.

    Let M be the matrix that is factored: sA with t subtracted from the diagonal in floating point. If the algorithm
    meets no pivot <= 0, its R satisfies R^T R = M + dM with (Demmel 1989; Higham 2002, Theorems 10.3 and 10.5)

    .. math:: |dM_{ij}| \le \frac{\gamma_k}{1 - \gamma_k} \sqrt{m_{ii} m_{jj}},
        \qquad \gamma_k = \frac{k u}{1 - k u}, \quad u = 2^{-53},

    k = N + 1 for the textbook operations. Derivation: r_ij r_ii = m_ij - sum_{l<i} r_li r_lj is a sum of at most N
    products with at most one division or square root, hence |dM| <= gamma_k |R^T||R|, in any order of summation,
    blocked or with fused multiply-add (Higham, Lemma 8.4). Its diagonal, |r_j|^2 = m_jj + dm_jj <= m_jj / (1 -
    gamma_k), bounds the columns r_j of R, and Cauchy-Schwarz the rest. Here k = N + 3, because some libraries multiply
    by a rounded reciprocal instead of dividing. The matrix of the sqrt(m_ii m_jj) has norm tr(M), and R^T R is
    semidefinite, therefore

    .. math:: \lambda_{\min}(M) \ge -\|dM\|_2 \ge - \frac{\gamma_k}{1 - \gamma_k} \operatorname{tr}(M) .

    The diagonal of M errs by |m_ii - (s a_ii - t)| <= u |m_ii|, a diagonal perturbation of norm <= u max m_ii, and
    together

    .. math:: \lambda_{\min}(sA) \ge t - \frac{\gamma_k}{1 - \gamma_k} \operatorname{tr}(M) - u \max_i m_{ii}
        \qquad \text{(Rump 2006)} .

    The slack is about N u tr(M), so nothing is proven below 2e-16 N tr(A). Underflow adds at most N^3 2^-1074 to a
    matrix whose largest entry is above 2^-200, see ``OUTWARD``. The proof assumes IEEE arithmetic and substitution as
    above; a library that multiplies by inverted diagonal blocks does not satisfy Theorem 10.3. So on devices other than
    the CPU the factor is checked a posteriori. With E = M - L L^T as computed, for any L,

    .. math:: \lambda_{\min}(M) \ge -\|E\|_F - \gamma_{N+2} (\|L\|_F^2 + \|M\|_F) .

    Args:
        a: the matrix A.
        shift: the shift t.
        sign: the sign s.
        out: memory for the factor, float64 (N, N) and row-major; None: allocate it.
        a_posteriori: whether to check the factor itself; None: on all devices except the CPU.

    Returns:
        The factor; None if a pivot is not positive, which proves nothing.

    Cost: N^3 / 3 flops and N^2 numbers; 2 N^3 more flops for the check a posteriori. Source: S. M. Rump, Verification
    of positive definiteness, BIT Numerical Mathematics 46 (2006) 433-452.
    """
    # The copy is row-major and the factor column-major, so LAPACK sees the same symmetric matrix, which L overwrites.
    work = factor_memory(a) if out is None else out
    torch.mul(a.matrix, sign, out=work) if sign != 1 else work.copy_(a.matrix)
    work.diagonal().sub_(shift)
    diagonal = work.diagonal().clone()
    if not bool((diagonal > 0).all()):
        return None
    factor = work.T
    info = torch.zeros((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info) != 0:
        return None
    if a_posteriori is None:
        a_posteriori = work.device.type != "cpu"
    slack = _residual(a, shift, sign, factor) if a_posteriori else _demmel(diagonal)
    slack = (slack + unit_roundoff(torch.float64) * float(diagonal.max()) + a.skew) * OUTWARD
    return ShiftedFactor(factor, shift, math.nextafter(shift - slack, -math.inf))


def factor_memory(a: Symmetric) -> Tensor:
    """Allocate memory for one factor of A, which can be reused."""
    return torch.empty_like(a.matrix, memory_format=torch.contiguous_format)


def rounding_level(a: Symmetric) -> float:
    """Return the slack that a successful Cholesky factorisation of A itself would have, about N u sum |a_ii|."""
    return _demmel(a.matrix.diagonal().abs()) + 2 * unit_roundoff(torch.float64) * a.norm + a.skew


def _demmel(diagonal: Tensor) -> float:
    g = gamma(len(diagonal) + 3, torch.float64)
    return g / (1 - g) * float(diagonal.sum()) * (1 + g)


def _residual(a: Symmetric, shift: float, sign: int, factor: Tensor) -> float:
    total: float = 0.0
    sizes: float = float(torch.linalg.vector_norm(factor)) ** 2 + a.norm + abs(shift) * a.size**0.5
    for start in range(0, a.size, TILE):
        rows = sign * a.matrix[start : start + TILE]
        rows.diagonal(start).sub_(shift)
        total += float(torch.linalg.vector_norm(rows - factor[start : start + TILE] @ factor.T)) ** 2
    sums = 1 + gamma(a.size**2 + 3, torch.float64)  # the rounding of the norms themselves
    return (math.sqrt(total) + gamma(a.size + 3, torch.float64) * sizes * sums) * sums
