"""Random numbers from Python, NumPy and generators of the user's own: in data sets, collate functions, samplers, forwards."""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from case import Task, case
from samples import table
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset, default_collate

from cases.batches import VALUE, X, Y, mlp
from cases.feeds import Classifier, first


class Augmented(Dataset):
    """Samples with noise from one of the generators, drawn in this process."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index] + 0.1 * torch.tensor(self.draw(6), dtype=torch.float32), Y[index]


def python_noise(count: int) -> list[float]:
    return [random.random() for _ in range(count)]


case(
    "other generators",
    data=lambda: DataLoader(Augmented(python_noise), batch_size=4),
    call=first,
    name="augmented_by_python",
    about="Data augmented from Python's generator",
)(Classifier)
case(
    "other generators",
    data=lambda: DataLoader(Augmented(np.random.rand), batch_size=4),
    call=first,
    name="augmented_by_numpy",
    about="Data augmented from NumPy's global generator",
)(Classifier)


class OwnGenerator(Augmented):
    """A data set with a generator as its attribute."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def draw(self, count: int) -> Any:
        return self.generator.random(count)


case(
    "other generators",
    data=lambda: DataLoader(OwnGenerator(), batch_size=4),
    call=first,
    name="data_set_with_generator",
    about="A data set that draws from a NumPy generator of its own",
)(Classifier)


class Mixup:
    """Mixes each batch with itself, by a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        share = torch.rand((), generator=self.generator)
        return share * x + (1 - share) * x.flip(0), share * F.one_hot(y, 3) + (1 - share) * F.one_hot(y.flip(0), 3)


case(
    "other generators",
    "losses",
    data=lambda: table(X, Y, collate_fn=Mixup())(),
    call=first,
    name="collate_with_generator",
    about="Mixup in the collate function, from a generator of its own",
)(Classifier)


@case("other generators", data=table(X, VALUE), call=lambda m, b: m(b[0]))
class PythonInForward(Task):
    """A forward that skips a layer by chance, from Python's generator, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.skipped, self.head = mlp(6, 8), mlp(8, 8), mlp(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if not self.training or self.draw() < 0.8:
            hidden = hidden + self.skipped(hidden)
        return self.head(hidden)

    def draw(self) -> float:
        return random.random()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


@case("other generators", data=table(X, VALUE), call=lambda m, b: m(b[0]))
class NumpyInForward(PythonInForward):
    """The same from NumPy's global generator."""

    def draw(self) -> float:
        return float(np.random.rand())


case(
    "trainer options",
    "other generators",
    call=first,
    name="batch_sampler",
    about="DataLoader(batch_sampler=...) with a generator of the loader's",
    data=lambda: DataLoader(
        TensorDataset(X, Y),
        batch_sampler=BatchSampler(RandomSampler(X, generator=torch.Generator().manual_seed(1)), 4, False),
    ),
)(Classifier)
