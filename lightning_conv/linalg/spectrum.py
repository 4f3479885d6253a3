"""``Spectrum``: eigenvalues of a symmetric matrix with proven error bounds; ``matrix_spectrum`` computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.cholesky import factor_memory
from lightning_conv.linalg.eigenvalues.dense import LinAlgError, decompose, eigen_decomposition, residual_radius
from lightning_conv.linalg.eigenvalues.largest import largest
from lightning_conv.linalg.eigenvalues.smallest import smallest
from lightning_conv.linalg.eigenvalues.symmetric import Symmetric, require_symmetric, symmetric_matrix
from lightning_conv.linalg.estimates import spectral_entropy
from lightning_conv.linalg.rounding import ldexp, ldexp_up, product_up, sum_up

__all__ = [
    "Bounded",
    "LinAlgError",
    "Method",
    "Spectrum",
    "eigen_decomposition",
    "matrix_spectrum",
    "require_symmetric",
    "residual_radius",
]

Method: TypeAlias = Literal["dense", "extremes", "auto"]

DENSE_UP_TO = 512
"""Size up to which ``"auto"`` computes all eigenvalues; for small matrices the two extreme ones alone are no faster."""

TOLERANCE, SEED = 1e-6, 0


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a Gram matrix in ascending order, with bounds on the smallest and the largest."""

    eigenvalues: Tensor | None  # float64, (N,), ascending, as computed; None: only the two extreme ones are known
    lambda_min: Bounded
    lambda_max: Bounded
    radius: float | None
    """Distance within which every eigenvalue of the exact kernel lies from the computed one (proven or estimated like
    the bounds); None without ``eigenvalues``."""
    trace: float | None = None  # None: it is the sum of the eigenvalues

    @property
    def condition_number(self) -> float:
        """lambda_max / lambda_min of the computed values; infinity where lambda_min is not positive."""
        return self.lambda_max.value / self.lambda_min.value if self.lambda_min.value > 0 else math.inf

    @property
    def floor(self) -> float:
        """Error of an eigenvalue near zero, the upper bound of the smallest one minus its value; what is not above it is rounding."""
        return self.lambda_min.upper - self.lambda_min.value

    @property
    def count_below_floor(self) -> int:
        """Number of eigenvalues that are not above ``floor``.

        Raises:
            ValueError: only the two extreme eigenvalues are known.
        """
        return int((~(self.all_eigenvalues("count_below_floor") > self.floor)).sum())

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the eigenvalues, taken as a distribution (Roy & Vetterli 2007).

        It is N if all eigenvalues are equal, 1 if only one is not zero, and 0 if all are.

        Raises:
            ValueError: only the two extreme eigenvalues are known.
        """
        return float(spectral_entropy(self.all_eigenvalues("effective_rank").clamp(min=0)).exp())

    @property
    def stable_rank(self) -> float:
        """Trace / lambda_max, the sum of the shares of the largest eigenvalue; 0 for a matrix of zeros.

        Raises:
            ValueError: neither the trace nor all eigenvalues are known.
        """
        trace = float(self.all_eigenvalues("stable_rank").sum()) if self.trace is None else self.trace
        return trace / self.lambda_max.value if self.lambda_max.value else 0.0

    def all_eigenvalues(self, purpose: str = "this") -> Tensor:
        """Return all eigenvalues; ``purpose`` is what they are needed for, and begins the error message.

        Raises:
            ValueError: only the two extreme eigenvalues are known.
        """
        if self.eigenvalues is None:
            raise ValueError(
                f"{purpose}: needs every eigenvalue, but this spectrum has only the two extreme ones; use kernel_spectrum(..., "
                'method="dense"), and for an operator its dense() matrix'
            )
        return self.eigenvalues


def matrix_spectrum(matrix: Tensor, *, method: Method | None = None) -> Spectrum:
    """Compute the eigenvalues of a symmetric float64 matrix, with proven bounds on the smallest and the largest.

    Args:
        matrix: (N, N), float64, symmetric.
        method: ``"dense"`` or None: all eigenvalues, bounded by ``residual_radius``. ``"extremes"``: the smallest and
            the largest, by ``smallest_eigenvalue`` and ``largest_eigenvalue``. ``"auto"``: dense up to N = 512,
            extremes above.

    Matrices of extreme size are scaled by a power of two first, so the bounds hold for subnormal entries, too.

    Raises:
        ValueError: the matrix is not square, not symmetric, empty, not float64, or not finite, or an eigenvalue overflows.
        torch.linalg.LinAlgError: the eigensolver failed on the device and on the CPU.

    Cost: about 12 N^3 flops if dense; 2 N^3 / 3 and about 300 N^2 flops for the extremes.

    Example:
        >>> import torch
        >>> spectrum = matrix_spectrum(torch.diag(torch.tensor([1e-12, 1.0], dtype=torch.float64)))
        >>> spectrum.lambda_min.lower <= 1e-12 <= spectrum.lambda_min.upper
        True
    """
    if method == "extremes" or (method == "auto" and matrix.ndim == 2 and len(matrix) > DENSE_UP_TO):
        return _extremes(matrix)
    return _dense(matrix)


def _dense(matrix: Tensor) -> Spectrum:
    a = symmetric_matrix(matrix, "gram")
    values, vectors, reason = decompose(a.matrix)
    absolute, relative = residual_radius(a.matrix.to(vectors.device), values, vectors)
    radius = sum_up(absolute, product_up(relative, float(values.abs().max())))
    ends = (
        Bounded.around(float(values[end]), absolute, relative, certified=True, method="residual bound", reason=reason)
        for end in (0, -1)
    )
    lowest, highest = (_in_range(a.rescaled(end), a) for end in ends)
    if a.exponent != 0:
        # The values are rounded when they are scaled back, each by at most half the least positive number.
        values, radius = ldexp(values, a.exponent), sum_up(ldexp_up(radius, a.exponent), math.ulp(0.0))
    return Spectrum(values, lowest, highest, radius)


def _in_range(bounded: Bounded, a: Symmetric) -> Bounded:
    """Return the eigenvalue if it can be represented.

    Raises:
        ValueError: it overflows.
    """
    if math.isinf(bounded.value):
        raise ValueError(
            f"gram: entries of up to 2^{a.exponent}, so an eigenvalue overflows; divide the matrix by a constant"
        )
    return bounded


def _extremes(matrix: Tensor) -> Spectrum:
    a = symmetric_matrix(matrix, "gram")
    memory = factor_memory(a)
    lowest, highest = (_in_range(a.rescaled(end(a, TOLERANCE, SEED, memory)), a) for end in (smallest, largest))
    return Spectrum(None, lowest, highest, radius=None, trace=float(matrix.diagonal().sum()))
