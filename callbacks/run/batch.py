"""Read the run's training samples and what is in a batch of them, without touching the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from lightning_conv.networks.evaluation import Inputs, input_tensors

InputFn: TypeAlias = Callable[[Any], Inputs]
TargetFn: TypeAlias = Callable[[Any], Any]

INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values", "features", "data", "input_ids")
TARGET_KEYS = ("y", "target", "targets", "label", "labels")


def training_samples(trainer: pl.Trainer, cure: str) -> tuple[Dataset[Any], DataLoader[Any]]:
    """The samples that the run trains on, by index, and its one training loader.

    Of a ``SubsetRandomSampler`` only its subset counts.

    Raises:
        MisconfigurationException: there are several loaders, or the data set is iterable or batches itself; ``cure`` says
            what to do.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            f"lightning_conv reads the samples of one DataLoader, but the training loader is {type(loader).__name__}; {cure}"
        )
    samples = loader.dataset
    if isinstance(samples, IterableDataset) or loader.batch_sampler is None or not hasattr(samples, "__len__"):
        raise MisconfigurationException(
            f"lightning_conv needs random access to single training samples, which {type(samples).__name__} (an iterable or "
            f"a self-batching data set) does not give; {cure}"
        )
    order = unwrapped(sampler_of(loader))
    if isinstance(order, SubsetRandomSampler):
        samples = Subset(samples, order.indices)
    return samples, loader


def sampler_of(loader: DataLoader[Any]) -> Any | None:
    """What puts the samples in order; None: a batch sampler of the run's own makes the batches, in a way that is not known.

    ``DataLoader(batch_sampler=...)`` has a ``sampler``, too, which nobody asks.
    """
    return loader.batch_sampler.sampler if type(loader.batch_sampler) is BatchSampler else None


def unwrapped(sampler: Any | None) -> Any | None:
    """The run's own sampler, of which Lightning gives each rank its part under DDP."""
    return sampler.dataset._sampler if isinstance(sampler, DistributedSamplerWrapper) else sampler  # type: ignore[attr-defined]


def transfer(trainer: pl.Trainer, batch: Any) -> Any:  # a batch is anything
    """The batch as the training step gets it: in its precision, on the device, after the module's or the data module's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(trainer.lightning_module._on_before_batch_transfer(batch))


def take_inputs(batch: Any, input_fn: InputFn | None) -> Inputs:
    """The model's input out of a collated batch.

    Raises:
        MisconfigurationException: nothing recognisable in it; says what it holds.
    """
    if input_fn is not None:
        inputs = input_fn(batch)
    elif isinstance(batch, torch.Tensor):
        inputs = batch
    elif isinstance(batch, Mapping):
        found = [key for key in INPUT_KEYS if isinstance(batch.get(key), torch.Tensor)]
        if not found:
            raise MisconfigurationException(_no_input(f"a dict with keys {', '.join(map(repr, batch))}"))
        inputs = batch[found[0]]
    elif isinstance(batch, Sequence) and batch and isinstance(batch[0], torch.Tensor):
        inputs = batch[0]
    else:
        first = f" beginning with {type(batch[0]).__name__}" if isinstance(batch, Sequence) and batch else ""
        raise MisconfigurationException(_no_input(f"a {type(batch).__name__}{first}"))
    try:
        input_tensors(inputs)
    except TypeError as error:
        raise MisconfigurationException(f"input_fn: {error}") from error
    return inputs


def take_targets(batch: Any, target_fn: TargetFn | None) -> torch.Tensor | None:
    """The targets out of a collated batch: what ``target_fn`` says, ``batch[1]``, or one of the keys y, target(s), label(s).

    None where they are no tensor, or nothing recognisable is there.
    """
    found: Any = None
    if target_fn is not None:
        found = target_fn(batch)
    elif isinstance(batch, Mapping):
        found = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, (list, tuple)) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, torch.Tensor) else None


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """``inputs`` on the module's device."""
    moved: Inputs = move_data_to_device(inputs, device)
    return moved


def _no_input(found: str) -> str:
    return (
        f"batch: found no input in {found} (looked for a tensor, batch[0], or one of the keys {', '.join(INPUT_KEYS)}); "
        "pass input_fn=lambda batch: ..."
    )
