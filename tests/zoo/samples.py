"""Small random data sets and their loaders; each is seeded, so that two runs see the same samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

COUNT = 12
"""Samples of a data set; ``ConvergenceDiagnostics()`` measures all of them."""


def floats(*shape: int, count: int = COUNT, seed: int = 1) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int, high: int = 12, count: int = COUNT, seed: int = 2) -> Tensor:
    """Return ids from 1 on; 0 is left for padding."""
    return torch.randint(1, high, (count, length), generator=torch.Generator().manual_seed(seed))


def labels(classes: int = 3, *shape: int, count: int = COUNT, seed: int = 3) -> Tensor:
    return torch.randint(classes, (count, *shape), generator=torch.Generator().manual_seed(seed))


def padding(length: int, count: int = COUNT) -> Tensor:
    """Return masks: sample i has 2, 3, ... tokens, then zeros."""
    lengths = torch.arange(count) % (length - 1) + 2
    return (torch.arange(length) < lengths[:, None]).long()


def table(*tensors: Tensor, batch_size: int = 4, **options: Any) -> Callable[[], DataLoader[Any]]:
    """Return what makes a loader of tuples, shuffled from the global generator."""
    return lambda: DataLoader(TensorDataset(*tensors), batch_size=batch_size, **({"shuffle": True} | options))


def rows(
    batch_size: int = 4, *, build: Callable[[dict[str, Any]], Any] = dict, collate: Any = None, **fields: Any
) -> Any:
    """Return what makes a loader of rows, dicts unless ``build`` makes something else of them."""
    samples = [build(dict(zip(fields, values, strict=True))) for values in zip(*fields.values(), strict=True)]
    return lambda: DataLoader(samples, batch_size=batch_size, shuffle=True, collate_fn=collate)
