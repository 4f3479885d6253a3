"""Correlations of Gaussians from their covariances."""

from __future__ import annotations

from torch import Tensor


def correlations(covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """cov(u_i, v_j) / sqrt(var(u_i) var(v_j)) within [-1, 1]; 0 where a variance is 0, since such a variable is constant.

    Args:
        covariance: (n, m).
        rows: var(u_i), (n,).
        columns: var(v_j), (m,).
    """
    # The root of a square is exact, so a variable's correlation with itself is 1 to the last bit.
    scale = (rows[:, None] * columns[None, :]).sqrt()
    return (covariance / scale.where(scale > 0, 1.0)).where(scale > 0, 0.0).clamp(-1, 1)
