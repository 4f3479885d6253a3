"""``SetReader``: read the samples of the whole training set as the network gets them, where that runs no code of the user's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_conv.callbacks.run.data.batch import transfer
from lightning_conv.callbacks.run.data.data_generators import unread
from lightning_conv.callbacks.run.data.own_code import own_code
from lightning_conv.callbacks.run.data.sampling import training_samples
from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.callbacks.run.isolated import seed_all
from lightning_conv.callbacks.run.observe_run import FEW
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.wording import figure
from lightning_conv.networks.inputs import input_tensors, spread
from lightning_conv.networks.observed.leaves import Place, at, tensors_in

SLOW = 0.005
"""Seconds that a batch of one sample may take, whatever stands around the reading included; a slower one tells how long samples take."""

AROUND = 0.002
"""Seconds that stand around the reading of any batch, roughly."""

COMPARED = 8
"""Samples of the probe that are read again to find out where inputs and targets stand in a batch."""

TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Hooks that a user may have between the data set and the training step."""


class NotReadError(ValueError):
    """The samples of this run are not read one by one; the message says why."""


@dataclass(frozen=True)
class SetReader:
    """The samples of a training set, by their numbers.

    Attributes:
        size: Their number.
        seconds: What reading one of them took, at least.
    """

    size: int
    seconds: float
    _read: Callable[[Sequence[int], int], Any]
    _inputs: tuple[Place, ...]
    _targets: Place
    _shapes: tuple[torch.Size, ...]
    _numbers: Sequence[int] | None

    @classmethod
    def of(cls, run: RunView, cheap: float = math.inf) -> SetReader:
        """Find out how the samples are read: twice alike, and as those of the probe are that were observed in the training step.

        Args:
            run: The run at this moment, whose targets are known.
            cheap: Seconds that reading all of them may take.

        Raises:
            NotReadError: The data have no random access; a read runs code of the user's own, which may count, cache or draw; reading all of
                them takes longer; inputs differ when they are read again, as under augmentation; or what enters the network is no tensor
                of a batch.

        Cost: one sample, and then ``COMPARED``, are read twice, or a few times more where the probe has some of those that were drawn.
        """
        trainer, probe = run.trainer, run.measurement.run_network.probe
        samples, loader = _samples_of(trainer)
        if probe.inputs is not None or run.targets is None:
            raise NotReadError("the samples of the probe were given by hand, or have no targets")
        read = _reading(trainer, samples, loader)
        size: int = len(samples)  # type: ignore[arg-type]
        drawn, count = probe.indices(size), run.samples
        require_cheap(size, min(_seconds(lambda: read(drawn[:1], 1)) for _ in range(2)), cheap)
        for rows in _rows_that_may_be(len(drawn), count):
            some = _spread(count, min(COMPARED, count))
            chosen = [drawn[rows[k]] for k in some]
            begun = time.perf_counter()
            batch = read(chosen, 1)
            seconds = max(time.perf_counter() - begun - AROUND, 0.0) / len(chosen)
            if not _alike(batch, read(chosen, 2)):
                raise NotReadError("augmentation: an input differs when it is read again, so equal inputs mean nothing")
            own = [each[some] for each in input_tensors(run.measurement.inputs)]
            inputs, targets = [_place_of(each, batch) for each in own], _place_of(run.targets[some], batch)
            if targets is not None and all(place is not None for place in inputs):
                places = tuple(place for place in inputs if place is not None)
                shapes = tuple(each.shape[1:] for each in (*own, run.targets))
                numbers = samples.indices if samples is not loader.dataset and isinstance(samples, Subset) else None
                return cls(size, seconds, read, places, targets, shapes, numbers)
        raise NotReadError(
            "what enters the network, or the loss, is no tensor of a batch as it is read from the data set"
        )

    def read(self, chosen: Sequence[int], seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return inputs and targets of some samples, on the CPU.

        Args:
            chosen: Their numbers in the order of the data set.
            seed: Of the random numbers that reading may draw.

        Raises:
            NotReadError: A sample cannot be read, or has another shape than those of the probe.
        """
        batch = self._read(chosen, seed)
        found = [at(batch, place).detach().cpu() for place in (*self._inputs, self._targets)]
        if any(each.shape[:1] != (len(chosen),) for each in found):
            raise NotReadError("a batch has another number of samples than were read")
        if tuple(each.shape[1:] for each in found) != self._shapes:
            raise NotReadError("samples have several shapes, so that equal ones are not recognised")
        return tuple(found[:-1]), found[-1]

    def number(self, sample: int) -> int:
        """Return the number of a sample in the loader's data set, of which a ``SubsetRandomSampler`` may draw a part.

        Args:
            sample: Its number here.
        """
        return sample if self._numbers is None else int(self._numbers[sample])


def require_cheap(samples: int, seconds: float, cheap: float) -> None:
    """Refuse to read a set that takes too long.

    Args:
        samples: Samples that are to be read.
        seconds: What reading one of them takes.
        cheap: Seconds that all of them may take.

    Raises:
        NotReadError: They take longer.
    """
    if samples * seconds > cheap:
        raise NotReadError(f"reading {samples:,} training samples takes about {figure(samples * seconds)} s")


def _seconds(read: Callable[[], Any]) -> float:
    """Return the seconds that reading one sample takes; 0: too few to be told from what stands around it."""
    begun = time.perf_counter()
    read()
    taken = time.perf_counter() - begun
    return taken if taken > SLOW else 0.0


def _samples_of(trainer: pl.Trainer) -> tuple[Dataset[Any], DataLoader[Any]]:
    try:
        samples, loader = training_samples(trainer, hint="")
    except MisconfigurationException as error:
        raise NotReadError("the training data have no random access") from error
    holders = [("module", trainer.lightning_module), ("data module", getattr(trainer, "datamodule", None))]
    for whose, holder in holders:
        own = [name for name in TRANSFERS if holder is not None and is_overridden(name, holder)]
        if own:
            raise NotReadError(f"the {whose} has its own {own[0]}, which is not called for samples that no step sees")
    if name := own_code(samples, loader.collate_fn):
        raise NotReadError(f"reading a sample runs {name}, which is not run more often than the training steps do")
    return samples, loader


def _reading(
    trainer: pl.Trainer, samples: Dataset[Any], loader: DataLoader[Any]
) -> Callable[[Sequence[int], int], Any]:
    """Return what reads some samples as a batch that the training step gets, from a seed; generators are put back."""

    def read(chosen: Sequence[int], seed: int) -> Any:
        with attempted(*READING) as attempt, unread(samples, loader.collate_fn):
            seed_all(seed)
            batch = transfer(trainer, loader.collate_fn([samples[index] for index in chosen]))
        if attempt.failed:
            raise NotReadError(f"a sample cannot be read ({attempt.reason})")
        return batch

    return read


def _rows_that_may_be(read: int, measured: int) -> list[list[int]]:
    """Return which samples of those that were read may be the measured ones: the first, or such as are spread over all or the first few."""
    may = [list(range(measured)), _spread(read, measured), _spread(min(read, FEW), measured)]
    found = [rows for rows in may if len(rows) == measured and rows[-1] < read]
    return [rows for number, rows in enumerate(found) if rows not in found[:number]]


def _spread(among: int, count: int) -> list[int]:
    chosen = spread(torch.arange(among), count)
    assert isinstance(chosen, Tensor)
    return chosen.tolist()


def _place_of(tensor: Tensor, batch: Any) -> Place | None:
    """Return where a tensor stands in a batch; None: nowhere."""
    for place, each in tensors_in(batch):
        if each.shape == tensor.shape and torch.equal(each.detach().cpu().to(tensor.dtype), tensor.cpu()):
            return place
    return None


def _alike(batch: Any, again: Any) -> bool:
    """Return whether two batches have equal tensors; NaN equals NaN."""
    pairs = list(zip((each for _, each in tensors_in(batch)), (each for _, each in tensors_in(again)), strict=False))
    return all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
