"""``Inputs``: the samples that a network takes, as a tensor, a tuple of positional or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_conv.networks.dense_gradients import ROWS_OF_BAGS

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply ``function`` to every tensor of ``inputs``: a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: function(value) for key, value in inputs.items()}
    return tuple(function(value) for value in inputs)


def input_tensors(inputs: Inputs) -> list[Tensor]:
    """Return the tensors of ``inputs`` in order.

    Raises:
        TypeError: ``inputs`` contains something else, or nothing.
    """
    if isinstance(inputs, Tensor):
        return [inputs]
    several = isinstance(inputs, Iterable) and not isinstance(inputs, str | bytes)
    given: Iterable[object] = inputs.values() if isinstance(inputs, Mapping) else inputs if several else [inputs]
    values = list(given)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or len(tensors) != len(values):
        kinds = ", ".join(type(value).__name__ for value in values) or "nothing"
        raise TypeError(f"inputs: expected a tensor, a tuple or a mapping of tensors, got {kinds}; pass tensors only")
    return tensors


def sample_count(inputs: Inputs) -> int:
    """Return the number of samples n, the common length of dimension 0.

    Raises:
        TypeError: a tensor does not have its numbers in rows: it is sparse, nested or quantised.
        ValueError: the tensors differ in length, or there is no sample.
    """
    tensors = input_tensors(inputs)
    for position, tensor in enumerate(tensors):
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else ""
        kind = kind or ("" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch."))
        if kind:
            raise TypeError(f"inputs: tensor {position} is {kind}; need dense tensors with one row for each sample")
    lengths = {int(tensor.shape[0]) if tensor.ndim else 0 for tensor in tensors}
    if len(lengths) != 1 or 0 in lengths:
        flat = all(tensor.ndim == 1 and not tensor.is_floating_point() for tensor in tensors[:2])
        hint = f"; {ROWS_OF_BAGS}" if flat and len(tensors) > 1 else ""
        raise ValueError(
            f"inputs: need one or more samples along dimension 0 of every tensor, got lengths {sorted(lengths)}{hint}"
        )
    return lengths.pop()


def take(inputs: Inputs, rows: slice) -> Inputs:
    """Return the samples in ``rows``, as views."""
    return map_inputs(lambda tensor: tensor[rows], inputs)


def spread(inputs: Inputs, count: int) -> Inputs:
    """Return so many samples, evenly spaced from the first to the last, as copies; all of them where there are no more."""
    samples = sample_count(inputs)
    if count >= samples:
        return inputs
    chosen = torch.linspace(0, samples - 1, count).round().long()
    return map_inputs(lambda tensor: tensor[chosen.to(tensor.device)], inputs)
