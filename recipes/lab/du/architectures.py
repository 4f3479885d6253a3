"""The deep networks of Du, Lee, Li, Wang, Zhai 2019 by name: their limit kernels, and random draws of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_conv.kernels.infinite import LimitKernel, convolutional_limit, fully_connected_limit, residual_limit
from lightning_conv.networks.activation import Activation
from lightning_conv.networks.analytic import softplus
from lightning_conv.theory import DuConvResNet, DuFC, DuResNet

SOURCE = "Du, Lee, Li, Wang, Zhai 2019 (1811.03804)"
SOFTPLUS = softplus(1.0)


def limit_kernel(name: str, x: Tensor, depth: int, activation: Activation, c_res: float) -> LimitKernel:
    """Return K^(H), the limit at infinite width of the kernel of the last hidden layer's weights.

    Args:
        name: FC, ResNet or ConvResNet.
        x: rows, or images for ConvResNet.
        depth: number H of layers.
        activation: elementwise activation sigma.
        c_res: factor c_res of the residual branches.
    """
    if name == "FC":
        return fully_connected_limit(x, depth, activation)
    limit = residual_limit if name == "ResNet" else convolutional_limit
    return limit(x, depth, activation, c_res=c_res)


def network(
    name: str, inputs: int, width: int, depth: int, activation: Activation, c_res: float, seed: int
) -> DuFC | DuResNet:
    """Return a randomly initialised network whose inputs are rows.

    Args:
        name: FC or ResNet.
        inputs: length of a row.
        width: number m of units per layer.
        depth: number H of layers.
        activation: elementwise activation sigma.
        c_res: factor c_res of the residual branches.
        seed: seed of the weights.
    """
    if name == "FC":
        return DuFC(inputs, width, depth, activation=activation, seed=seed)
    return DuResNet(inputs, width, depth, activation=activation, c_res=c_res, seed=seed)


def convolutional_network(width: int, depth: int, activation: Activation, c_res: float, seed: int) -> DuConvResNet:
    """Return a random ConvResNet of 8 x 8 images of one channel; arguments as in ``network``."""
    return DuConvResNet(1, (8, 8), width, depth, activation=activation, c_res=c_res, seed=seed)


def require_ascending(depths: Sequence[int]) -> None:
    """Refuse depths that do not ascend, or below 2.

    Raises:
        ValueError: the depths do not ascend, or one is below 2.
    """
    if list(depths) != sorted(set(depths)) or depths[0] < 2:
        raise ValueError(f"depths: {list(depths)}; need ascending ones of 2 or more")
