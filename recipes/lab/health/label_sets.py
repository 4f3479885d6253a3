"""The data sets of the study of labels, with a network for each, and labels that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_conv.recipes.data import DigitsDataModule, InMemoryDataModule
from lightning_conv.recipes.text_data import TextDataModule
from lightning_conv.recipes.torchvision_data import TorchvisionDataModule

SetName: TypeAlias = Literal["digits", "mnist", "text", "moved_digits"]
Flips: TypeAlias = Literal["random", "confusable", "none", "all"]

WHAT: dict[SetName, str] = {
    "digits": "scikit-learn's digits, 8 x 8; MLP of two hidden layers of 128",
    "mnist": "MNIST; MLP of two hidden layers of 128",
    "text": "pieces of Python's standard library by package, hashed words; MLP of two hidden layers of 128",
    "moved_digits": "the digits at random places of a 14 x 14 canvas, half of them inverted: distances of pixels mean little; CNN of three "
    "convolutions",
}

CANVAS = 14


@dataclass(frozen=True)
class LabelSet:
    """Samples with their true labels.

    Attributes:
        name: Of the data set.
        inputs: The samples.
        labels: Their true labels, (n,); MNIST and the digits have a few of their own that are wrong or open.
        classes: Number of classes.
        network: Makes the network, with weights from the global generator.
        epochs: Passes over the samples after which training ends.
        fold_epochs: The same for a network that is trained without a fold.
    """

    name: SetName
    inputs: Tensor
    labels: Tensor
    classes: int
    network: Callable[[], nn.Sequential]
    epochs: int
    fold_epochs: int


def label_set(name: SetName, samples: int, *, seed: int, root: str) -> LabelSet:
    """Return so many samples of a data set.

    Args:
        name: Of the data set.
        samples: n.
        seed: Of their choice.
        root: Folder of MNIST.

    Raises:
        ValueError: There is no such set.
        FileNotFoundError: MNIST is not there.
    """
    data: InMemoryDataModule
    if name not in get_args(SetName):
        raise ValueError(f"sets: there is no set {name!r}; choose from {', '.join(get_args(SetName))}")
    if name == "mnist":
        data = TorchvisionDataModule("MNIST", root=root, n_train=samples, seed=seed)
    elif name == "text":
        data = TextDataModule(n_train=samples, seed=seed)
    else:
        data = DigitsDataModule(n_train=samples, seed=seed)
    data.setup()
    inputs, labels = data.splits.train.tensors
    if name == "moved_digits":
        return LabelSet(name, moved(inputs, seed), labels, data.num_classes, partial(_cnn, data.num_classes), 64, 48)
    make = partial(_mlp, inputs[0].numel(), data.num_classes)
    return LabelSet(name, inputs, labels, data.num_classes, make, 64, 16)


def moved(images: Tensor, seed: int) -> Tensor:
    """Return each image at a random place of a larger canvas; every other one, by chance, is inverted with its canvas.

    Args:
        images: (n, 1, 8, 8), in [0, 1].
        seed: Of places and inversions.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    canvas = torch.zeros(len(images), 1, CANVAS, CANVAS)
    places = torch.randint(0, CANVAS - height + 1, (len(images), 2), generator=generator)
    for number, (top, left) in enumerate(places.tolist()):
        canvas[number, :, top : top + height, left : left + width] = images[number]
    inverted = torch.randint(0, 2, (len(images), 1, 1, 1), generator=generator) == 1
    return torch.where(inverted, 1 - canvas, canvas)


def with_flips(data: LabelSet, flips: Flips, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return labels of which a share is wrong, and which ones are, (n,).

    Args:
        data: The samples.
        flips: ``"random"``: another class, each with the same probability. ``"confusable"``: the class whose mean input is nearest to that
            of the true one. ``"none"``: no label is wrong. ``"all"``: every label is drawn anew.
        share: Of wrong labels, for the first two.
        seed: Of the draw.
    """
    true, generator = data.labels, torch.Generator().manual_seed(1000 + seed)
    if flips == "none":
        return true, torch.zeros(len(true), dtype=torch.bool)
    if flips == "all":
        drawn = torch.randint(data.classes, true.shape, generator=generator)
        return drawn, drawn != true
    wrong = torch.zeros(len(true), dtype=torch.bool)
    wrong[torch.randperm(len(true), generator=generator)[: round(share * len(true))]] = True
    others = (true + torch.randint(1, data.classes, true.shape, generator=generator)) % data.classes
    if flips == "confusable":
        others = nearest_class(data)[true]
    return torch.where(wrong, others, true), wrong


def nearest_class(data: LabelSet) -> Tensor:
    """Return for each class the one whose mean input is nearest, (classes,)."""
    rows = data.inputs.flatten(1).double()
    means = torch.stack([rows[data.labels == label].mean(0) for label in range(data.classes)])
    return torch.cdist(means, means).fill_diagonal_(torch.inf).argmin(1)


def _mlp(features: int, classes: int, width: int = 128) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def _cnn(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
