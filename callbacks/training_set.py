"""Walk the whole training set in order, without touching the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_conv.anatomy import Head, features_of
from lightning_conv.callbacks.batch import InputFn, take_inputs, training_samples, transfer
from lightning_conv.evaluation import Inputs, StatelessModule, input_tensors


class TrainingSet:
    """The data set of the run's training loader, batch by batch in its own order, on the module's device.

    Args:
        trainer: of the run.
        input_fn: see ``Probe``.

    Raises:
        MisconfigurationException: the data have no random access.
    """

    def __init__(self, trainer: pl.Trainer, input_fn: InputFn | None = None) -> None:
        self._samples, loader = training_samples(
            trainer, cure="ExpressivityGuard verifies a fixed training set and needs a map-style data set"
        )
        self._trainer, self._input_fn = trainer, input_fn
        self._options: dict[str, Any] = {
            "batch_size": loader.batch_size or 256,
            "shuffle": False,
            "collate_fn": loader.collate_fn,
        }
        self._loader = DataLoader(self._samples, **self._options)
        self.size = len(self._samples)  # type: ignore[arg-type]
        self._sampler, self._steps = loader.sampler, len(loader)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Inputs, Any]]:
        """Walk samples ``start`` to ``stop`` in the data set's order. Global random numbers are put back between batches.

        Args:
            start: first sample.
            stop: the sample after the last; None: all.

        Yields:
            (inputs, whole batch).
        """
        chosen = range(start, self.size if stop is None else stop)
        loader = (
            self._loader if len(chosen) == self.size else DataLoader(Subset(self._samples, chosen), **self._options)
        )
        with isolate_rng():
            iterator = iter(loader)
        while True:
            with isolate_rng():
                batch = next(iterator, None)
                if batch is None:
                    return
                batch = transfer(self._trainer, batch)
            yield take_inputs(batch, self._input_fn), batch

    def caveats(self) -> list[str]:
        """What makes the objective of the run another than the mean loss over these samples as they are read."""
        found = []
        if not isinstance(self._sampler, (SequentialSampler, RandomSampler, SubsetRandomSampler, DistributedSampler)):
            found.append(f"{type(self._sampler).__name__} may weight samples or leave some out")
        if self._trainer.num_training_batches < self._steps:
            found.append(
                f"only {self._trainer.num_training_batches} of {self._steps} batches are trained on in an epoch"
            )
        if not self._same(0, 0, seeds=(1, 2)):
            found.append("inputs are random when they are read, so the certificate is about one draw of them")
        return found

    def first_inputs(self) -> Inputs:
        """The inputs of the first batch."""
        return next(self.batches())[0]

    def features(self, network: nn.Module, head: Head, dtype: torch.dtype | None = None) -> Tensor:
        """h of all samples, (n, m_H), computed in ``dtype`` (from a copy of the trunk in that type)."""
        return self.feature_rows(network, head, dtype).rows(0, self.size)

    def feature_rows(self, network: nn.Module, head: Head, dtype: torch.dtype | None = None) -> TrunkRows:
        """The same, computed whenever they are asked for."""
        return TrunkRows(self, StatelessModule(network, dtype=dtype), head)

    def same_inputs(self, i: int, j: int) -> bool:
        """Whether samples i and j enter the network as the same tensors, each read anew."""
        return self._same(i, j, seeds=(1, 1))

    def _same(self, i: int, j: int, seeds: tuple[int, int]) -> bool:
        read = []
        for index, seed in zip((i, j), seeds, strict=True):
            with isolate_rng():
                seed_everything(seed, verbose=False)
                batch = transfer(self._trainer, self._loader.collate_fn([self._samples[index]]))
            read.append(input_tensors(take_inputs(batch, self._input_fn)))
        return all(torch.equal(a, b) for a, b in zip(*read, strict=True))


@dataclass(frozen=True)
class TrunkRows:
    """Features of a training set that are computed strip by strip, from a copy of the trunk."""

    data: TrainingSet
    module: StatelessModule
    head: Head

    @property
    def samples(self) -> int:
        """n."""
        return self.data.size

    @property
    def width(self) -> int:
        """m_H."""
        return self.head.width

    def rows(self, start: int, stop: int) -> Tensor:
        """h of some samples."""
        parts = [features_of(self.module, self.head, inputs).cpu() for inputs, _ in self.data.batches(start, stop)]
        return torch.cat(parts)
