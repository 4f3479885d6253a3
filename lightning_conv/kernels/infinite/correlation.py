"""Correlations of Gaussian variables from their covariances."""

from __future__ import annotations

from torch import Tensor


def correlations(covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the correlations cov(u_i, v_j) / sqrt(var(u_i) var(v_j)), clamped to [-1, 1].

    A correlation is 0 where a variance is 0, since such a variable is constant.

    Args:
        covariance: (n, m).
        rows: var(u_i), (n,).
        columns: var(v_j), (m,).
    """
    # The root of a square is exact, so the correlation of a variable with itself is exactly 1.
    scale = (rows[:, None] * columns[None, :]).sqrt()
    return (covariance / scale.where(scale > 0, 1.0)).where(scale > 0, 0.0).clamp(-1, 1)
