"""A singular value decomposition and how far the exact singular values may lie from the computed ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.products.gemm import calibrated
from lightning_conv.kernels.products.precision import gamma

SHARE = 0.25
"""Of the calibrated rate of products that a singular value decomposition reaches."""


@dataclass(frozen=True)
class Decomposition:
    """U diag(s) V^T, computed, with k = min(rows, columns)."""

    left: Tensor  # U, (rows, k)
    values: Tensor  # s, (k,), descending
    right: Tensor  # V^T, (k, columns)
    radii: Tensor  # |sigma_i - s_i| is at most this, proven
    error: float  # |A - U diag(s) V^T|_F is at most this, proven
    defect: float  # and |U^T U - I|_F at most this

    def solve(self, targets: Tensor) -> Tensor:
        """Least squares of least norm, as far as singular values are proven to be positive: V diag(1 / s) U^T Y."""
        kept = int((self.values > self.radii).sum())  # radii decrease with the values, so these are the first ones
        return self.right[:kept].T @ (self.left[:, :kept].T @ targets / self.values[:kept, None])


def decompose(matrix: Tensor) -> Decomposition:
    r"""Singular value decomposition of A with proven radii.

    With E = A - U diag(s) V^T the exact singular values obey (Weyl; Ostrowski for the loss of orthogonality)

    .. math:: |\sigma_i - s_i| \le \|E\|_F + s_i (\|U^TU - I\|_F + \|V^TV - I\|_F),

    rounding errors of E and of the defects included.

    Args:
        matrix: A, float64.

    Raises:
        torch.linalg.LinAlgError: it did not converge.

    Cost: about 20 rows columns k flops, memory ``decomposition_bytes``.
    """
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
    return Decomposition(left, values, right, absolute + sum(relative) * values, absolute, relative[0])


def decomposition_bytes(samples: int, width: int) -> int:
    """Memory that h, ``decompose`` of [h, 1] and its caller take together."""
    columns = width + 1
    smaller = min(samples, columns)
    # h, the matrix, LAPACK's copy or the residual, the product of the factors; the factors; squares of the smaller side.
    return 8 * (4 * samples * columns + smaller * (samples + columns) + 4 * smaller**2)


def decomposition_seconds(samples: int, width: int) -> float:
    """What ``decompose`` takes, roughly."""
    flops = 20.0 * samples * width * min(samples, width)
    return flops / (SHARE * calibrated("cpu", torch.float64, torch.get_num_threads())[1])
