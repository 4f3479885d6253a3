"""Real data in the form that the theorems require: a few samples, unit norm, one number as the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_conv.recipes.data import DigitsDataModule, Splits
from lightning_conv.recipes.torchvision_data import TorchvisionDataModule

Source = Literal["digits", "mnist"]


@dataclass(frozen=True)
class TwoClasses:
    """n samples of two classes."""

    inputs: Tensor  # (n, d), float64, rows of norm 1
    targets: Tensor  # (n,), -1 and 1
    labels: Tensor  # (n,), the numbers of the classes


def splits(source: Source, root: str | Path, *, seed: int = 0) -> Splits:
    """Return images and labels of all classes, for training and testing.

    Args:
        source: the digits of scikit-learn, or MNIST, which must be on disk.
        root: folder of MNIST.
        seed: seed of the split of the digits, and of the order.
    """
    data: DigitsDataModule | TorchvisionDataModule = (
        DigitsDataModule(seed=seed)
        if source == "digits"
        else TorchvisionDataModule(dataset="MNIST", root=str(root), seed=seed)
    )
    data.setup()
    return data.splits


def two_classes(
    n: int, *, classes: tuple[int, int] = (3, 8), source: Source = "digits", root: str | Path = "data", seed: int = 0
) -> TwoClasses:
    """Return n samples of two classes in an order drawn from ``seed``, half of each, with rows scaled to norm 1.

    Args:
        n: number of samples, even.
        classes: the two classes; the targets are -1 for the first and 1 for the second.
        source: the digits of scikit-learn, or MNIST, which must be on disk.
        root: folder of MNIST.
        seed: seed of the order.

    Raises:
        ValueError: n is odd or below 2, or there are not enough samples of a class.
    """
    if n < 2 or n % 2:
        raise ValueError(f"n: {n}; need an even number of samples, 2 or more")
    images, labels = splits(source, root, seed=seed).train.tensors
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in classes:
        found = order[labels[order] == label][: n // 2]
        if len(found) < n // 2:
            raise ValueError(f"n: {n}; {source} has {len(found)} training samples of class {label}, need {n // 2}")
        chosen.append(found)
    index = torch.stack(chosen, 1).flatten()  # the classes take turns, so that a prefix is balanced
    inputs = images[index].double().flatten(1)
    inputs /= inputs.norm(dim=1, keepdim=True)
    targets = torch.where(labels[index] == classes[0], -1.0, 1.0).double()
    return TwoClasses(inputs, targets, labels[index])
