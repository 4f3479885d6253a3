r"""Limit kernel K^(H) of the convolutional residual network of Du, Lee, Li, Wang, Zhai.

The network has p positions and patches phi(x)_s of k x k positions around s, with zeros outside the image. Its layers
are x^(1)_s = sqrt(c_sigma / m) sigma(W^(1) phi(x)_s) and x^(h)_s = x^(h-1)_s + (c_res / (H sqrt m)) sigma(W^(h)
phi(x^(h-1))_s). With S^(h) the covariances of features at two positions, and K^(h) those of pre-activations,

.. math::
    S^{(h)}_{ij,st} = \langle x^{(h)}_{i,s}, x^{(h)}_{j,t} \rangle, \qquad
    K^{(h)}_{ij,lr} = \sum_{o} S^{(h)}_{ij, l+o, r+o},

where the sum is over the offsets o of a patch (the trace over D_l, D_r), the recursion is

.. math::
    S^{(1)} &= c_\sigma E_{K^{(0)}}[\sigma(u) \sigma(v)], \\
    S^{(h)}_{ij,st} &= S^{(h-1)}_{ij,st} + \frac{c_{res}}{H} \bigl( b_{i,s} E\sigma(v_t) + b_{j,t} E\sigma(u_s) \bigr)
    + \frac{c_{res}^2}{H^2} E_{K^{(h-1)}}[\sigma(u_s)\sigma(v_t)], \\
    K^{(H)}_{ij} &= \frac{c_{res}^2}{H^2} \sum_s K^{(H-1)}_{ij,ss} E_{K^{(H-1)}}[\sigma'(u_s) \sigma'(v_s)].

The skip connection adds the features S, and the expectation is over their patches K. Definition 7.1 of the paper writes
K for both, and omits the patches of the second layer and the factor of the last line. Finite networks tend to the
kernel that is given here, as `lightning-conv lab du` shows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_conv.checked import checked, real, whole
from lightning_conv.kernels.infinite.limit import Dual, LimitKernel, c_sigma, limit_kernel
from lightning_conv.kernels.infinite.recursions import of_pairs, require_c_res, require_depth
from lightning_conv.linalg.rounding import require_moderate
from lightning_conv.networks.activation import Activation


@checked(depth=whole(1), kernel_size=whole(1), c_res=real(above=0))
def convolutional_limit(
    images: Tensor, depth: int, activation: Activation, *, kernel_size: int = 3, c_res: float = 0.5
) -> LimitKernel:
    """Compute K^(H) of ``DuConvResNet`` with H hidden layers, stride 1 and zero padding.

    Args:
        images: (n, channels, height, width) with any norm (the theorem assumes a Frobenius norm of 1).
        depth: H, at least 1.
        activation: as in ``fully_connected_limit``.
        kernel_size: k, odd.
        c_res: the constant c_res of the residual branch, between 0 and 1.

    Returns:
        K^(H), (n, n), with the covariances between all pairs of positions, (n p, n p).

    Raises:
        ValueError: there are no images, or some are not finite; the kernel size is even; depth is below 1; c_res is
            outside (0, 1).

    Cost: O((n p)^2 ((H - 1) (k^2 + q) + k^2 d) + n^2 p q) for order q, which is 512 for softplus, and about (4 H + 3)
    (n p)^2 numbers: 8 seconds and 300 MB for 32 images of 8 x 8 at H = 2. Source: Du, Lee, Li, Wang, Zhai 2019
    (1811.03804), Definition 7.1.
    """
    require_depth(depth)
    require_c_res(c_res)
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images: shape {tuple(images.shape)}; need (n, channels, height, width)")
    if not bool(images.isfinite().all()):
        raise ValueError("images: contain NaN or infinity; clean the samples")
    require_moderate(images.double(), "images")
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
        # The last line needs pairs at equal positions only, so matrices of (n, n) instead of (n p, n p).
        last = layers[-1].view(n, positions, n, positions)
        total = torch.zeros(n, n, dtype=first.dtype, device=first.device)
        for s in range(positions):
            own = last[:, s, :, s].contiguous()
            total += own * of_pairs(dual.derivative_moment, own)
        return (constant if depth == 1 else step**2) * total, tuple(layers)

    return limit_kernel(activation, recursion)


def patch_positions(height: int, width: int, kernel_size: int) -> Tensor:
    """Return the positions in the patch around each position, (p, k^2), where index p stands for the zeros outside.

    Raises:
        ValueError: the kernel size is even.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: {kernel_size}; need an odd number, so that a patch has a centre")
    outside = height * width
    index = torch.arange(outside).view(height, width)
    half = kernel_size // 2
    padded = functional.pad(index, (half, half, half, half), value=outside)
    return padded.unfold(0, kernel_size, 1).unfold(1, kernel_size, 1).reshape(outside, -1)


def _patched(features: Tensor, neighbours: Tensor) -> Tensor:
    """Return K from S: the sums over the offsets of a patch."""
    positions, offsets = neighbours.shape
    n = len(features) // positions
    # A row and a column of zeros for the positions outside.
    padded = functional.pad(features.view(n, positions, n, positions), (0, 1, 0, 0, 0, 1))
    total = torch.zeros(n, positions, n, positions, dtype=features.dtype, device=features.device)
    for o in range(offsets):
        at = neighbours[:, o].to(features.device)
        total += padded[:, at][..., at]
    return total.view(n * positions, n * positions)
