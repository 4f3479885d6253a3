"""The networks that the benchmarks measure, built from a plain description, and their random data.

A description is a dictionary such as ``{"network": "mlp", "widths": [784, 1024, 10], "activation": "softplus"}``. It is sent
as JSON to other processes. With the state dict it is all that an implementation in another library needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# Beyond beta z = 40 softplus and the identity agree to the last bit in float64; PyTorch's default switches at 20.
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "softplus": lambda: nn.Softplus(threshold=40.0),
    "relu": nn.ReLU,
}


def mlp(widths: Sequence[int], activation: str = "softplus") -> nn.Sequential:
    """Build a fully-connected network of the given widths, input and output included."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Basic residual block; if the shape changes, a 1 x 1 convolution on the shortcut (He et al. 2016, option B)."""

    def __init__(self, channels_in: int, channels: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = ACTIVATIONS[activation]()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut.append(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels_in, h, w) to (n, channels, h / stride, w / stride)."""
        branch = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(branch + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network with a 3 x 3 stem for small images; stage k has width 2^k times the first and halves the size."""

    def __init__(self, blocks: Sequence[int], width: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = ACTIVATIONS[activation]()
        self.blocks = nn.Sequential()
        channels = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                self.blocks.append(Block(channels, width << stage, stride, activation))
                channels = width << stage
        self.head = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, 3, h, w) to (n, outputs)."""
        return self.head(self.blocks(self.act(self.bn(self.conv(x)))).mean((2, 3)))


def resnet(width: int, depth: int, outputs: int = 10, activation: str = "relu") -> ResNet:
    """Build a ResNet for 32 x 32 images with three stages, depth = 6 k + 2 (He et al. 2016, section 4.2)."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth: {depth}; three stages of k two-layer blocks make 6 k + 2 layers: 8, 14, 20, ...")
    return ResNet([(depth - 2) // 6] * 3, width, outputs, activation)


def resnet18_cifar(outputs: int = 10, width: int = 64, activation: str = "relu") -> ResNet:
    """Build a ResNet-18 with the 3 x 3 stem that is usual for 32 x 32 images (no max-pooling)."""
    return ResNet([2, 2, 2, 2], width, outputs, activation)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with one projection for query, key and value, the attention written out."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (n, t, dim) to (n, t, dim)."""
        n, t, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-1, -2) * (dim // self.heads) ** -0.5, -1)
        x = x + self.proj((weights @ value).transpose(1, 2).reshape(n, t, dim))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class EncoderStack(nn.Module):
    """Transformer encoder on embedded tokens, mean over the tokens, linear head."""

    def __init__(self, layers: int, dim: int, heads: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer(dim, heads, hidden) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (n, t, dim) to (n, outputs)."""
        return self.head(self.norm(self.layers(x)).mean(1))


def vit_stack(layers: int = 12, dim: int = 768, heads: int = 12, hidden: int = 3072, outputs: int = 10) -> EncoderStack:
    """Build an encoder of the shape of ViT-B/16 (Dosovitskiy et al. 2021, table 1); its inputs are 197 embedded tokens."""
    return EncoderStack(layers, dim, heads, hidden, outputs)


class LSTM(nn.Module):
    """One LSTM layer over a sequence, linear head on the last state."""

    def __init__(self, features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(features, hidden, batch_first=True), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences (n, t, features) to (n, outputs)."""
        return self.head(self.lstm(x)[0][:, -1])


def lstm(features: int = 8, hidden: int = 128, outputs: int = 10) -> LSTM:
    """Build an LSTM that reads an 8 x 8 digit row by row."""
    return LSTM(features, hidden, outputs)


BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "resnet": resnet,
    "resnet18_cifar": resnet18_cifar,
    "vit_stack": vit_stack,
    "lstm": lstm,
}


def build(description: Mapping[str, Any]) -> nn.Module:
    """Build the network of a description, in eval mode and with PyTorch's initial weights."""
    options = dict(description)
    return BUILDERS[options.pop("network")](**options).eval()


def sample(description: Mapping[str, Any], shape: Sequence[int], seed: int) -> tuple[nn.Module, Tensor]:
    """Build a network and standard normal inputs of ``shape``; both depend on the seed alone.

    As after some training, BatchNorm gets the statistics of the inputs as running statistics, and a scale and shift other
    than 1 and 0. With the initial statistics (0, 1) it would be the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(description)
    inputs = torch.randn(*shape, generator=generator)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, 0.0, 0.1, generator=generator)
        norm.momentum = None  # the mean over all batches seen
    if norms:
        with torch.no_grad():
            model.train()(inputs)
    return model.eval(), inputs
