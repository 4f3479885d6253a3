"""The samples of a kernel: whether they may be used, how they are joined, and how they are laid out in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_conv.networks.inputs import Inputs, input_tensors, map_inputs


class NotFiniteSamplesError(ValueError):
    """Samples contain NaN or infinity."""


def bytes_by_storage(inputs: Inputs) -> dict[int, int]:
    """Return the bytes of each tensor of ``inputs``, by the address of its storage (which may contain more samples)."""
    return {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in input_tensors(inputs)}


def joined(one: Inputs, other: Inputs) -> Inputs | None:
    """Concatenate two sets of samples; return None where they cannot form one batch."""
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
    """Lay images out with their channels innermost, which makes convolutions on a CPU up to twice as fast."""
    return map_inputs(_channels_last, inputs)


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4 and tensor.is_floating_point():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def require_float_inputs(inputs: Inputs, outputs: Callable[[], Tensor] | None = None) -> None:
    """Refuse inputs with NaN or infinity, unless the network takes them for something it knows, such as missing values.

    Args:
        inputs: The samples.
        outputs: Evaluates the network on them, only where a number is not finite; outputs that are finite show that it knows them. None:
            such numbers are refused.

    Raises:
        NotFiniteSamplesError: An input contains NaN or infinity, and the outputs do, too.
    """
    for position, tensor in enumerate(input_tensors(inputs)):
        # A finite sum proves that all numbers are finite; the converse fails, as the sum may overflow.
        suspect = tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum()))
        if suspect and not bool(torch.isfinite(tensor).all()):
            if outputs is not None:
                with torch.no_grad():
                    if bool(torch.isfinite(outputs()).all()):
                        return
            raise NotFiniteSamplesError(
                f"inputs: tensor {position} of shape {tuple(tensor.shape)} contains NaN or infinity; clean the samples"
            )
