"""Kernels H_inf and K^(H) of infinitely wide networks in the parametrisation of Du et al., with error estimates."""

from lightning_conv.kernels.infinite.arc_cosine import ArcCosineDual, h_infinity
from lightning_conv.kernels.infinite.convolution import convolutional_limit
from lightning_conv.kernels.infinite.hermite import HermiteDual
from lightning_conv.kernels.infinite.limit import LimitKernel, c_sigma
from lightning_conv.kernels.infinite.recursions import fully_connected_limit, residual_limit

__all__ = [
    "ArcCosineDual",
    "HermiteDual",
    "LimitKernel",
    "c_sigma",
    "convolutional_limit",
    "fully_connected_limit",
    "h_infinity",
    "residual_limit",
]
