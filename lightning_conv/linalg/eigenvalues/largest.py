"""``largest_eigenvalue``: Lanczos from below, and a proof from above.

The proof is by the Frobenius norm of the rest of the spectrum, or by a verified Cholesky factor.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from lightning_conv.checked import SEED, checked
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.cholesky import rounding_level, shifted_cholesky
from lightning_conv.linalg.eigenvalues.dense import LinAlgError, decompose, dense_end, residual_radius
from lightning_conv.linalg.eigenvalues.smallest import require_tolerance, top_ritz_value
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD, Symmetric, symmetric_matrix
from lightning_conv.linalg.lanczos import Krylov, lanczos
from lightning_conv.linalg.rounding import gamma

STEPS = 40


@checked(seed=SEED)
def largest_eigenvalue(matrix: Tensor, *, tolerance: float = 1e-6, seed: int = 0) -> Bounded:
    """Compute lambda_max of a symmetric float64 matrix with proven bounds.

    The lower bound is the Rayleigh quotient theta of the vector that Lanczos finds, minus its rounding. The upper bound
    is tried in this order:

    1. ``complement_bound``, which costs little. It is nearly exact if lambda_max is larger than the Frobenius norm of
       the rest of the spectrum, as for kernels.
    2. A Cholesky factor of s I - A (``shifted_cholesky``). s exceeds theta by ``tolerance``, or by the error estimate
       of Lanczos if that is larger. For spectra that are dense at their upper end, forty steps leave a relative error
       of 1e-4 to 1e-2, and the upper bound is as loose.
    3. A full decomposition; ``Bounded.reason`` then says why.

    Args:
        matrix: A, (N, N), float64. If it is not exactly symmetric, the bounds are those of (A + A^T) / 2.
        tolerance: desired relative width of the interval.
        seed: seed of the start vector.

    Returns:
        The eigenvalue with certified bounds.

    Raises:
        ValueError: the matrix is not square, not symmetric, empty, not float64, or not finite; ``tolerance`` is outside
            (0, 1).
        torch.linalg.LinAlgError: even the full decomposition failed, on the device and on the CPU.

    Cost: 2 N^2 flops for each of 4-40 Lanczos steps and once more for the proof; N^3 / 3 more with the Cholesky factor.

    Example:
        >>> import torch
        >>> largest = largest_eigenvalue(torch.diag(torch.tensor([1e-10, 1.0, 3.0], dtype=torch.float64)))
        >>> largest.lower <= 3.0 <= largest.upper < 3.0 + 1e-5
        True
    """
    require_tolerance(tolerance)
    a = symmetric_matrix(matrix)
    return a.rescaled(largest(a, tolerance, seed))


def largest(a: Symmetric, tolerance: float, seed: int, out: Tensor | None = None) -> Bounded:
    """Compute ``largest_eigenvalue`` of a checked matrix; ``out`` is memory for a factor."""
    if a.norm == 0:
        return Bounded(0.0, 0.0, 0.0, True, "zero matrix")
    try:
        return _by_lanczos(a, tolerance, seed, out)
    except LinAlgError as error:
        return dense_end(a, -1, f"full decomposition, because: {error}")


def _by_lanczos(a: Symmetric, tolerance: float, seed: int, out: Tensor | None) -> Bounded:
    def converged(krylov: Krylov) -> bool:
        count = krylov.basis.shape[1]
        if count > 8 and count % 4:  # each check is an eigenvalue problem of that size
            return False
        value, error = top_ritz_value(krylov)
        return error <= 0.01 * tolerance * abs(value)

    steps = min(STEPS, a.size)
    krylov = lanczos(a.product, a.size, steps=steps, seed=seed, device=a.matrix.device, stop=converged)
    value, rounding = a.rayleigh(krylov.basis @ krylov.ritz()[1][:, -1])
    lower, upper = value - rounding, complement_bound(a, krylov.basis)
    method = "Lanczos, Frobenius norm of the rest"
    gap = max(tolerance * abs(value), rounding_level(a), 2 * top_ritz_value(krylov)[1])
    if upper > value + 2 * gap:
        factors = (shifted_cholesky(a, -(value + gap * wider), sign=-1, out=out) for wider in (1, 16, 256))
        factor = next((found for found in factors if found), None)
        if factor is None:
            raise LinAlgError("no Cholesky factor close above the largest Ritz value")
        upper, method = min(upper, -factor.lower), "Lanczos, verified Cholesky"
    return Bounded(min(max(value, lower), upper), lower, upper, certified=True, method=method)


class Operator(Protocol):
    """What ``complement_bound`` needs to know about a symmetric matrix, wherever it is stored."""

    @property
    def size(self) -> int:
        """Number N of rows."""

    @property
    def norm(self) -> float:
        """Upper bound of the Frobenius norm."""

    @property
    def skew(self) -> float:
        """Upper bound of |A - A^T|_F."""

    def product(self, columns: Tensor) -> Tensor:
        """Apply A to columns (N, b), where each entry is a sum of N products in any order."""


def complement_bound(a: Operator, basis: Tensor) -> float:
    r"""Return a proven upper bound of lambda_max(A) from any orthonormal columns Q (N, k).

    Let H = Q^T A Q, R = A Q - Q H, and C the restriction of A to the complement of the range of Q. Take c >= |C|_2 and
    mu > c. For z = Q x + w with w orthogonal to Q,

    .. math:: z^T A z \le x^T H x + 2 |Rx||w| + c|w|^2 \le x^T H x + \frac{|Rx|^2}{\mu - c} + \mu |w|^2 ,

    hence lambda_max(A) <= max(mu, lambda_max(H + R^T R / (mu - c))). With mu = lambda_max(H) the second term is the
    larger one. On a Krylov space R involves only the last basis vector, which the top Ritz vector hardly contains, so
    the bound is then exact to second order. And c follows without any eigenvalue of C:

    .. math:: \|C\|_F^2 = \|A\|_F^2 - 2 \|AQ\|_F^2 + \|H\|_F^2 .

    Rounding: with |Q^T Q - I|_2 <= d < 1, the polar factor of Q is orthonormal and within d of Q, and the statements
    are about it. This changes A Q by at most d |A|_F, and H and R by at most 3 d |A|_F. Computed products of N or k
    terms err by at most gamma |X|_F |Y|_F in the Frobenius norm, with |Q|_F = sqrt(k (1 + d)) and |AQ|_F <= (1 + d)
    |A|_F. The bound for R is valid for any matrix in place of H. The k x k eigenvalue errs by ``residual_radius``. All
    terms are of first order in N u |A|_F, except those in R, which are multiplied by R.

    Args:
        a: the matrix A.
        basis: Q, (N, k), with orthonormal columns.

    Returns:
        The bound, or the Frobenius norm of A if that is smaller or lambda_max(H) <= c.

    Cost: 2 N^2 k flops.
    """
    size, count = basis.shape
    g = gamma(size + count + 4, torch.float64)
    width = math.sqrt(count) * OUTWARD
    overlap = basis.T @ basis
    overlap.diagonal().sub_(1)
    defect = (float(overlap.norm()) + g * width**2) * OUTWARD
    if defect > 1e-10:
        return a.norm
    images = a.product(basis)
    inner = basis.T @ images
    inner = (inner + inner.T) / 2
    rest = images - basis @ inner
    # a.skew, since the statements are about (A + A^T) / 2 while the products are with A.
    image_error = (a.norm * (g * width + defect) + a.skew) * OUTWARD
    error = (a.norm * 3 * (g * width + defect) + a.skew) * OUTWARD  # error of H and of R
    images_above_zero = max(float(images.norm()) / OUTWARD - image_error, 0.0)
    inner_norm = (float(inner.norm()) + error) * OUTWARD
    square = (
        a.norm**2 - 2 * images_above_zero**2 + inner_norm**2 + 1e-14 * a.norm**2
    )  # the last term: rounding of this line
    complement = math.sqrt(max(square, 0.0)) * OUTWARD if count < size else 0.0
    mu = float(torch.linalg.eigvalsh(inner)[-1])
    if mu <= complement * (1 + 1e-6):
        return a.norm
    rest_norm = float(rest.norm()) * OUTWARD
    matrix = inner + rest.T @ rest / (mu - complement)
    values, vectors, _ = decompose(matrix)
    absolute, relative = residual_radius(matrix, values, vectors)
    top = float(values[-1])
    of_rest = (2 * rest_norm * error + error**2 + 2 * g * rest_norm**2) / (mu - complement)
    total = (absolute + relative * abs(top) + error + of_rest + g * inner_norm) * OUTWARD
    return min(math.nextafter(max(mu, top + total), math.inf), a.norm)
