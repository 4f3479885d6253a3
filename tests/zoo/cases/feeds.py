"""How samples come: iterable data, several loaders, DataModules."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from samples import floats, table
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
)

from cases.batches import X, Y, mlp


class Classifier(Task):
    """A small classifier on (x, y)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Stream(IterableDataset):
    """The samples one after the other, in an order drawn anew."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(X[i], Y[i]) for i in torch.randperm(len(X)).tolist()])


class Batches(IterableDataset):
    """Whole batches, drawn when asked for."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(3):
            x = torch.randn(4, 6)
            yield {"x": x, "y": x.sum(1, keepdim=True)}


def first(module: Any, batch: Any) -> Tensor:
    return module(batch[0])


case(
    "iterable and combined loaders",
    data=lambda: DataLoader(Stream(), batch_size=4),
    call=first,
    name="iterable",
    about="An iterable data set of samples",
)(Classifier)


@case(
    "iterable and combined loaders",
    "dict batches",
    data=lambda: DataLoader(Batches(), batch_size=None),
    call=lambda m, b: m.net(b["x"]),
)
class IterableOfBatches(Task):
    """An iterable data set of whole batches, drawn from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch["x"]), batch["y"])


def two_loaders() -> dict[str, Any]:
    return {"labelled": table(X, Y)(), "unlabelled": table(floats(6, seed=16), batch_size=2)()}


def labelled(module: Any, batch: Any) -> Tensor:
    return module(batch["labelled"][0])


class SemiSupervised(Classifier):
    """Two loaders at once: a supervised loss and an entropy penalty, each from a call of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["labelled"]
        (other,) = batch["unlabelled"]
        shares = self(other).softmax(1)
        return F.cross_entropy(self(x), y) - 0.1 * (shares * shares.log()).sum(1).mean()


case(
    "iterable and combined loaders",
    "several calls",
    "nested batches",
    data=two_loaders,
    call=labelled,
    name="dict_of_loaders",
    about="A dict of loaders with batches of different sizes",
)(SemiSupervised)
case(
    "iterable and combined loaders",
    "several calls",
    "nested batches",
    data=lambda: CombinedLoader(two_loaders(), "min_size"),
    call=labelled,
    name="combined_loader",
    about="CombinedLoader in the mode min_size",
)(SemiSupervised)


@case(
    "iterable and combined loaders",
    "nested batches",
    call=lambda m, b: m(b[0][0]),
    data=lambda: CombinedLoader([table(X, Y)(), table(floats(6, seed=17), batch_size=6)()], "max_size_cycle"),
)
class ListOfLoaders(Classifier):
    """A list of loaders, the shorter one again and again; the second one's samples are added to the loss as a mean."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (other,) = batch
        return F.cross_entropy(self(x), y) + 0.0 * other.mean()


class Data(LightningDataModule):
    """Samples standardised in setup and once more after the transfer."""

    def setup(self, stage: str) -> None:
        self.train = TensorDataset((X - X.mean(0)) / X.std(0), Y)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=4, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=6)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].clamp(-1, 1), batch[1]


@case("iterable and combined loaders", data=table(X, Y), call=lambda m, b: m.net(b[0]))
class FetchesItself(Task):
    """A step that fetches its batches from the loader's iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 3)

    def training_step(self, dataloader_iter: Any) -> Tensor:
        (x, y), _, _ = next(dataloader_iter)
        return F.cross_entropy(self.net(x), y)


@case("trainer options", "iterable and combined loaders", data=Data, call=first)
class FromDataModule(Classifier):
    """A LightningDataModule with a transfer hook, and a validation loop."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))
