"""The networks of the recipes, as plain `torch.nn` modules."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from lightning_conv.checked import checked, real, whole
from lightning_conv.networks.analytic import make_analytic, softplus
from lightning_conv.networks.wide_layer import widen_head

Arch: TypeAlias = Literal["resnet8", "resnet14", "resnet20", "resnet18"]

STAGES: Mapping[Arch, tuple[Sequence[int], int]] = {
    "resnet8": ((1, 1, 1), 16),
    "resnet14": ((2, 2, 2), 16),
    "resnet20": ((3, 3, 3), 16),
    "resnet18": ((2, 2, 2, 2), 64),
}
"""Residual blocks per stage, and channels of the first one (He et al. 2016, section 4.2 and table 1)."""

SMALLEST_IMAGE = 8
"""Smallest number of pixels along a side: ResNet-18 halves an image three times."""


@checked(in_features=whole(1), num_classes=whole(1), width=whole(1), beta=real(above=0))
def wide_fc(
    in_features: int, num_classes: int, *, width: int, hidden: Sequence[int] = (128,), beta: float = 100.0
) -> nn.Sequential:
    """Build a fully-connected network with a narrow trunk and one wide last hidden layer.

    The architecture is after Theorem 1 of Kawaguchi & Sun, "A Recipe for Global Convergence Guarantee in Deep Neural
    Networks" (AAAI 2021, arXiv 2104.05785): narrow layers at least 2 min(m_x, n) wide (m_x input features, n distinct
    training samples) and a last hidden layer of at least about n units satisfy the expressivity condition. The widths
    are the caller's: see `wide_layer_width`, and 2 * 64 = 128 for the 8 x 8 digits. Where a narrow layer is narrower
    than that, the theorem does not apply, and only the certificate of the trained network decides.

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
    if min(sizes) < 1:
        raise ValueError(f"hidden: every layer needs at least one unit, got {list(hidden)}")
    trunk = nn.Sequential(nn.Flatten())
    for fan_in, fan_out in pairwise(sizes):
        trunk.extend([nn.Linear(fan_in, fan_out), softplus(beta)])
    network = nn.Sequential()
    network.add_module("trunk", trunk)
    network.add_module("head", nn.Linear(width, num_classes))
    return network


@checked(in_channels=whole(1), num_classes=whole(1), width=whole(1), channels=whole(1))
def bn_resnet(
    in_channels: int,
    num_classes: int,
    *,
    width: int,
    arch: Arch = "resnet14",
    channels: int | None = None,
    feature_norm: bool = True,
    beta: float = 100.0,
) -> nn.Sequential:
    """Build a residual network with BatchNorm for small images, real-analytic and with a wide last hidden layer.

    The kind of network for which Kawaguchi & Sun (AAAI 2021, arXiv 2104.05785) check the expressivity condition
    numerically. Their theorem on fully-connected networks does not cover it: that rank [h, 1] = n is for the
    certificate to show.

    torchvision's `BasicBlock`s (convolution, BatchNorm, activation, after He et al. 2016) behind a 3 x 3 convolution
    without max pooling, as is usual for small images; stage k has 2^k times the first one's channels and half the size.
    Then the mean over the pixels, `feature_norm`, a linear layer of `width` units, softplus, and the head. Every ReLU
    is softplus(z) = ln(1 + exp(beta z)) / beta, by `make_analytic`. Parameters have torchvision's names and initial
    values, so that the blocks of `torchvision.models.resnet18` can be loaded into `arch="resnet18"`.

    Args:
        in_channels: channels of the images: 1 for grey, 3 for colour.
        num_classes: number of outputs.
        width: units m_H of the wide last hidden layer; at least n - 1 for n training samples, see `wide_layer_width`.
        arch: `"resnet8"`, `"resnet14"`, `"resnet20"` (three stages from 16 channels) or `"resnet18"` (four from 64).
        channels: channels of the first stage; None: those of `arch`.
        feature_norm: BatchNorm of what enters the wide layer. Pooled activations are positive, so without it the
            hyperplanes of most units have all samples on one side, and those units are nearly linear: sigma_min of [h,
            1] falls and sigma_max, which limits the learning rate, rises.
        beta: sharpness of all softplus.

    Returns:
        The network; its head is `fc.head`, its wide layer `fc.wide`.

    Raises:
        ValueError: if a size or `beta` is not positive, or `arch` is unknown.
    """
    blocks, default = STAGES[arch]
    first = default if channels is None else channels
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, first, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(first), relu=nn.ReLU()
    )
    entering = first
    for stage, count in enumerate(blocks):
        leaving = first << stage
        parts[f"layer{stage + 1}"] = _stage(entering, leaving, 2 if stage else 1, count)
        entering = leaving
    parts |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    if feature_norm:
        parts["feature_norm"] = nn.BatchNorm1d(entering)
    parts["fc"] = nn.Linear(entering, num_classes)
    network = nn.Sequential(parts)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    image = torch.zeros(1, in_channels, SMALLEST_IMAGE, SMALLEST_IMAGE)
    smooth = make_analytic(widen_head(network, width, 1.0, beta=beta), image, beta=beta)
    assert isinstance(smooth.model, nn.Sequential)
    return smooth.model


def _stage(entering: int, leaving: int, stride: int, count: int) -> nn.Sequential:
    """Return blocks of equal size; where the shape changes, the first has a 1 x 1 convolution (option B)."""
    shortcut = None
    if stride != 1 or entering != leaving:
        shortcut = nn.Sequential(nn.Conv2d(entering, leaving, 1, stride, bias=False), nn.BatchNorm2d(leaving))
    rest = (BasicBlock(leaving, leaving) for _ in range(count - 1))
    return nn.Sequential(BasicBlock(entering, leaving, stride, shortcut), *rest)
