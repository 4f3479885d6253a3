"""Measure a `SketchStore`: samples per second, bytes and errors, beside other libraries; write docs/results/sketch.md and sketch.json.

`traker` and `dattri` are measured where the running Python has them, in turn with this library; the page says which were there.
Takes some minutes. `--quick --out FOLDER` is a tiny version that tests the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import mlp
from torch import Tensor, nn

OUT = Path(__file__).parent.parent / "docs" / "results"
COMPARED = 64
"""Samples on which the estimated kernels are compared with the exact one."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the networks and of their training sets."""

    widths: tuple[int, ...] = (784, 512, 512, 10)
    images: int = 2048
    batch: int = 128
    layers: int = 4
    width: int = 128
    length: int = 64
    words: int = 256
    texts: int = 256
    texts_at_once: int = 16
    rounds: int = 5


TINY = Setting(
    widths=(20, 16, 4), images=80, batch=40, layers=1, width=8, length=4, words=11, texts=80, texts_at_once=40, rounds=1
)


class Transformer(nn.Module):
    """A small language model: tables of words and positions, causal attention, and a linear layer over all words."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.words = nn.Embedding(setting.words, setting.width)
        self.places = nn.Parameter(0.02 * torch.randn(1, setting.length, setting.width))
        layer = nn.TransformerEncoderLayer(
            setting.width, 4, 4 * setting.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.trunk = nn.TransformerEncoder(layer, setting.layers, enable_nested_tensor=False)
        self.head = nn.Linear(setting.width, setting.words, bias=False)
        self.register_buffer("mask", torch.full((setting.length, setting.length), -torch.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the next word at each position, (n, T, V)."""
        return self.head(self.trunk(self.words(tokens) + self.places, mask=self.mask))


def next_words(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all positions."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Case:
    """A network with its training set and loss."""

    name: str
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(len(inputs) for inputs, _ in self.batches)

    @property
    def first(self) -> tuple[Tensor, Tensor]:
        """The samples of which kernels are compared."""
        return tuple(torch.cat(each)[:COMPARED] for each in zip(*self.batches, strict=True))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(each.numel() for each in self.model.parameters())


def cases(setting: Setting) -> list[Case]:
    """Return both networks as they are initialised with seed 0, on random samples."""
    torch.manual_seed(0)
    images = torch.randn(setting.images, setting.widths[0])
    labels = torch.randint(0, setting.widths[-1], (setting.images,))
    tokens = torch.randint(0, setting.words, (setting.texts, setting.length + 1))
    network, language = mlp(setting.widths, "relu"), Transformer(setting)
    by_image = list(zip(images.split(setting.batch), labels.split(setting.batch), strict=True))
    at_once = setting.texts_at_once
    by_text = list(zip(tokens[:, :-1].split(at_once), tokens[:, 1:].split(at_once), strict=True))
    return [
        Case("MLP " + "-".join(map(str, setting.widths)), network, by_image, nn.CrossEntropyLoss()),
        Case(
            f"Transformer, {setting.layers} layers of {setting.width}, T = {setting.length}",
            language,
            by_text,
            next_words,
        ),
    ]
