r"""Closed forms for ReLU: moments of correlated Gaussians, and the limit kernel H_inf of the two-layer network.

With theta the angle whose cosine is the correlation of (u, v) (Cho & Saul 2009, the arc-cosine kernels of degree 0 and
1):

.. math::
    E[1\{u \ge 0\} 1\{v \ge 0\}] = \frac{\pi - \theta}{2 \pi}, \qquad
    E[\mathrm{relu}(u)\, \mathrm{relu}(v)] = \frac{\sqrt{\mathrm{var}(u)\, \mathrm{var}(v)}}{2 \pi}
    \bigl( \sin\theta + (\pi - \theta) \cos\theta \bigr)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.checked import checked
from lightning_conv.kernels.infinite.correlation import correlations
from lightning_conv.linalg.rounding import require_moderate


@dataclass(frozen=True)
class ArcCosineDual:
    """The dual activation of ReLU in closed form; ``HermiteDual`` explains the methods."""

    nudge: float = 0.0
    """Relative change of all correlations but 1, which shows the effect of their rounding: near 1 the arc cosine turns
    an error u into sqrt(u)."""
    order: int = 0  # order of the quadrature; 0: there is none

    def mean(self, variances: Tensor) -> Tensor:
        """Return E relu(u) = sqrt(variance / (2 pi))."""
        return (variances / (2 * math.pi)).sqrt()

    def moment(self, covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return E[relu(u) relu(v)], half the arc-cosine kernel of degree 1."""
        cosine = self._correlations(covariance, rows, columns)
        # The sine as sqrt((1 - c)(1 + c)) keeps the digits that 1 - c^2 would lose.
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        scale = (rows[:, None] * columns[None, :]).sqrt()
        return scale * (sine + (math.pi - cosine.arccos()) * cosine) / (2 * math.pi)

    def derivative_moment(self, covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return P(u >= 0, v >= 0), half the arc-cosine kernel of degree 0."""
        return (math.pi - self._correlations(covariance, rows, columns).arccos()) / (2 * math.pi)

    def _correlations(self, covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        cosine = correlations(covariance, rows, columns)
        return cosine if self.nudge == 0 else torch.where(cosine == 1, cosine, cosine * (1 - self.nudge))


@checked()
def h_infinity(inputs: Tensor) -> Tensor:
    r"""Compute the limit kernel H_inf of the two-layer ReLU network whose hidden weights are trained.

    .. math::
        H^\infty_{ij} = E_{w \sim N(0, I)} \bigl[ x_i \cdot x_j \, 1\{w \cdot x_i \ge 0, w \cdot x_j \ge 0\} \bigr]
        = x_i \cdot x_j \, \frac{\pi - \theta_{ij}}{2 \pi}

    theta_ij is the angle between the inputs, which may have any norm. It is computed as :math:`2
    \operatorname{atan2}(|a - b|, |a + b|)` from the unit vectors (Kahan), since the arc cosine would lose half the
    digits of nearly parallel inputs.

    Args:
        inputs: (n, d), or images, which are flattened; no row may be zero.

    Returns:
        (n, n), float64. Its smallest eigenvalue lambda_0 is positive if no two inputs are parallel (Theorem 3.1). On a
        part of the data it is an upper bound of lambda_0 on all data (interlacing).

    Raises:
        ValueError: there are no samples, or a row is zero or not finite.

    Cost: O(n^2 d). Source: Du, Zhai, Poczos, Singh 2019 (1810.02054), Definition of H_inf; closed form: Arora et al.
    2019 (1901.08584), eq. (3).

    Example:
        >>> h_infinity(torch.eye(2))  # orthogonal: no coupling
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    x = as_rows(inputs)
    sizes = x.abs().amax(1, keepdim=True)
    if not bool((sizes > 0).all()):
        raise ValueError(f"inputs: row {int((sizes == 0).nonzero()[0, 0])} is zero and has no direction; remove it")
    unit = x / sizes
    unit = unit / unit.norm(dim=1, keepdim=True)
    far, near = (torch.stack([(row + sign * unit).norm(dim=1) for row in unit]) for sign in (-1, 1))
    theta = 2 * torch.atan2(far, near)
    kernel = (x @ x.T) * (math.pi - theta) / (2 * math.pi)
    return (kernel + kernel.T) / 2


def as_rows(inputs: Tensor) -> Tensor:
    """Return samples as float64 rows, (n, d).

    Raises:
        ValueError: there are no samples, or some are not finite, or so large or small that their products overflow or vanish.
    """
    if inputs.ndim < 2 or inputs.numel() == 0:
        raise ValueError(
            f"inputs: shape {tuple(inputs.shape)}; need (n, d) or images, with n samples along dimension 0"
        )
    rows = inputs.detach().double().flatten(1)
    if not bool(rows.isfinite().all()):
        raise ValueError("inputs: contain NaN or infinity; clean the samples")
    require_moderate(rows, "inputs")
    return rows
