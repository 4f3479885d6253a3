"""The singular value decomposition with proven error bounds of the singular values, and its cost."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import Cost
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD, SAFE_EXPONENT, rescaled
from lightning_conv.linalg.rounding import exponent_of, gamma, ldexp, ldexp_up, sum_down, sum_up
from lightning_conv.machine.gemm import calibrated

METHOD = "residual bound of the float64 SVD"
SHARE = 0.25
"""Share of the calibrated rate of matrix products that a singular value decomposition reaches."""


@dataclass(frozen=True)
class Decomposition:
    """Computed singular value decomposition U diag(s) V^T with proven errors, k = min(rows, columns)."""

    left: Tensor  # U, (rows, k)
    values: Tensor  # s, (k,), descending
    right: Tensor  # V^T, (k, columns)
    radii: Tensor  # |sigma_i - s_i| is at most this, proven
    error: float  # |A - U diag(s) V^T|_F is at most this, proven
    defect: float  # and |U^T U - I|_F at most this
    exponent: int = 0
    """k: values, radii and error are those of 2^-k times the matrix that was given."""

    def rank(self, feature_error: float = 0.0) -> int:
        """Return the number of singular values that are proven positive for every matrix within ``feature_error``."""
        allowance = ldexp_up(feature_error, -self.exponent)
        # Without an error the comparison is exact; otherwise the factor covers the rounding of the sum.
        least = (self.radii + allowance) * OUTWARD if allowance else self.radii
        return int((self.values > least).sum())

    def solve(self, targets: Tensor) -> Tensor:
        """Return the least-squares solution of least norm, V diag(1 / s) U^T Y, over the provably positive singular values."""
        kept = int((self.values > self.radii).sum())  # the radii decrease with the values, so these are the first ones
        return self.right[:kept].T @ (self.left[:, :kept].T @ targets / self.values[:kept, None])


def decompose(matrix: Tensor) -> Decomposition:
    r"""Compute the singular value decomposition of A with proven error bounds (radii) of the singular values.

    With E = A - U diag(s) V^T the exact singular values satisfy (Weyl; Ostrowski for the loss of orthogonality)

    .. math:: |\sigma_i - s_i| \le \|E\|_F + s_i (\|U^TU - I\|_F + \|V^TV - I\|_F),

    with the rounding errors of E and of the defects included. A matrix whose largest entry is outside 2^-200 ... 2^200 is
    scaled by a power of two, so that no square vanishes or overflows. Entries that become subnormal lose at most 2^-1075
    each, which the allowance for the rounding of the residual covers.

    Args:
        matrix: matrix A, (rows, columns), float64.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge.

    Cost: about 20 rows columns k flops, memory ``decomposition_bytes``.
    """
    exponent = exponent_of(matrix)
    exponent = 0 if abs(exponent) <= SAFE_EXPONENT else exponent
    matrix = ldexp(matrix, -exponent) if exponent else matrix
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    count = len(values)
    residual = float((matrix - (left * values) @ right).norm())
    defects = [left.T @ left, right @ right.T]
    for defect in defects:
        defect.diagonal().sub_(1)
    squares = left.square().sum(0), right.square().sum(1)
    sizes = (squares[0] * squares[1]).sqrt()
    slack = gamma(max(matrix.shape) + 3, torch.float64)
    sums = 1 + gamma(matrix.numel() + 3, torch.float64)  # the rounding of the norms and sums themselves
    absolute = (residual + slack * float((values * sizes).sum() + matrix.norm())) * sums
    relative = [
        (float(d.norm()) + slack * (float(s.sum()) + count**0.5)) * sums for d, s in zip(defects, squares, strict=True)
    ]
    radii = (absolute + sum(relative) * values) * OUTWARD
    return Decomposition(left, values, right, radii, absolute, relative[0], exponent)


def decomposition_bytes(samples: int, width: int) -> int:
    """Return the memory, in bytes, of h, ``decompose`` of [h, 1] and its caller together."""
    columns = width + 1
    smaller = min(samples, columns)
    # h, the matrix, LAPACK's copy or the residual, the product of the factors; the factors; squares of the smaller side.
    return 8 * (4 * samples * columns + smaller * (samples + columns) + 4 * smaller**2)


def decomposition_cost(samples: int, width: int, start: float) -> Cost:
    """Return the cost of a certificate by ``decompose`` of [h, 1] that began at ``start`` (``time.perf_counter``)."""
    flops = 20.0 * samples * width * min(samples, width)
    predicted = flops / (SHARE * calibrated("cpu", torch.float64, torch.get_num_threads())[1])
    return Cost(time.perf_counter() - start, flops, decomposition_bytes(samples, width), predicted=predicted)


def bounded_value(decomposition: Decomposition, index: int, feature_error: float) -> Bounded:
    """Return a singular value of the matrix that was given, with the bounds that its radius gives, rounded outwards.

    Args:
        decomposition: the decomposition.
        index: number of the singular value, 0 for the largest.
        feature_error: Frobenius norm of the change that rounding inside the trunk may have made to the matrix.
    """
    exponent = decomposition.exponent
    found = Bounded.around(
        float(decomposition.values[index]), float(decomposition.radii[index]), certified=True, method=METHOD
    )
    found = rescaled(found, exponent)
    lower, upper = max(sum_down(found.lower, -feature_error), 0.0), sum_up(found.upper, feature_error)
    estimated = " + estimated rounding inside the trunk" if feature_error else ""
    return Bounded(found.value, lower, upper, feature_error == 0, METHOD + estimated)
