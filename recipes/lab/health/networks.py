"""The networks, the data and the LightningModule of the gallery: small ones, so that a run takes a second or two."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_conv.recipes.data import DigitsDataModule
from lightning_conv.recipes.models import bn_resnet

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Groups: TypeAlias = Callable[[nn.Module], Iterable[Any]]

CLASSES = 10
CHARACTERS = "0123456789+="
CONTEXT = 7
"""Characters that the small GPT sees at once."""


class GalleryModule(pl.LightningModule):
    """A network, a loss and an optimizer.

    Args:
        net: The network.
        loss: Function of (outputs, targets).
        optimizer: Class of the optimizer.
        groups: What the optimizer gets of the network; None: all parameters that require gradients.
        options: Settings of the optimizer.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        optimizer: type[torch.optim.Optimizer],
        *,
        groups: Groups | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer, self.groups, self.options = net, loss, optimizer, groups, options

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the network."""
        outputs: Tensor = self.net(x)
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the batch."""
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the run."""
        trained = [each for each in self.net.parameters() if each.requires_grad]
        return self.optimizer(trained if self.groups is None else self.groups(self.net), **self.options)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    data = DigitsDataModule(seed=0)
    data.setup()
    images, labels = data.splits.train.tensors
    return images, labels


def digits(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images of digits as rows of 64 numbers in [0, 1], and their labels.

    Args:
        samples: Number of samples.
        seed: Seed of the choice.
    """
    images, labels = _digits()
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:samples]
    return images[chosen].flatten(1), labels[chosen]


def one_hot(labels: Tensor) -> Tensor:
    """Return the targets of squared loss."""
    return F.one_hot(labels, CLASSES).float()


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Build a perceptron for digits in torch's own initialisation.

    Args:
        widths: Units of the hidden layers.
        activation: After every hidden layer.
    """
    sizes = [64, *widths]
    layers: list[nn.Module] = []
    for entering, leaving in pairwise(sizes):
        layers += [nn.Linear(entering, leaving), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], CLASSES))


def resnet() -> nn.Module:
    """Build a residual network with BatchNorm for images of 8 x 8 pixels."""
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), bn_resnet(1, CLASSES, arch="resnet8", width=32, channels=4))


class Detached(nn.Module):
    """A perceptron whose first layer is cut from the graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        hidden = torch.relu(self.first(x)).detach()
        outputs: Tensor = self.head(torch.relu(self.second(hidden)))
        return outputs


class SmallGPT(nn.Module):
    """A causal transformer of one or more blocks on characters."""

    def __init__(self, vocabulary: int = len(CHARACTERS), width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(CONTEXT, width) * 0.1)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at every place, (n, T, V)."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=self.positions.dtype)
        logits: Tensor = self.head(
            self.norm(self.blocks(self.tokens(tokens) + self.positions, mask=mask, is_causal=True))
        )
        return logits


def additions(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return sums such as ``12+34=46`` as numbers of their characters, and the same moved on by one.

    Args:
        samples: Number of sums.
        seed: Seed of the summands.
    """
    first, second = torch.randint(10, 50, (2, samples), generator=torch.Generator().manual_seed(seed)).tolist()
    words = [f"{a}+{b}={a + b}" for a, b in zip(first, second, strict=True)]
    tokens = torch.tensor([[CHARACTERS.index(each) for each in word] for word in words])
    return tokens[:, :-1], tokens[:, 1:]
