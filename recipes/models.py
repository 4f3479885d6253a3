"""The networks of the recipes, as plain `torch.nn` modules."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from lightning_conv.analytic import softplus


def wide_fc(
    in_features: int, num_classes: int, *, width: int, hidden: Sequence[int] = (128,), beta: float = 100.0
) -> nn.Sequential:
    """Build a fully-connected network with a narrow trunk and one wide last hidden layer.

    The architecture is after Theorem 1 of Kawaguchi & Sun, "A Recipe for Global Convergence Guarantee in Deep Neural
    Networks" (AAAI 2021, arXiv 2104.05785): narrow layers at least 2 min(m_x, n) wide (m_x input features, n distinct
    training samples) and a last hidden layer of at least about n units satisfy the expressivity condition. The widths
    are the caller's: see `wide_layer_width`, and 2 * 64 = 128 for the 8 x 8 digits. Where a narrow layer is narrower
    than that, the theorem is silent and only the certificate of the trained network tells.

    The activation is softplus(z) = ln(1 + exp(beta z)) / beta: real analytic, as the theory asks, and at beta = 100
    within ln(2) / beta = 0.007 of ReLU.

    The linear layers keep PyTorch's own initialisation on purpose: the curvature of the last-layer problem, at most
    sigma_max([h, 1])^2 / (2 n) for softmax cross-entropy, stays several times smaller than after Kaiming's, so that one
    learning rate serves the whole network and then the last layer alone.

    Args:
        in_features: number m_x of input features after flattening.
        num_classes: number of outputs.
        width: units m_H of the last hidden layer.
        hidden: units of the narrow layers before it, in order; may be empty.
        beta: sharpness of the softplus.

    Returns:
        `trunk` (flatten, then linear and softplus layers) followed by `head` (one linear layer).

    Raises:
        ValueError: if a size or `beta` is not positive.
    """
    sizes = [in_features, *hidden, width]
    for name, value in {"in_features": in_features, "num_classes": num_classes, "width": width, "beta": beta}.items():
        if value <= 0:
            raise ValueError(f"{name}: must be positive, got {value}")
    if min(sizes) < 1:
        raise ValueError(f"hidden: every layer needs at least one unit, got {list(hidden)}")
    trunk = nn.Sequential(nn.Flatten())
    for fan_in, fan_out in pairwise(sizes):
        trunk.extend([nn.Linear(fan_in, fan_out), softplus(beta)])
    network = nn.Sequential()
    network.add_module("trunk", trunk)
    network.add_module("head", nn.Linear(width, num_classes))
    return network
