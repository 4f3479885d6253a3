"""A data module over the torchvision classification data sets that already lie on disk."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import convert_image_dtype, pil_to_tensor
from typing_extensions import override

from lightning_conv.recipes.data import InMemoryDataModule, Splits, stratified_order
from lightning_conv.recipes.sizes import require_size
from lightning_conv.recipes.usage import did_you_mean

# The classification sets of equally sized images that fit into memory, each with the constructor argument that chooses
# the split; None: the set is undivided.
SPLIT_ARGUMENT = {
    "CIFAR10": "train",
    "CIFAR100": "train",
    "EuroSAT": None,
    "FashionMNIST": "train",
    "KMNIST": "train",
    "MNIST": "train",
    "SEMEION": None,
    "STL10": "split",
    "SVHN": "split",
    "USPS": "train",
}


# Data sets whose classes do not change in the mirror; those of characters and digits do.
MIRRORED = {"CIFAR10", "CIFAR100", "EuroSAT", "FashionMNIST", "STL10"}


class TorchvisionDataModule(InMemoryDataModule):
    """A torchvision classification data set that already lies on disk; nothing is ever downloaded.

    A set without a test split of its own (EuroSAT, SEMEION) gives a stratified fifth of its samples to the test.

    Args:
        dataset: CIFAR10, CIFAR100, EuroSAT, FashionMNIST, KMNIST, MNIST, SEMEION, STL10, SVHN or USPS.
        root: the folder handed to that class as `root` (for MNIST: the folder that holds `MNIST/raw`).
        n_train: size of a seeded subset of the training split, with nearly the class shares of the whole; None: all of it.
        n_test: size of such a subset of the test split; None: all of it.
        batch_size: samples per batch and process.
        seed: seed of the subsets, of the shuffling and of the augmentation.
        normalize: subtract the mean and divide by the standard deviation of each channel over the training samples.
        augment: shift training images at random by up to an eighth of their side; mirror those of CIFAR, EuroSAT,
            FashionMNIST and STL10.

    Raises:
        MisconfigurationException: if `dataset` is not one of these names, or a size is not positive.
    """

    def __init__(
        self,
        dataset: str = "MNIST",
        root: str = "data",
        n_train: int | None = None,
        n_test: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        normalize: bool = False,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, normalize, augment)
        require_size("n_train", n_train)
        require_size("n_test", n_test)
        if dataset not in SPLIT_ARGUMENT:
            hint = did_you_mean(dataset, SPLIT_ARGUMENT, most=3, cutoff=0.5) or ";"
            raise MisconfigurationException(
                f"dataset: {dataset!r} is not one of the supported torchvision data sets{hint} "
                f"choose one of: {', '.join(SPLIT_ARGUMENT)}"
            )
        self.dataset = dataset
        self.root = root
        self._sizes = (n_train, n_test)
        self.save_hyperparameters()

    @property
    @override
    def mirrored(self) -> bool:
        """Whether the mirror image of an image belongs to the same class."""
        return self.dataset in MIRRORED

    @override
    def count_train(self) -> int:
        """Return the number of samples of the training split.

        Raises:
            FileNotFoundError: if the data set is not in `root`.
        """
        count = len(self._open(train=True))
        return count - self._held_out(count)

    def _held_out(self, count: int) -> int:
        """Return the number of training samples that serve as the test split; 0 if the data set has its own."""
        return math.ceil(0.2 * count) if SPLIT_ARGUMENT[self.dataset] is None else 0

    @override
    def read(self) -> Splits:
        """Read both splits, or the asked part of them.

        Raises:
            FileNotFoundError: if the data set is not in `root`.
            MisconfigurationException: if a split is smaller than asked.
        """
        train = self._open(train=True)
        train_labels = _labels(train)
        train_order = stratified_order(train_labels, self.seed)
        if SPLIT_ARGUMENT[self.dataset] is None:
            cut = self._held_out(len(train_order))
            test, test_labels, test_order, train_order = train, train_labels, train_order[:cut], train_order[cut:]
        else:
            test = self._open(train=False)
            test_labels = _labels(test)
            test_order = stratified_order(test_labels, self.seed)
        return Splits(
            self._tensors(train, train_order, self._sizes[0], "n_train"),
            self._tensors(test, test_order, self._sizes[1], "n_test"),
            int(max(train_labels.max(), test_labels.max())) + 1,
        )

    def _open(self, train: bool) -> Any:
        """Open one split (or the undivided data set) without downloading."""
        choice: dict[str, Any] = {}
        match SPLIT_ARGUMENT[self.dataset]:
            case "train":
                choice["train"] = train
            case "split":
                choice["split"] = "train" if train else "test"
        try:
            # SEMEION downloads unless told not to.
            return getattr(datasets, self.dataset)(self.root, **choice, transform=pil_to_tensor, download=False)
        except (RuntimeError, OSError) as error:
            arguments = ", ".join([repr(self.root), *(f"{name}={value!r}" for name, value in choice.items())])
            raise FileNotFoundError(
                f"root: looked for {self.dataset} in {Path(self.root).resolve()} and did not find it ({error}). "
                f"Nothing is downloaded here: name the folder that has it, or fetch it once by: python -c "
                f'"from torchvision.datasets import {self.dataset}; {self.dataset}({arguments}, download=True)"'
            ) from error

    def _tensors(self, split: Any, order: Tensor, size: int | None, name: str) -> TensorDataset:
        """Read the first `size` samples of a stratified order into tensors, in the order in which they are stored."""
        if size is not None and size > len(order):
            raise MisconfigurationException(f"{name}: {self.dataset} has {len(order)} samples there, got {size}")
        samples = [split[index] for index in order[:size].sort().values.tolist()]
        images = convert_image_dtype(torch.stack([image for image, _ in samples]), torch.float32)
        return TensorDataset(images, torch.tensor([int(label) for _, label in samples]))


def _labels(split: Any) -> Tensor:
    """Return the class of each sample, shape (n,), from the list that the data set keeps; no image is decoded."""
    return torch.as_tensor(getattr(split, "targets", getattr(split, "labels", None))).to(torch.int64)
