"""The inputs and the targets of a batch, as a loader yields it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from lightning_conv.arguments import described
from lightning_conv.networks.inputs import Inputs, sample_count

Split: TypeAlias = Callable[[Any], tuple[Inputs, Tensor | None]]
"""Takes a batch apart into inputs and targets."""


def split_batch(batch: object, split: Split | None, *, targets: bool) -> tuple[Inputs, Tensor | None]:
    """Return the inputs and the targets of a batch.

    Args:
        batch: what the loader yields: inputs and targets, or inputs alone where no targets are needed.
        split: takes it apart; None: as above.
        targets: whether targets are needed.

    Raises:
        TypeError: the batch has another form.
        ValueError: see ``sample_count``.
    """
    if split is not None:
        inputs, found = split(batch)
    elif isinstance(batch, Tensor):
        inputs, found = batch, None
    elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
        inputs, found = batch[0], batch[1] if len(batch) == 2 else None
    else:
        raise TypeError(
            f"loader: yields {described(batch)}; need (inputs, targets), or pass split=lambda batch: (inputs, targets)"
        )
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    if not isinstance(inputs, Tensor | tuple | Mapping):
        raise TypeError(f"loader: its inputs are {described(inputs)}; need a tensor, or a tuple or mapping of tensors")
    if targets and not isinstance(found, Tensor):
        raise TypeError(
            f"loader: its targets are {described(found)}; need a tensor for loss_fn, or pass split=lambda batch: (inputs, targets)"
        )
    sample_count(inputs)
    return inputs, found if targets else None
