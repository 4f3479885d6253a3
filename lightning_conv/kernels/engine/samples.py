"""Samples taken out of inputs, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_conv.networks.evaluation import Inputs, input_tensors, map_inputs


def bytes_by_storage(inputs: Inputs) -> dict[int, int]:
    """The bytes of each tensor of ``inputs`` by the address of its storage, which may hold a larger set of samples."""
    return {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in input_tensors(inputs)}


def joined(one: Inputs, other: Inputs) -> Inputs | None:
    """The samples of both; None where they cannot stand in one batch."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if set(one) != set(other):
            return None
        other = {key: other[key] for key in one}
    elif isinstance(one, Mapping) or isinstance(other, Mapping):
        return None
    mine, theirs = input_tensors(one), input_tensors(other)
    if [tensor.shape[1:] for tensor in mine] != [tensor.shape[1:] for tensor in theirs]:
        return None
    rest = iter(theirs)
    return map_inputs(lambda tensor: torch.cat([tensor, next(rest)]), one)


def channels_last(inputs: Inputs) -> Inputs:
    """Images with their channels innermost, as convolutions on a CPU are fastest (twice, for few channels)."""
    return map_inputs(_channels_last, inputs)


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4 and tensor.is_floating_point():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
