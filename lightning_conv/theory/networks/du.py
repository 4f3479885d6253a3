"""The deep networks of Du, Lee, Li, Wang, Zhai 2019 (1811.03804), section 3: ``DuFC``, ``DuResNet``, ``DuConvResNet``.

Every weight is drawn from N(0, 1), and the scale is part of the forward pass. There are no biases, and the output u is
one number per sample. The loss of the paper is S = 1/2 sum (u - y)^2, and gradient descent trains all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_conv.checked import SEED, checked, real, whole
from lightning_conv.kernels.infinite import c_sigma
from lightning_conv.kernels.infinite.recursions import require_c_res, require_depth
from lightning_conv.networks.activation import Activation
from lightning_conv.networks.analytic import softplus
from lightning_conv.theory.networks.initialisation import undrawn


class DuNetwork(nn.Module):
    """Base of the three networks: hidden layers, each with its scale, and the output layer a.

    Attributes:
        hidden: The layers W^(1), ..., W^(H).
        output: The output layer a.
        c_sigma: 1 / E sigma(z)^2 for z ~ N(0, 1).
        c_res: Scale of the residual branches; None for the fully connected network.
    """

    def __init__(
        self,
        hidden: Sequence[nn.Module],
        outputs: int,
        width: int,
        activation: Activation | None,
        c_res: float | None,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        require_depth(len(hidden))
        if c_res is not None:
            require_c_res(c_res)
        self.hidden = nn.ModuleList(hidden)
        self.output = undrawn(nn.Linear, outputs, 1, bias=False)
        self.to(dtype)
        self.activation: Activation = softplus(1.0) if activation is None else activation
        self.width, self.c_res, self.c_sigma = width, c_res, c_sigma(self.activation)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))

    @property
    def depth(self) -> int:
        """H, the number of hidden layers."""
        return len(self.hidden)

    def scale(self, layer: int) -> float:
        """Return the factor of sigma(W^(h) x): sqrt(c_sigma / m), or c_res / (H sqrt m) in a residual branch.

        Args:
            layer: Number h of the layer, from 1 to H.
        """
        if self.c_res is None or layer == 1:
            return math.sqrt(self.c_sigma / self.width)
        return self.c_res / (self.depth * math.sqrt(self.width))

    def states(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Compute (features x^(0), ..., x^(H); pre-activations z^(h) = W^(h) x^(h-1), h = 1, ..., H)."""
        features, pre_activations = [x], []
        for h, layer in enumerate(self.hidden, start=1):
            pre_activations.append(layer(features[-1]))
            branch = self.scale(h) * self.activation(pre_activations[-1])
            features.append(branch if self.c_res is None or h == 1 else features[-1] + branch)
        return features, pre_activations

    def forward(self, x: Tensor) -> Tensor:
        """Return u, one number per sample, (n,)."""
        result: Tensor = self.output(self.states(x)[0][-1].flatten(1)).squeeze(-1)
        return result


class DuFC(DuNetwork):
    """The fully connected network, eq. (2): x^(h) = sqrt(c_sigma / m) sigma(W^(h) x^(h-1)), u = a^T x^(H).

    Args:
        inputs: Length d of a sample.
        width: Width m of every hidden layer.
        depth: Number H of hidden layers.
        activation: The elementwise function sigma; None: softplus, the paper's example. The theorems ask for a smooth
            one.
        seed: Seed of the weights.
        dtype: Type of the weights. They are drawn in float64 and then rounded to it.

    Raises:
        ValueError: The depth is below 1.

    Example:
        >>> DuFC(inputs=4, width=16, depth=2)(torch.ones(3, 4, dtype=torch.float64)).shape
        torch.Size([3])
    """

    @checked(inputs=whole(1), width=whole(1), depth=whole(1), seed=SEED)
    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        *,
        activation: Activation | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(_linear(inputs, width, depth), width, width, activation, None, seed, dtype)


class DuResNet(DuNetwork):
    """The residual network, eq. (3): x^(h) = x^(h-1) + c_res sigma(W^(h) x^(h-1)) / (H sqrt m) for h > 1.

    x^(1) is that of ``DuFC``.

    Args:
        inputs: Length d of a sample.
        width: Width m of every hidden layer.
        depth: Number H of hidden layers; with H = 1 the network is ``DuFC``.
        activation: See ``DuFC``.
        c_res: Scale of the residual branches, between 0 and 1.
        seed: Seed of the weights.
        dtype: Type of the weights. They are drawn in float64 and then rounded to it.

    Raises:
        ValueError: The depth is below 1, or c_res lies outside (0, 1).
    """

    @checked(inputs=whole(1), width=whole(1), depth=whole(1), c_res=real(above=0), seed=SEED)
    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        *,
        activation: Activation | None = None,
        c_res: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(_linear(inputs, width, depth), width, width, activation, c_res, seed, dtype)


class DuConvResNet(DuNetwork):
    """The convolutional residual network, section 3.3: ``DuResNet`` applied to patches, with u = <a, x^(H)>.

    The output layer a has one number per channel and position. A patch is the k x k neighbourhood of a position, with
    zeros outside the image. The patches phi(x) of an image x obey |x|_F <= |phi(x)|_F <= k |x|_F.

    Args:
        channels: Number d_0 of channels of an image.
        image_size: Height and width of an image; p = height * width positions.
        width: Number m of channels of every hidden layer.
        depth: Number H of hidden layers.
        kernel_size: Side k of a patch, odd.
        activation: See ``DuFC``.
        c_res: Scale of the residual branches, between 0 and 1.
        seed: Seed of the weights.
        dtype: Type of the weights. They are drawn in float64 and then rounded to it.

    Raises:
        ValueError: The depth is below 1, c_res lies outside (0, 1), or the kernel size is even.

    Example:
        >>> DuConvResNet(channels=1, image_size=(8, 8), width=16, depth=2)(torch.ones(3, 1, 8, 8, dtype=torch.float64)).shape
        torch.Size([3])
    """

    kernel_size: int

    @checked(channels=whole(1), width=whole(1), depth=whole(1), kernel_size=whole(1), c_res=real(above=0), seed=SEED)
    def __init__(
        self,
        channels: int,
        image_size: tuple[int, int],
        width: int,
        depth: int,
        *,
        kernel_size: int = 3,
        activation: Activation | None = None,
        c_res: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: {kernel_size}; pass an odd number, so that a patch has a centre")
        sizes = [channels] + [width] * depth
        half = kernel_size // 2
        layers = [undrawn(nn.Conv2d, sizes[h], width, kernel_size, padding=half, bias=False) for h in range(depth)]
        super().__init__(layers, width * math.prod(image_size), width, activation, c_res, seed, dtype)
        self.kernel_size = kernel_size


def _linear(inputs: int, width: int, depth: int) -> list[nn.Module]:
    sizes = [inputs] + [width] * depth
    return [undrawn(nn.Linear, sizes[h], width, bias=False) for h in range(depth)]
