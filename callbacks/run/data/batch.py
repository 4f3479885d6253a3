"""Take inputs and targets out of a batch, as the training step gets it, without touching the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_conv.networks.inputs import Inputs, input_tensors

InputFn: TypeAlias = Callable[[Any], Inputs]
TargetFn: TypeAlias = Callable[[Any], Any]

INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values", "features", "data", "input_ids")
TARGET_KEYS = ("y", "target", "targets", "label", "labels")


def transfer(trainer: pl.Trainer, batch: Any) -> Any:  # a batch is anything
    """Return the batch as the training step gets it: in its precision, on the device, after the transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(trainer.lightning_module._on_before_batch_transfer(batch))


def take_inputs(batch: Any, input_fn: InputFn | None) -> Inputs:
    """Take the model's input out of a collated batch.

    Raises:
        MisconfigurationException: there is nothing recognisable in the batch; the message says what it holds.
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
    """Take the targets out of a collated batch: by ``target_fn``, as ``batch[1]``, or by one of the keys y, target(s), label(s).

    Returns:
        The targets; None where they are not a tensor, or nothing recognisable is there.
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
    """Move ``inputs`` to the module's device."""
    moved: Inputs = move_data_to_device(inputs, device)
    return moved


def _no_input(found: str) -> str:
    return (
        f"batch: found no input in {found} (looked for a tensor, batch[0], or one of the keys {', '.join(INPUT_KEYS)}); "
        "pass input_fn=lambda batch: ..."
    )
