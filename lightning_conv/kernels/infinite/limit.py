"""``LimitKernel``: a kernel of an infinitely wide network, with the error of its quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_conv.checked import checked
from lightning_conv.kernels.infinite.arc_cosine import ArcCosineDual
from lightning_conv.kernels.infinite.hermite import HermiteDual
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.spectrum import matrix_spectrum
from lightning_conv.networks.activation import Activation, is_relu

FIRST_ORDER, LARGEST_ORDER = 32, 1024
TOLERANCE = 1e-12
"""Relative change of the kernel in the Frobenius norm below which the order is not doubled again."""

EPS = 2.0**-52


class Dual(Protocol):
    """Moments of an activation and its derivative under centred Gaussians; ``HermiteDual`` explains the methods."""

    @property
    def order(self) -> int:
        """Order of the quadrature; 0: closed forms."""
        ...

    def mean(self, variances: Tensor) -> Tensor:
        """Return E sigma(u)."""
        ...

    def moment(self, covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return E[sigma(u) sigma(v)]."""
        ...

    def derivative_moment(self, covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return E[sigma'(u) sigma'(v)]."""
        ...


Recursion: TypeAlias = Callable[[Dual], tuple[Tensor, tuple[Tensor, ...]]]
"""Function from a dual activation to K^(H) and (K^(0), ..., K^(H-1))."""


@dataclass(frozen=True)
class LimitKernel:
    """K^(H), the limit of the kernel G^(H) of the last hidden layer's weights as the width grows.

    The convention is that of the loss S = 1/2 sum (u - y)^2.
    """

    matrix: Tensor  # K^(H), (n, n), float64
    covariances: tuple[Tensor, ...]
    """K^(0), ..., K^(H-1), the covariances of the pre-activations of layers 1, ..., H: (n, n), or (n p, n p) with row i
    p + s for position s of sample i."""
    error: float
    """Estimate of |matrix - K^(H)|_F: the change from half the order (for closed forms, from perturbed correlations),
    plus rounding. It is not a bound, since a function could deceive both orders."""
    order: int  # order of the quadrature; 0: closed forms
    c_sigma: float

    @property
    def depth(self) -> int:
        """Number H of hidden layers."""
        return len(self.covariances)

    @property
    def lambda_0(self) -> Bounded:
        """lambda_min(K^(H)) with the interval of its eigenvalue, widened by ``error``.

        It is never certified, since ``error`` is an estimate.
        """
        smallest = matrix_spectrum(self.matrix, method="auto").lambda_min
        return replace(
            smallest,
            lower=smallest.lower - self.error,
            upper=smallest.upper + self.error,
            certified=False,
            method=f"{smallest.method} + error of the limit kernel",
        )


@checked()
def c_sigma(activation: Activation) -> float:
    r"""Compute the normalising constant :math:`c_\sigma = (E_{z \sim N(0,1)} \sigma(z)^2)^{-1}`, which is 2 for ReLU.

    Args:
        activation: the elementwise activation sigma.

    Raises:
        ValueError: sigma is zero, or the quadrature does not converge to within 1e-3 of its value.

    Source: Du, Lee, Li, Wang, Zhai 2019 (1811.03804), section 3.

    Example:
        >>> round(c_sigma(torch.nn.Tanh()), 4)
        2.5362
    """
    one = torch.ones(1, dtype=torch.float64)
    square, error, _ = _doubled(activation, lambda dual: (dual.moment(one[:, None], one, one), ()))
    value = float(square)
    if not value > 0 or error > 1e-3 * value:
        raise ValueError(
            f"activation: E sigma(z)^2 = {value:.3g} with an error of {error:.1g}; need a square integrable activation that is not zero"
        )
    return 1 / value


def limit_kernel(activation: Activation, recursion: Recursion) -> LimitKernel:
    """Compute the limit kernel of a recursion, at the order of quadrature at which it has converged.

    Args:
        activation: the elementwise activation sigma; for ReLU closed forms are used.
        recursion: the recursion of the architecture.
    """
    matrix, error, (order, covariances) = _doubled(activation, recursion)
    return LimitKernel(matrix, covariances, error, order, c_sigma(activation))


def _doubled(activation: Activation, recursion: Recursion) -> tuple[Tensor, float, tuple[int, tuple[Tensor, ...]]]:
    """Return the first result of the recursion, its estimated error, and the order with the other results."""
    if is_relu(activation):
        exact = ArcCosineDual()
        matrix, rest = recursion(exact)
        nudged, _ = recursion(ArcCosineDual(nudge=8 * EPS))
        return matrix, float((nudged - matrix).norm()) + _rounding(matrix, 1, len(rest)), (exact.order, rest)
    before, _ = recursion(HermiteDual(activation, FIRST_ORDER // 2))
    order = FIRST_ORDER
    while True:
        matrix, rest = recursion(HermiteDual(activation, order))
        change, size = float((matrix - before).norm()), float(matrix.norm())
        if change <= TOLERANCE * size or 2 * order > LARGEST_ORDER:
            return matrix, change + _rounding(matrix, order, len(rest)), (order, rest)
        before, order = matrix, 2 * order


def _rounding(matrix: Tensor, order: int, layers: int) -> float:
    """Return an allowance in the Frobenius norm for the rounding of sums of ``order`` terms in each layer."""
    return 4 * (order + 8) * max(layers, 1) * EPS * float(matrix.norm())
