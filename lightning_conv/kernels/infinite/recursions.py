r"""Limit kernels K^(H) of fully connected and residual networks in the parametrisation of Du, Lee, Li, Wang, Zhai.

Let K^(0)_ij = x_i . x_j, (u, v) ~ N(0, [[K_ii, K_ij], [K_ji, K_jj]]), and let hidden and output weights be drawn from
N(0, 1).

Fully connected, x^(h) = sqrt(c_sigma / m) sigma(W^(h) x^(h-1))

.. math::
    K^{(h)}_{ij} = c_\sigma E_{K^{(h-1)}}[\sigma(u) \sigma(v)], \qquad
    K^{(H)}_{ij} = c_\sigma K^{(H-1)}_{ij} E_{K^{(H-1)}}[\sigma'(u) \sigma'(v)]

Residual, x^(h) = x^(h-1) + (c_res / (H sqrt m)) sigma(W^(h) x^(h-1)) for h >= 2, with b^(h) the mean over the units of
sqrt(m) x^(h)

.. math::
    K^{(h)}_{ij} &= K^{(h-1)}_{ij} + \frac{c_{res}}{H} \bigl( b_i E\sigma(v) + b_j E\sigma(u) \bigr)
    + \frac{c_{res}^2}{H^2} E[\sigma(u)\sigma(v)], \\
    b^{(h)}_i &= b^{(h-1)}_i + \frac{c_{res}}{H} E\sigma(u), \qquad
    K^{(H)}_{ij} = \frac{c_{res}^2}{H^2} K^{(H-1)}_{ij} E_{K^{(H-1)}}[\sigma'(u) \sigma'(v)].

Definitions 5.1 and 6.1 of the paper print the last line with the covariance of the layer before. The kernel that finite
networks tend to is built from K^(H-1), as in Proposition F.2; `lightning-conv lab du` shows both beside the mean over
finite networks. Likewise b_i multiplies E sigma(v) here, which makes no difference for inputs of equal norm, as the
paper assumes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_conv.checked import checked, real, whole
from lightning_conv.kernels.infinite.arc_cosine import as_rows
from lightning_conv.kernels.infinite.limit import Dual, LimitKernel, c_sigma, limit_kernel
from lightning_conv.networks.activation import Activation


@checked(depth=whole(1))
def fully_connected_limit(inputs: Tensor, depth: int, activation: Activation) -> LimitKernel:
    """Compute K^(H) of ``DuFC`` with H hidden layers.

    For H = 1 and ReLU it is 2 H_inf, since c_sigma = 2 and the output weights have variance 1 in both.

    Args:
        inputs: (n, d), or images, which are flattened, with any norm (the theorem assumes 1).
        depth: H, at least 1.
        activation: the elementwise activation sigma. For a smooth one the order of the quadrature is doubled until the
            kernel has converged; for ReLU closed forms are used.

    Raises:
        ValueError: depth is below 1; there are no samples, or some are not finite; the activation is not elementwise.

    Cost: O(n^2 d + H n^2 q) for order q, 64 for softplus or tanh at inputs of norm 1. Source: Du, Lee, Li, Wang, Zhai
    2019 (1811.03804), Definition 5.1.

    Example:
        >>> import torch
        >>> kernel = fully_connected_limit(torch.eye(2), depth=2, activation=torch.nn.ReLU())
        >>> kernel.covariances[1]  # K^(1): 1 and 1 / pi
        tensor([[1.0000, 0.3183],
                [0.3183, 1.0000]], dtype=torch.float64)
    """
    require_depth(depth)
    x, constant = as_rows(inputs), c_sigma(activation)

    def recursion(dual: Dual) -> tuple[Tensor, tuple[Tensor, ...]]:
        layers = [x @ x.T]
        for _ in range(depth - 1):
            layers.append(constant * of_pairs(dual.moment, layers[-1]))
        return constant * layers[-1] * of_pairs(dual.derivative_moment, layers[-1]), tuple(layers)

    return limit_kernel(activation, recursion)


@checked(depth=whole(1), c_res=real(above=0))
def residual_limit(inputs: Tensor, depth: int, activation: Activation, *, c_res: float = 0.5) -> LimitKernel:
    """Compute K^(H) of ``DuResNet`` with H hidden layers.

    Args:
        inputs: (n, d), or images, which are flattened, with any norm (the theorem assumes 1).
        depth: H, at least 1; with one layer there is no skip connection, and the network is the fully connected one.
        activation: as in ``fully_connected_limit``.
        c_res: the constant c_res of the residual branch, between 0 and 1.

    Raises:
        ValueError: as ``fully_connected_limit``, or c_res is outside (0, 1).

    Cost: as for ``fully_connected_limit``. Source: Du, Lee, Li, Wang, Zhai 2019 (1811.03804), Definition 6.1.
    """
    require_depth(depth)
    require_c_res(c_res)
    x, constant, step = as_rows(inputs), c_sigma(activation), c_res / depth

    def recursion(dual: Dual) -> tuple[Tensor, tuple[Tensor, ...]]:
        layers = [x @ x.T]
        mean = constant**0.5 * dual.mean(layers[0].diagonal())
        for h in range(1, depth):
            now = layers[-1]
            moment = of_pairs(dual.moment, now)
            if h == 1:
                layers.append(constant * moment)
                continue
            branch = dual.mean(now.diagonal())
            cross = mean[:, None] * branch[None, :]
            layers.append(now + step * (cross + cross.T) + step**2 * moment)
            mean = mean + step * branch
        scale = constant if depth == 1 else step**2
        return scale * layers[-1] * of_pairs(dual.derivative_moment, layers[-1]), tuple(layers)

    return limit_kernel(activation, recursion)


def of_pairs(moment: Callable[[Tensor, Tensor, Tensor], Tensor], covariance: Tensor) -> Tensor:
    """Return a moment of a ``Dual`` for all pairs of variables with this covariance matrix."""
    variances = covariance.diagonal()
    return moment(covariance, variances, variances)


def require_depth(depth: int) -> None:
    """Refuse a network without hidden layers.

    Raises:
        ValueError: depth is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth: {depth}; need at least one hidden layer")


def require_c_res(c_res: float) -> None:
    """Refuse a constant of the residual branch that the theorems do not allow.

    Raises:
        ValueError: c_res is outside (0, 1).
    """
    if not 0 < c_res < 1:
        raise ValueError(f"c_res: {c_res}; the residual branch needs a constant between 0 and 1")
