"""What the training loader makes of the samples in an epoch: which of them, how often, and in what steps."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler

from lightning_conv.callbacks.run.batch import sampler_of, unwrapped

UNKNOWN_BATCH = 256
"""Samples that are read at a time where the loader does not say how many."""


class Epoch:
    """An epoch of the run.

    Args:
        trainer: of the run.
        loader: of its training data, on this rank.
        size: n.
        world: ranks.

    Attributes:
        batch_size: of the loader, or what is read at a time where it has none.
    """

    def __init__(self, trainer: pl.Trainer, loader: DataLoader[Any], size: int, world: int) -> None:
        self._trainer, self._size, self._world = trainer, size, world
        self._batches, self._sampler = loader.batch_sampler, sampler_of(loader)
        given = getattr(self._batches, "batch_size", None)
        self.batch_size = given if isinstance(given, int) and given > 0 else UNKNOWN_BATCH
        self._drop_last = self._sampler is not None and bool(getattr(self._batches, "drop_last", False))
        self._steps = len(loader) if isinstance(self._batches, Sized) else math.inf

    @property
    def _mine(self) -> int:
        """Samples that the sampler gives this rank."""
        return len(self._sampler)  # type: ignore[arg-type]

    @property
    def _each_once(self) -> bool:
        """Whether a pass over the samples holds each of them at most once."""
        sampler = unwrapped(self._sampler)
        known = isinstance(sampler, (SequentialSampler, RandomSampler, SubsetRandomSampler, DistributedSampler))
        return known and not (isinstance(sampler, RandomSampler) and sampler.replacement)

    def caveats(self) -> list[str]:
        """What makes the objective of the run another than the mean loss over the samples."""
        found = []
        sampler = unwrapped(self._sampler)
        if sampler is None:
            found.append(
                f"{type(self._batches).__name__} makes the batches itself and may weight samples or leave some out"
            )
        elif not self._each_once and not isinstance(sampler, RandomSampler):
            found.append(f"{type(sampler).__name__} may weight samples or leave some out")
        elif not self._each_once:
            found.append("RandomSampler draws with replacement, so an epoch leaves samples out")
        fixed = isinstance(sampler, SequentialSampler) or (
            isinstance(sampler, DistributedSampler) and not sampler.shuffle
        )
        if fixed and isinstance(self._sampler, DistributedSampler) and self._sampler.total_size != self._size:
            found.append(
                f"the sampler makes {self._sampler.total_size} of {self._size} samples, the same ones in every epoch"
            )
        if fixed and self._drop_last and (left := self._mine % self.batch_size):
            found.append(f"drop_last leaves out the same {left} samples in every epoch")
        if self._trainer.num_training_batches < self._steps:
            found.append(
                f"only {self._trainer.num_training_batches} of {self._steps} batches are trained on in an epoch"
            )
        if self._trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            found.append("the training data are loaded anew during the run; the certificate is about the first")
        return found

    def steps_are_whole(self, accumulated: int) -> bool:
        """Whether every optimizer step sees every sample once.

        The loader makes as many equal batches as are accumulated, of all samples, and nothing in ``caveats`` is against it.

        Args:
            accumulated: batches of a rank in a step.
        """
        if not self._each_once or self.caveats():
            return False
        mine, size = self._mine, self.batch_size
        equal = mine == size * accumulated or (accumulated == 1 and mine <= size and not self._drop_last)
        return equal and mine * self._world == self._size

    @property
    def smallest_batch(self) -> int:
        """Different samples in the smallest batch, of all ranks together, at least: 1 where that is not known.

        A batch of b samples, in which each comes r times at most, has no larger curvature than the steepest b / r samples.
        """
        if not self._each_once:
            return 1
        left: int = self._mine % self.batch_size
        mine: int = self.batch_size if self._drop_last or not left else left
        repeats = math.ceil(self._mine * self._world / self._size)
        return max(1, min(mine * self._world // repeats, self._size))
