"""``TrainingSet``: read the whole training set in order, without touching the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_conv.callbacks.run.data.batch import InputFn, take_inputs, transfer
from lightning_conv.callbacks.run.data.data_generators import unmoved
from lightning_conv.callbacks.run.data.readable import why_unreadable
from lightning_conv.callbacks.run.data.sample_keys import parts_of
from lightning_conv.callbacks.run.data.sampling import describe_sampling, training_samples
from lightning_conv.callbacks.run.isolated import isolated, seed_all
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.networks.inputs import Inputs, input_tensors

T = TypeVar("T")

PROBED = 32
"""Number of samples that are read several times to find out whether they are random."""

TOGETHER = 4
"""Number of them, at least, that are collated at once: the collate function may mix a sample with its neighbours."""

FEWEST = 3
"""Number of samples that is needed to tell what of a batch has one row per sample."""

READS = 128
"""Number of reads of single samples, at least: what happens to one sample in fifty is noticed nine times in ten."""

RANDOM_INPUTS = (
    "inputs or targets are random when they are read, or depend on what is collated with them, "
    "so the certificate is about one draw"
)


class TrainingSet:
    """The data set of the run's training loader, batch by batch in its own order, on the module's device.

    Args:
        trainer: of the run.
        input_fn: see ``Probe``.
        ranks: the processes among which a pass over the samples is divided.

    Attributes:
        size: number n of samples.
        sampling: how the run draws them.

    Raises:
        MisconfigurationException: the data have no random access, or only the workers of the loader can read them.
    """

    def __init__(self, trainer: pl.Trainer, input_fn: InputFn | None, ranks: Ranks) -> None:
        self._samples, loader = training_samples(
            trainer,
            hint=f"ExpressivityGuard certifies a fixed training set, which it reads several times: {_line(trainer)}",
        )
        if why := why_unreadable(self._samples, loader):
            raise MisconfigurationException(
                f"ExpressivityGuard reads the training set in the main process, where {type(loader.dataset).__name__} cannot be read "
                f"({why}); pass a data set that does without workers"
            )
        self._trainer, self._input_fn, self.ranks = trainer, input_fn, ranks
        self.size = len(self._samples)  # type: ignore[arg-type]
        self.sampling = describe_sampling(trainer)
        self._options: dict[str, Any] = {
            "batch_size": self.sampling.batch_size,
            "shuffle": False,
            "collate_fn": loader.collate_fn,
        }
        self._loader = DataLoader(self._samples, **self._options)

    def reading(self, input_fn: InputFn | None) -> TrainingSet:
        """Return the same training set with another function that takes the inputs out of a batch.

        Args:
            input_fn: see ``Probe``.
        """
        other = copy.copy(self)
        other._input_fn = input_fn
        return other

    def inputs_in(self, batch: Any) -> Inputs:
        """Return what of a batch enters the network.

        Args:
            batch: as the training step gets it.
        """
        return take_inputs(batch, self._input_fn)

    def few(self, count: int, seed: int = 0) -> tuple[Any, int]:
        """Return a batch of a few samples as the training step gets it, with their number: not more than the run has in a batch.

        Args:
            count: number of samples, at most.
            seed: of the draw of these samples; the data may be sorted by class.
        """
        few = min(count, self.size, max(self.sampling.batch_size, FEWEST))
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).tolist()
        return self.batch_of(order[:few]), few

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Inputs, Any]]:
        """Yield samples ``start`` to ``stop`` in the data set's order.

        The global random number generators are restored after each batch.

        Args:
            start: first sample.
            stop: the sample after the last; None: all.

        Yields:
            The inputs, and the whole batch.
        """
        chosen = range(start, self.size if stop is None else stop)
        loader = (
            self._loader if len(chosen) == self.size else DataLoader(Subset(self._samples, chosen), **self._options)
        )
        with unmoved(self._samples, self._loader.collate_fn):
            with isolated():
                iterator = iter(loader)
            while True:
                with isolated():
                    batch = next(iterator, None)
                    if batch is None:
                        return
                    batch = transfer(self._trainer, batch)
                yield take_inputs(batch, self._input_fn), batch

    def collect(self, compute: Callable[[Inputs, Any], T], start: int = 0, stop: int | None = None) -> list[T]:
        """Return ``compute(inputs, batch)`` of every batch, in order, on every rank; each rank computes its share.

        Args:
            compute: returns what can be sent to another process, such as tensors on the CPU.
            start: first sample.
            stop: the sample after the last; None: all.

        Raises:
            RuntimeError: it failed on one of several ranks; raised on all of them.
        """
        mine = self.ranks.share(start, self.size if stop is None else stop)

        def part() -> list[T]:
            if not mine:
                return []
            return [compute(inputs, batch) for inputs, batch in self.batches(mine.start, mine.stop)]

        return [made for parts in self.ranks.gather(part) for made in parts]

    def caveats(self) -> list[str]:
        """Return why the objective of the run is not the mean loss over these samples as they are read here."""
        return list(self.sampling.caveats) + [RANDOM_INPUTS] * self.is_random()

    def steps_are_whole(self, accumulated: int) -> bool:
        """Return whether every optimizer step sees every sample once, as it is read here.

        Args:
            accumulated: batches of a rank per step.
        """
        return replace(self.sampling, accumulated=accumulated).whole and not self.caveats()

    @property
    def smallest_batch(self) -> int:
        """Number of different samples in a batch, at least; see ``Sampling``."""
        return self.sampling.smallest_batch

    def is_random(self) -> bool:
        """Return whether a few samples, some at a time, are other tensors, inputs or targets, when they are read again."""
        return self._random

    @cached_property
    def _random(self) -> bool:
        with unmoved(self._samples, self._loader.collate_fn):
            return self._differs_when_read_again()

    def _differs_when_read_again(self) -> bool:
        probed = min(self.size, PROBED)
        chosen = [self.size * k // probed for k in range(probed)]
        groups = max(1, probed // TOGETHER)
        # Each read has a seed of its own: with only two seeds, an event that both of them cause would go unnoticed.
        seeds = count(1)
        if self._mixes(chosen):
            return True
        for group in (chosen[k::groups] for k in range(groups)):
            first = _parts(self._drawn(group, next(seeds)))
            for _ in range(max(1, READS // probed - 1)):
                if not _equal(first, _parts(self._drawn(group, next(seeds)))):
                    return True
        return False

    def _mixes(self, chosen: Sequence[int]) -> bool:
        """Return whether a sample is another tensor when other samples are collated with it, or in another order."""
        if len(chosen) < 2:
            return False
        half = chosen[: len(chosen) // 2]
        together, turned, less = (self._rows(some, seed=1) for some in (chosen, chosen[::-1], half))
        flipped = [each.flip(0) for each in turned]
        return not (_equal(together, flipped) and _equal([each[: len(half)] for each in together], less))

    def first_inputs(self) -> Inputs:
        """Return the inputs of the first batch."""
        return next(self.batches())[0]

    def same_inputs(self, i: int, j: int) -> bool:
        """Return whether samples i and j, each read anew, enter the network as the same tensors."""
        with unmoved(self._samples, self._loader.collate_fn):
            return _equal(self._read([i], seed=1), self._read([j], seed=1))

    def _read(self, indices: Sequence[int], seed: int) -> list[Tensor]:
        """Return the tensors that enter the network for these samples, with random numbers from ``seed``."""
        return list(input_tensors(take_inputs(self._drawn(indices, seed), self._input_fn)))

    def inputs_of(self, indices: Sequence[int], seed: int = 0) -> Inputs:
        """Return what enters the network for some samples, collated together.

        Args:
            indices: numbers of the samples.
            seed: of the random numbers that the data set may draw.
        """
        return take_inputs(self.batch_of(indices, seed), self._input_fn)

    def batch_of(self, indices: Sequence[int], seed: int = 0) -> Any:
        """Return some samples as a batch that the training step gets.

        Args:
            indices: numbers of the samples.
            seed: of the random numbers that the data set may draw.
        """
        with unmoved(self._samples, self._loader.collate_fn):
            return self._drawn(indices, seed)

    def _drawn(self, indices: Sequence[int], seed: int) -> Any:
        """Return some samples as a batch; generators that the data set holds move on."""
        with isolated():
            seed_all(seed)
            return transfer(self._trainer, self._loader.collate_fn([self._samples[index] for index in indices]))

    def _rows(self, indices: Sequence[int], seed: int) -> list[Tensor]:
        """Return the tensors of such a batch that have one row per sample."""
        return [each for each in _parts(self._drawn(indices, seed)) if each.ndim and len(each) == len(indices)]


def _line(trainer: pl.Trainer) -> str:
    """Return what to write so that the samples of the training loader can be read one by one."""
    loader = trainer.train_dataloader
    if isinstance(loader, DataLoader):
        if loader.batch_size is None:  # its samples are batches
            return "pass DataLoader([sample for batch in dataset for sample in zip(*batch)], batch_size=...)"
        return f"pass DataLoader(list(dataset), batch_size={loader.batch_size})"
    if isinstance(loader, Mapping):
        named = ", ".join(f"{key}={key}_set" for key in loader)
        return (
            f"pass one loader of the same batches, DataLoader(torch.utils.data.StackDataset({named}), batch_size=...)"
        )
    if isinstance(loader, (list, tuple)) and all(isinstance(each, DataLoader) for each in loader):
        named = ", ".join(f"set_{number}" for number in range(len(loader)))
        return (
            f"pass one loader of the same batches, DataLoader(torch.utils.data.StackDataset({named}), batch_size=...)"
        )
    return "pass DataLoader([sample for batch in loader for sample in zip(*batch)], batch_size=...)"


def _parts(batch: Any) -> list[Tensor]:
    try:
        return parts_of(batch)
    except Exception:  # what cannot be recognised is told where samples are to be recognised
        return []


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether two lists of tensors hold the same numbers; NaN equals NaN."""
    return len(some) == len(others) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(some, others, strict=True)
    )
