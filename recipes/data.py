"""The base of the data modules of the recipes, and the one that needs no download: the digits of scikit-learn.

`InMemoryDataModule` holds tensors and shuffles (and augments) them in a way that, in epoch e, is a function of (seed,
e) alone, so that an interrupted and an uninterrupted run see the same batches.
"""

import math
from abc import ABC, abstractmethod
from numbers import Integral
from typing import NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from typing_extensions import override

from lightning_conv.arguments import require_type
from lightning_conv.recipes.augmentation import AugmentedSampler, RandomCrops
from lightning_conv.recipes.sizes import misconfigured, require_share, require_size


class Splits(NamedTuple):
    """Training and test samples of a data module, and the number of classes of the whole data set."""

    train: TensorDataset
    test: TensorDataset
    num_classes: int


def stratified_split(labels: Tensor, test_fraction: float, seed: int, n_train: int | None) -> tuple[Tensor, Tensor]:
    """Divide samples into a test split and training samples, each with the share of every class.

    Args:
        labels: Class numbers, (n,).
        test_fraction: Share of the test split, rounded up.
        seed: Of the order.
        n_train: Number of training samples; None: all that are left.

    Returns:
        The numbers of the test samples, and of the training samples.

    Raises:
        MisconfigurationException: Fewer training samples are left than asked for.
    """
    order = stratified_order(labels, seed)
    n_test = math.ceil(test_fraction * len(labels))
    test, train = order[:n_test], order[n_test:]
    if n_train is not None and n_train > len(train):
        raise MisconfigurationException(
            f"n_train: {len(train)} training samples are left beside the test split, got {n_train}"
        )
    return test, train[:n_train]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return a random order of the samples in which every prefix holds the classes in nearly their shares.

    The r-th of the n_c samples of class c (in an order drawn from `seed`) gets the key (r + 1/2) / n_c; sorting by the
    key spreads each class evenly over the whole order. The global random state is left alone.

    Args:
        labels: class of each sample, shape (n,).
        seed: seed of the order within each class.

    Returns:
        A permutation of 0, ..., n - 1, shape (n,).
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    key = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(shuffled):
        members = shuffled == label
        count = int(members.sum())
        key[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return order[key.argsort(stable=True)]


class InMemoryDataModule(LightningDataModule, ABC):
    """Serves two tensor data sets; a subclass reads them in `read`.

    The test split is also the validation split: these recipes tune nothing on it, they watch it. Whoever selects a
    model by `val_acc` must hold out a further split.

    Shuffling is `DistributedSampler`'s, also on a single device: its order in epoch e depends on (seed, e) and on
    nothing else, it takes no number from the global random state, and Lightning calls its `set_epoch`. Outside a
    trainer every pass has the order of epoch 0 until `loader.sampler.set_epoch(e)` is called.

    Args:
        batch_size: samples per batch and process.
        seed: seed of the split, of the subset, of the shuffling and of the augmentation.
        normalize: subtract the mean and divide by the standard deviation of each channel over the training split, in
            both splits; without it the inputs lie in [0, 1].
        augment: shift training images at random by up to an eighth of their smaller side, and mirror them where
            `mirrored` is true, so that the class stays the same. The inputs are then no fixed set: a rank certificate
            is about one draw of them.

    Raises:
        MisconfigurationException: if `batch_size` is not positive.
    """

    def __init__(self, batch_size: int, seed: int, normalize: bool = False, augment: bool = False) -> None:
        super().__init__()
        with misconfigured():
            require_type("batch_size", batch_size, Integral, "a whole number of at least 1")
        if batch_size < 1:
            raise MisconfigurationException(f"batch_size: must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.normalize = normalize
        self.augment = augment
        self._splits: Splits | None = None
        self._training: Dataset[tuple[Tensor, ...]] | None = None

    @abstractmethod
    def read(self) -> Splits:
        """Read both splits into memory: inputs float32 in [0, 1] of shape (n, channels, height, width)."""

    @abstractmethod
    def count_train(self) -> int:
        """Return the number of training samples before a subset is taken; the images are not read."""

    @property
    def mirrored(self) -> bool:
        """Whether the mirror image of an image belongs to the same class; for characters it does not."""
        return False

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read the data once, whatever the stage."""
        if self._splits is not None:
            return
        train, test, num_classes = self.read()
        channels = train.tensors[0].shape[1]
        mean, std = torch.zeros(channels), torch.ones(channels)
        if self.normalize:
            mean, std = channel_moments(train.tensors[0])
            train, test = (
                TensorDataset((split.tensors[0] - spread(mean)) / spread(std), split.tensors[1])
                for split in (train, test)
            )
        self._splits = Splits(train, test, num_classes)
        self._training = train
        if self.augment:
            images, labels = train.tensors
            padding = max(1, min(images.shape[2:]) // 8)
            # The border that a shift brings in was black before normalization.
            fill = -mean / std
            self._training = RandomCrops(
                images, labels, padding=padding, fill=fill, mirror=self.mirrored, seed=self.seed
            )

    @property
    def splits(self) -> Splits:
        """Both splits without augmentation, normalized if `normalize` is set, and the number of classes.

        Raises:
            MisconfigurationException: `setup` has not run yet.
        """
        if self._splits is None:
            name = type(self).__name__
            raise MisconfigurationException(f"{name}: the data have not been read yet; call `setup()` first")
        return self._splits

    @property
    def n_train(self) -> int:
        """Number of training samples, n."""
        return len(self.splits.train)

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set, also when a subset misses some."""
        return self.splits.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (channels, height, width)."""
        return tuple(self.splits.train.tensors[0].shape[1:])

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled training batches; the last one of an epoch may be smaller."""
        training: Dataset[tuple[Tensor, ...]] = self.splits.train if self._training is None else self._training
        sampler: DistributedSampler[tuple[Tensor, ...]] = (AugmentedSampler if self.augment else DistributedSampler)(
            training,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
            shuffle=True,
            seed=self.seed,
            drop_last=False,
        )
        return self._loader(training, sampler)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test split in its fixed order."""
        return self._loader(self.splits.test)

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test split in its fixed order."""
        return self._loader(self.splits.test)

    def _loader(
        self, dataset: Dataset[tuple[Tensor, ...]], sampler: DistributedSampler[tuple[Tensor, ...]] | None = None
    ) -> DataLoader[tuple[Tensor, ...]]:
        # Without a generator of its own, every iterator of a DataLoader draws its base seed from the global state.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=sampler, generator=generator)


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over all images and pixels; 1 for a channel that is constant.

    Args:
        images: shape (n, channels, height, width).

    Returns:
        Two tensors of shape (channels,).
    """
    exact = images.double()
    mean, std = exact.mean((0, 2, 3)), exact.std((0, 2, 3), correction=0)
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def spread(moment: Tensor) -> Tensor:
    """Return one number per channel in a shape that broadcasts over images."""
    return moment.reshape(1, -1, 1, 1)


class DigitsDataModule(InMemoryDataModule):
    """The 1,797 handwritten digits (8 x 8, 10 classes) that come with scikit-learn; needs no network.

    The split is stratified; the default leaves 1,437 training and 360 test samples.

    Args:
        batch_size: samples per batch and process.
        test_fraction: share of the samples held out, in (0, 1); rounded up to whole samples.
        n_train: size of a seeded subset of the rest, with the classes nearly in their shares; None: all of it.
        seed: seed of the split, of the shuffling and of the augmentation.
        normalize: see `InMemoryDataModule`.
        augment: shift training images at random by up to one pixel each way.

    Raises:
        MisconfigurationException: if `test_fraction` is not in (0, 1), or `n_train` is not positive.
    """

    def __init__(
        self,
        batch_size: int = 64,
        test_fraction: float = 0.2,
        n_train: int | None = None,
        seed: int = 0,
        normalize: bool = False,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, normalize, augment)
        require_share("test_fraction", test_fraction)
        require_size("n_train", n_train)
        self.test_fraction = test_fraction
        self._n_train = n_train
        self.save_hyperparameters()

    @override
    def count_train(self) -> int:
        """Return the number of digits that are not held out."""
        return 1797 - math.ceil(self.test_fraction * 1797)

    @override
    def read(self) -> Splits:
        """Read and split the digits.

        Raises:
            MisconfigurationException: if fewer training samples are left than asked for.
            ModuleNotFoundError: if scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "DigitsDataModule reads the digits that come with scikit-learn, which is not installed; "
                "run: pip install scikit-learn"
            ) from error
        digits = load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
        labels = torch.as_tensor(digits.target, dtype=torch.int64)
        test, train = stratified_split(labels, self.test_fraction, self.seed, self._n_train)
        return Splits(TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]), 10)
