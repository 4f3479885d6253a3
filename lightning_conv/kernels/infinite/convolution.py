r"""Limit kernel K^(H) of the convolutional residual network of Du, Lee, Li, Wang, Zhai.

With p positions, patches phi(x)_s of k x k positions around s (zeros outside the image), x^(1)_s = sqrt(c_sigma / m) sigma(W^(1) phi(x)_s)
and x^(h)_s = x^(h-1)_s + (c_res / (H sqrt m)) sigma(W^(h) phi(x^(h-1))_s), let S^(h) be the covariances of features at two positions,

.. math::
    S^{(h)}_{ij,st} = \langle x^{(h)}_{i,s}, x^{(h)}_{j,t} \rangle, \qquad
    K^{(h)}_{ij,lr} = \sum_{o} S^{(h)}_{ij, l+o, r+o},

the second those of pre-activations, summed over the offsets o of a patch (the trace over D_l, D_r). Then

.. math::
    S^{(1)} &= c_\sigma E_{K^{(0)}}[\sigma(u) \sigma(v)], \\
    S^{(h)}_{ij,st} &= S^{(h-1)}_{ij,st} + \frac{c_{res}}{H} \bigl( b_{i,s} E\sigma(v_t) + b_{j,t} E\sigma(u_s) \bigr)
    + \frac{c_{res}^2}{H^2} E_{K^{(h-1)}}[\sigma(u_s)\sigma(v_t)], \\
    K^{(H)}_{ij} &= \frac{c_{res}^2}{H^2} \sum_s K^{(H-1)}_{ij,ss} E_{K^{(H-1)}}[\sigma'(u_s) \sigma'(v_s)].

The skip connection adds S, the features, and the expectation is over K, their patches. The paper's Definition 7.1 writes K for both
and leaves out the patches of the second layer and the factor of the last line. Networks tend to what is written here (`lightning-conv
lab du`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_conv.kernels.infinite.limit import Dual, LimitKernel, c_sigma, limit_kernel
from lightning_conv.kernels.infinite.recursions import of_pairs, require_c_res, require_depth
from lightning_conv.networks.activation import Activation


def convolutional_limit(
    images: Tensor, depth: int, activation: Activation, *, kernel_size: int = 3, c_res: float = 0.5
) -> LimitKernel:
    """K^(H) of ``DuConvResNet`` with H hidden layers, stride 1 and zeros around the image.

    Args:
        images: (n, channels, height, width), of any norm (the theorem asks for a Frobenius norm of 1).
        depth: H, 1 or more.
        activation: as in ``fully_connected_limit``.
        kernel_size: k, odd.
        c_res: between 0 and 1.

    Returns:
        K^(H), (n, n), with the covariances between all pairs of positions, (n p, n p).

    Raises:
        ValueError: no images, some that are not finite, an even kernel size, depth below 1 or c_res outside (0, 1).

    Cost: O((n p)^2 ((H - 1) (k^2 + q) + k^2 d) + n^2 p q) for order q, which is 512 for softplus, and about (4 H + 3) (n p)^2
    numbers: 8 seconds and 300 MB for 32 images of 8 x 8 at H = 2. Source: Du, Lee, Li, Wang, Zhai 2019 (1811.03804), Definition 7.1.
    """
    require_depth(depth)
    require_c_res(c_res)
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images: shape {tuple(images.shape)}; need (n, channels, height, width)")
    if not bool(images.isfinite().all()):
        raise ValueError("images: hold NaN or infinity")
    neighbours = patch_positions(images.shape[2], images.shape[3], kernel_size)
    n, positions = len(images), len(neighbours)
    constant, step = c_sigma(activation), c_res / depth
    patches = functional.unfold(images.double(), kernel_size, padding=kernel_size // 2)  # (n, k^2 channels, p)
    rows = patches.transpose(1, 2).reshape(n * positions, -1)
    first = rows @ rows.T

    def recursion(dual: Dual) -> tuple[Tensor, tuple[Tensor, ...]]:
        layers = [first]
        if depth > 1:
            features = constant * of_pairs(dual.moment, first)
            mean = constant**0.5 * dual.mean(first.diagonal())
            layers.append(_patched(features, neighbours))
        for _ in range(2, depth):
            now = layers[-1]
            branch = dual.mean(now.diagonal())
            cross = mean[:, None] * branch[None, :]
            features = features + step * (cross + cross.T) + step**2 * of_pairs(dual.moment, now)
            mean = mean + step * branch
            layers.append(_patched(features, neighbours))
        # The last line takes pairs at one position only: (n, n) each, not (n p, n p).
        last = layers[-1].view(n, positions, n, positions)
        total = torch.zeros(n, n, dtype=first.dtype, device=first.device)
        for s in range(positions):
            own = last[:, s, :, s].contiguous()
            total += own * of_pairs(dual.derivative_moment, own)
        return (constant if depth == 1 else step**2) * total, tuple(layers)

    return limit_kernel(activation, recursion)


def patch_positions(height: int, width: int, kernel_size: int) -> Tensor:
    """The positions in the patch of each position, (p, k^2); p itself, one past the last, stands for the zeros outside.

    Raises:
        ValueError: an even kernel size.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: {kernel_size}; need an odd one, so that a patch has a middle")
    outside = height * width
    index = torch.arange(outside).view(height, width)
    half = kernel_size // 2
    padded = functional.pad(index, (half, half, half, half), value=outside)
    return padded.unfold(0, kernel_size, 1).unfold(1, kernel_size, 1).reshape(outside, -1)


def _patched(features: Tensor, neighbours: Tensor) -> Tensor:
    """K from S: sums over the offsets of a patch."""
    positions, offsets = neighbours.shape
    n = len(features) // positions
    # A row and a column of zeros for what lies outside.
    padded = functional.pad(features.view(n, positions, n, positions), (0, 1, 0, 0, 0, 1))
    total = torch.zeros(n, positions, n, positions, dtype=features.dtype, device=features.device)
    for o in range(offsets):
        at = neighbours[:, o].to(features.device)
        total += padded[:, at][..., at]
    return total.view(n * positions, n * positions)
