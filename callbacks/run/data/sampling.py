"""``describe_sampling``: which training samples a run draws, how often, and whether a step sees all of them once."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_conv.callbacks.run.callbacks import find_callback

UNKNOWN_BATCH = 256
"""Samples that are read at a time where the loader does not say how many."""

_EVEN: set[type[Sampler[Any]]] = {SequentialSampler, RandomSampler, SubsetRandomSampler, DistributedSampler}

SamplerClass = TypeVar("SamplerClass", bound=type[Sampler[Any]])


def register_sampler(sampler: SamplerClass) -> SamplerClass:
    """Declare that a sampler class draws every sample of its data set equally often in an epoch, as torch's own do.

    Nothing checks it: guarantees about the training set rest on it. A subclass may draw in any way and needs a declaration of
    its own.

    Args:
        sampler: The class.

    Returns:
        The class, so that this is a decorator.

    Raises:
        TypeError: It is not a class.
    """
    if not isinstance(sampler, type):
        raise TypeError(f"sampler: {sampler!r}; need a class of samplers, not an object")
    _EVEN.add(sampler)
    return sampler


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the training loader makes batches of the n samples.

    A sampler of another class than torch's is known if it is declared by ``register_sampler``; a batch sampler is not. Iterating
    it would show one epoch only, and could change its state and thereby the run.
    """

    size: int  # n; of a SubsetRandomSampler the size of its subset
    world: int  # processes that draw samples
    batch_size: int  # samples per batch and process; UNKNOWN_BATCH if the loader does not tell
    drawn: int | None  # samples per epoch and process; None: a batch sampler that is not known makes the batches
    drop_last: bool  # whether an incomplete last batch is left out
    accumulated: int | None  # batches of a process per optimizer step; None: that changes during the run
    uneven: str  # why an epoch may not draw all samples equally often; empty if it does
    repeats: bool  # whether the batches of every epoch are the same
    caveats: tuple[str, ...]  # why the run's objective is not the mean loss over the n samples

    @property
    def every_epoch_is_whole(self) -> bool:
        """Tell whether this process draws every sample in every epoch, and not only equally often in the long run."""
        return self.world == 1 and not self.drop_last

    @property
    def whole(self) -> bool:
        """Whether every optimizer step sees every sample exactly once."""
        return not self.not_whole

    @property
    def not_whole(self) -> str:
        """The reason why a step does not see every sample exactly once; empty if it does."""
        if self.accumulated is None:
            return "GradientAccumulationScheduler changes how many batches make a step"
        if self.drawn is None:
            return self.uneven
        batches = self.batch_size * self.accumulated
        if self.world * batches < self.size:
            return f"mini-batches: {self.world * batches} of {self.size} samples per step"
        if self.uneven:
            return self.uneven
        if self.drawn * self.world != self.size:
            return f"the sampler draws {self.drawn * self.world} samples per epoch, of a training set of {self.size}"
        if self.drawn != batches and (self.accumulated > 1 or self.drop_last):
            return f"the samples of an epoch do not fill {self.accumulated} batches of {self.batch_size}, which make a step"
        return self.caveats[0] if self.caveats else ""

    @property
    def largest_batch(self) -> int | None:
        """Number of samples in the largest batch of a process; None: not known."""
        return None if self.drawn is None else min(self.batch_size, self.drawn)

    @property
    def smallest_batch(self) -> int:
        """Lower bound of the number of different samples in a batch of all processes; 1 where that is not known.

        A batch of b samples, in which each comes r times at most, has no larger curvature than the steepest b / r.
        """
        if self.uneven or self.drawn is None:
            return 1
        left = self.drawn % self.batch_size
        mine = self.batch_size if self.drop_last or not left else left
        repeats = math.ceil(self.drawn * self.world / self.size)
        return max(1, min(mine * self.world // repeats, self.size))


def describe_sampling(trainer: pl.Trainer) -> Sampling:
    """Describe how the run draws its training samples, from the settings of its loader and its trainer alone.

    Raises:
        MisconfigurationException: the data have no random access.
    """
    samples, loader = training_samples(trainer, "pass a map-style data set in one DataLoader")
    size: int = len(samples)  # type: ignore[arg-type]
    batches, order, world = loader.batch_sampler, _order(loader), trainer.world_size
    given = getattr(batches, "batch_size", None)
    uneven = _uneven(batches, _own(order))
    changing = find_callback(trainer, GradientAccumulationScheduler) is not None
    return Sampling(
        size=size,
        world=world,
        batch_size=given if isinstance(given, int) and given > 0 else UNKNOWN_BATCH,
        drawn=None if order is None else int(_length(order, -(-size // world))),
        drop_last=order is not None and bool(getattr(batches, "drop_last", False)),
        accumulated=None if changing else trainer.accumulate_grad_batches,
        uneven=uneven,
        repeats=world == 1 and type(order) is SequentialSampler,
        caveats=tuple([uneven] * bool(uneven) + _caveats(trainer, batches, order, size)),
    )


def training_samples(trainer: pl.Trainer, hint: str) -> tuple[Dataset[Any], DataLoader[Any]]:
    """Return the samples that the run trains on, by index, and its one training loader.

    Of a ``SubsetRandomSampler`` only its subset counts.

    Args:
        trainer: of the run.
        hint: what to do about data without random access, for the message.

    Raises:
        MisconfigurationException: there are several loaders, or the data set is iterable or batches itself.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            f"lightning_conv reads the samples of one DataLoader, but the training loader is {type(loader).__name__}; {hint}"
        )
    samples = loader.dataset
    if isinstance(samples, IterableDataset) or loader.batch_sampler is None or not hasattr(samples, "__len__"):
        raise MisconfigurationException(
            f"lightning_conv needs random access to single training samples, which {type(samples).__name__} (an iterable or "
            f"a self-batching data set) does not give; {hint}"
        )
    order = _own(_order(loader))
    if isinstance(order, SubsetRandomSampler):
        samples = Subset(samples, order.indices)
    return samples, loader


def _order(loader: DataLoader[Any]) -> Any | None:
    """Return the sampler that orders the samples, or None where a batch sampler of the run's own makes the batches.

    A ``DataLoader(batch_sampler=...)`` has a ``sampler`` as well, which is not used.
    """
    return loader.batch_sampler.sampler if type(loader.batch_sampler) is BatchSampler else None


def _own(sampler: Any | None) -> Any | None:
    """Return the run's own sampler, which Lightning divides among the processes under DDP."""
    return sampler.dataset._sampler if isinstance(sampler, DistributedSamplerWrapper) else sampler  # type: ignore[attr-defined]


def _length(iterable: object, otherwise: float) -> float:
    try:
        return len(iterable) if isinstance(iterable, Sized) else otherwise
    except (TypeError, NotImplementedError):  # its __len__ asks something that has none
        return otherwise


def _uneven(batches: object, sampler: object) -> str:
    """Return why an epoch may not draw all samples equally often; empty if it does."""
    if sampler is None:
        return f"{type(batches).__name__} makes the batches itself and may weight samples or leave some out"
    if type(sampler) not in _EVEN:
        why = ", as it draws with replacement" if getattr(sampler, "replacement", False) else ""
        return f"{type(sampler).__name__} may weight samples or leave some out{why}"
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return "RandomSampler draws with replacement, so an epoch leaves samples out"
    return ""


def _caveats(trainer: pl.Trainer, batches: Any, order: Any | None, size: int) -> list[str]:
    """Return what else makes the objective of the run differ from the mean loss over the samples."""
    found, sampler = [], _own(order)
    source = getattr(sampler, "dataset" if isinstance(sampler, DistributedSampler) else "data_source", None)
    if isinstance(source, Sized) and len(source) != size:
        found.append(f"the sampler draws from {len(source)} samples and the data set has {size}")
    if (drawn := getattr(sampler, "_num_samples", None)) is not None and drawn != size:
        found.append(f"the sampler draws {drawn} of {size} samples in an epoch")
    fixed = isinstance(sampler, SequentialSampler) or (isinstance(sampler, DistributedSampler) and not sampler.shuffle)
    if fixed and isinstance(order, DistributedSampler) and order.total_size != size:
        found.append(f"the sampler makes {order.total_size} of {size} samples, the same ones in every epoch")
    if fixed and batches.drop_last and (left := len(order) % batches.batch_size):  # type: ignore[arg-type]
        found.append(f"drop_last leaves out the same {left} samples in every epoch")
    steps = _length(batches, math.inf)
    if trainer.num_training_batches < steps:
        found.append(f"only {trainer.num_training_batches} of {steps} batches are trained on in an epoch")
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        found.append("the training data are loaded anew during the run; the certificate is about the first")
    return found
