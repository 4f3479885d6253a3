"""``Symmetric``: a checked matrix with the norms that rounding bounds need, and its Rayleigh quotients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import MODERATE, gamma, ldexp, ldexp_down, ldexp_up

TILE = 512
OUTWARD = 1 + 2.0**-30
"""Factor on error terms that covers the rounding of their own few operations, second-order terms, and underflow.
Underflow changes a sum by at most N^3 2^-1074, which is negligible beside a term of at least 2^-53 |A| unless |A| is
tiny."""

SAFE_EXPONENT = MODERATE
"""Matrices whose largest entry is outside 2^-200 ... 2^200 are scaled by a power of two, which is exact."""


@dataclass(frozen=True)
class Symmetric:
    """A finite float64 matrix A that is symmetric up to rounding; all statements are about (A + A^T) / 2."""

    matrix: Tensor  # (N, N), 2^-exponent times the matrix that was given
    exponent: int
    norm: float
    """Upper bound of the Frobenius norm."""
    skew: float
    """Upper bound of |A - A^T|_F, the distance from A of a matrix that one triangle defines; zero if A is exactly
    symmetric."""

    @property
    def size(self) -> int:
        """Number N of rows."""
        return len(self.matrix)

    def product(self, columns: Tensor) -> Tensor:
        """Apply A to columns (N, b)."""
        return self.matrix @ columns

    def rescaled(self, bounded: Bounded) -> Bounded:
        """Return the same statement about the matrix that was given."""
        return rescaled(bounded, self.exponent)

    def rayleigh(self, vector: Tensor) -> tuple[float, float]:
        r"""Return the Rayleigh quotient x^T A x / x^T x and a proven bound on its rounding error.

        The product y = A x errs by gamma_N |A||x|, the product x^T y by gamma_N |x|^T|y|, so the numerator by

        .. math:: (2 \gamma_N + \gamma_N^2) |x|^T |A| |x| \le \gamma_{2N+1} \|A\|_F \|x\|^2 ,

        and denominator and division by a relative gamma_{N+1} (Higham 2002, section 3.1).

        Raises:
            torch.linalg.LinAlgError: the vector is zero or not finite.

        Cost: 2 N^2 flops.
        """
        square = float(vector @ vector)
        if not (math.isfinite(square) and square > 0):
            raise torch.linalg.LinAlgError("an approximate eigenvector is zero or not finite")  # type: ignore[attr-defined]
        value = float(vector @ (self.matrix @ vector)) / square
        error = gamma(2 * self.size + 4, torch.float64) * self.norm + gamma(self.size + 4, torch.float64) * abs(value)
        return value, error * OUTWARD


def rescaled(bounded: Bounded, exponent: int) -> Bounded:
    """Return the statement about 2^exponent times the number."""
    if exponent == 0:
        return bounded
    # Subnormal results are rounded, the ends outwards.
    lower, upper = ldexp_down(bounded.lower, exponent), ldexp_up(bounded.upper, exponent)
    return replace(bounded, value=_ldexp(bounded.value, exponent), lower=lower, upper=upper)


def symmetric_matrix(matrix: Tensor, name: str = "matrix") -> Symmetric:
    """Check a matrix as every eigenvalue routine here does, and return it as ``Symmetric``.

    Raises:
        ValueError: the matrix is not square, not symmetric, empty, not float64, or not finite.
    """
    largest, exact = require_symmetric(matrix, name)
    exponent = math.frexp(largest)[1]
    if largest == 0 or abs(exponent) <= SAFE_EXPONENT:
        exponent = 0
    else:
        matrix = ldexp(matrix, -exponent)
    sums = 1 + gamma(matrix.numel() + 3, torch.float64)
    norm = float(torch.linalg.vector_norm(matrix)) * sums
    skew = 0.0 if exact else float(torch.linalg.vector_norm(matrix - matrix.T)) * sums * OUTWARD
    return Symmetric(matrix, exponent, norm, skew)


def require_symmetric(matrix: Tensor, name: str = "gram") -> tuple[float, bool]:
    """Refuse a matrix that is not a finite symmetric float64 matrix.

    Returns:
        The largest absolute entry, and whether A = A^T exactly.

    Raises:
        ValueError: the matrix is not square, not symmetric, empty, not float64, or not finite.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(matrix.shape)}; need a non-empty square matrix")
    if matrix.dtype != torch.float64:
        raise ValueError(
            f"{name}: {matrix.dtype}; need float64. Converting a float32 Gram matrix does not restore its small eigenvalues, so "
            "compute it with ntk_gram, which sums in float64"
        )
    largest = max(abs(float(end)) for end in matrix.aminmax())
    if not math.isfinite(largest):
        raise ValueError(f"{name}: contains NaN or infinity; check the network, its samples and their scale")
    exact = _exactly_symmetric(matrix)
    if not exact:
        skew = float((matrix - matrix.T).abs().max())
        if skew > 1e-12 * largest:
            raise ValueError(
                f"{name}: not symmetric (largest |G - G^T| is {skew:.1e}); pass (G + G.T) / 2 if that is intended"
            )
    return largest, exact


def _exactly_symmetric(matrix: Tensor) -> bool:
    # In tiles, since reading a large matrix along its columns takes several times as long.
    cuts = [slice(start, start + TILE) for start in range(0, len(matrix), TILE)]
    return all(torch.equal(matrix[i, j], matrix[j, i].T) for k, i in enumerate(cuts) for j in cuts[: k + 1])


def _ldexp(number: float, exponent: int) -> float:
    try:
        return math.ldexp(number, exponent)
    except OverflowError:
        return math.copysign(math.inf, number)
