"""Walk the whole training set in order, without touching the run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
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
from lightning_conv.callbacks.guard.ranks import Ranks
from lightning_conv.evaluation import Inputs, StatelessModule, input_tensors

T = TypeVar("T")

READ_TWICE = 8
"""Samples that are read twice, to see whether they are random."""


class TrainingSet:
    """The data set of the run's training loader, batch by batch in its own order, on the module's device.

    Args:
        trainer: of the run.
        input_fn: see ``Probe``.
        ranks: the processes that divide a walk among them.

    Raises:
        MisconfigurationException: the data have no random access.
    """

    def __init__(self, trainer: pl.Trainer, input_fn: InputFn | None, ranks: Ranks) -> None:
        self._samples, loader = training_samples(
            trainer, cure="ExpressivityGuard verifies a fixed training set and needs a map-style data set"
        )
        self._trainer, self._input_fn, self.ranks = trainer, input_fn, ranks
        self._options: dict[str, Any] = {
            "batch_size": loader.batch_size or 256,
            "shuffle": False,
            "collate_fn": loader.collate_fn,
        }
        self._loader = DataLoader(self._samples, **self._options)
        self.size = len(self._samples)  # type: ignore[arg-type]
        self._sampler, self._steps, self._drop_last = loader.sampler, len(loader), loader.drop_last

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

    def collect(self, compute: Callable[[Inputs, Any], T], start: int = 0, stop: int | None = None) -> list[T]:
        """``compute(inputs, batch)`` of every batch, in order, on every rank; each computes its share.

        Args:
            compute: gives what can be sent to another process: tensors on the CPU.
            start: first sample.
            stop: the sample after the last; None: all.

        Raises:
            RuntimeError: it went wrong on one of several ranks; raised on all of them.
        """
        mine = self.ranks.share(start, self.size if stop is None else stop)

        def part() -> list[T]:
            if not mine:
                return []
            return [compute(inputs, batch) for inputs, batch in self.batches(mine.start, mine.stop)]

        return [made for parts in self.ranks.gather(part) for made in parts]

    def caveats(self) -> list[str]:
        """What makes the objective of the run another than the mean loss over these samples as they are read."""
        found = []
        sampler = self._sampler
        if isinstance(sampler, DistributedSamplerWrapper):
            sampler = sampler.dataset._sampler  # type: ignore[attr-defined]
        if not isinstance(sampler, (SequentialSampler, RandomSampler, SubsetRandomSampler, DistributedSampler)):
            found.append(f"{type(sampler).__name__} may weight samples or leave some out")
        elif isinstance(sampler, RandomSampler) and sampler.replacement:
            found.append("RandomSampler draws with replacement, so an epoch leaves samples out")
        fixed = isinstance(sampler, SequentialSampler) or (
            isinstance(sampler, DistributedSampler) and not sampler.shuffle
        )
        if fixed and isinstance(self._sampler, DistributedSampler) and self._sampler.total_size != self.size:
            found.append(
                f"the sampler makes {self._sampler.total_size} of {self.size} samples, the same ones in every epoch"
            )
        if fixed and self._drop_last and (left := len(self._sampler) % (self._options["batch_size"])):  # type: ignore[arg-type]
            found.append(f"drop_last leaves out the same {left} samples in every epoch")
        if self._trainer.num_training_batches < self._steps:
            found.append(
                f"only {self._trainer.num_training_batches} of {self._steps} batches are trained on in an epoch"
            )
        if self._trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            found.append("the training data are loaded anew during the run; the certificate is about the first")
        if self.is_random():
            found.append("inputs are random when they are read, so the certificate is about one draw of them")
        return found

    def steps_are_whole(self, accumulated: int) -> bool:
        """Whether every optimizer step sees every sample once: the loader makes as many equal batches as are accumulated."""
        mine, size = len(self._sampler), self._options["batch_size"]  # type: ignore[arg-type]
        equal = mine == size * accumulated or (accumulated == 1 and mine <= size and not self._drop_last)
        return equal and mine * self.ranks.world == self.size and self._trainer.num_training_batches == self._steps

    @property
    def smallest_batch(self) -> int:
        """Samples in the smallest batch of an epoch, of all ranks together."""
        size = self._options["batch_size"]
        left: int = len(self._sampler) % size  # type: ignore[arg-type]
        mine: int = size if self._drop_last or not left else left
        return min(mine * self.ranks.world, self.size)

    def is_random(self) -> bool:
        """Whether one of a few samples enters the network as other tensors when it is read again."""
        chosen = {self.size * k // READ_TWICE for k in range(READ_TWICE)}
        return not all(self._same(index, index, seeds=(1, 2)) for index in chosen)

    def first_inputs(self) -> Inputs:
        """The inputs of the first batch."""
        return next(self.batches())[0]

    def features(
        self, network: nn.Module, layer: Head, dtype: torch.dtype | None = None, *, stop: bool = False
    ) -> Tensor:
        """What enters ``layer`` for all samples, (n, m), computed in ``dtype`` from a copy of the network in that type.

        Args:
            network: that takes the inputs.
            layer: of the network.
            dtype: of the copy.
            stop: end the forward there, see ``features_of``.
        """
        return self.feature_rows(network, layer, dtype, stop=stop).rows(0, self.size)

    def feature_rows(
        self, network: nn.Module, layer: Head, dtype: torch.dtype | None = None, *, stop: bool = False
    ) -> TrunkRows:
        """The same, computed whenever they are asked for, by all ranks together."""
        return TrunkRows(self, StatelessModule(network, dtype=dtype), layer, stop)

    def same_inputs(self, i: int, j: int) -> bool:
        """Whether samples i and j enter the network as the same tensors, each read anew."""
        return self._same(i, j, seeds=(1, 1))

    def _same(self, i: int, j: int, seeds: tuple[int, int]) -> bool:
        read = []
        for index, seed in zip((i, j), seeds, strict=True):
            with isolate_rng():
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - what a data set draws from is the global generator
                torch.manual_seed(seed)
                batch = transfer(self._trainer, self._loader.collate_fn([self._samples[index]]))
            read.append(input_tensors(take_inputs(batch, self._input_fn)))
        return all(torch.equal(a, b) for a, b in zip(*read, strict=True))


@dataclass(frozen=True)
class TrunkRows:
    """Features of a training set that are computed strip by strip, from a copy of the trunk, by all ranks together."""

    data: TrainingSet
    module: StatelessModule
    layer: Head
    stop: bool = False  # end the forward at the layer, which is known to be called once

    @property
    def samples(self) -> int:
        """n."""
        return self.data.size

    @property
    def width(self) -> int:
        """m_H."""
        return self.layer.width

    def rows(self, start: int, stop: int) -> Tensor:
        """h of some samples."""
        parts = self.data.collect(
            lambda inputs, _: features_of(self.module, self.layer, inputs, stop=self.stop).cpu(),
            start,
            min(stop, self.samples),
        )
        return torch.cat(parts)
