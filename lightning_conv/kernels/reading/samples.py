"""The samples of a kernel: whether they may be used, whether they couple, and how they are laid out in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_conv.networks.evaluation import Inputs, StatelessModule, input_tensors, map_inputs


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


def check_samples_do_not_couple(few: Tensor, whole: Tensor, level: float = 0.0) -> None:
    """Refuse a network whose outputs for the first samples change with the rest of the batch.

    The kernel of a pair of samples would then not be defined.

    Args:
        few: outputs of the first samples alone.
        whole: outputs of more samples, the first ones among them.
        level: size of the terms that add up to an output; where they cancel, what remains is rounding.

    Raises:
        ValueError: the outputs change by more than rounding.
    """
    part = whole[: few.shape[0]]
    tolerance = torch.finfo(few.dtype).eps ** 0.5
    scale = max(float(whole.abs().max()), tolerance * level, torch.finfo(few.dtype).tiny)
    change = float((part - few).abs().max()) / scale
    if change > tolerance:
        raise ValueError(
            f"model: the outputs of the first {few.shape[0]} samples change by {change:.1e} (relative) when the rest of the batch is "
            "added, so samples couple or the forward is random; remove what mixes samples (batch-wide attention) or what is random in "
            'evaluation mode, or use batch_norm="batch", which computes the kernel of the whole batch'
        )


def require_float_inputs(inputs: Inputs) -> None:
    """Refuse inputs with NaN or infinity before anything is computed.

    Raises:
        ValueError: an input contains NaN or infinity.
    """
    for position, tensor in enumerate(input_tensors(inputs)):
        # A finite sum proves that all numbers are finite; the converse fails, as the sum may overflow.
        suspect = tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum()))
        if suspect and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"inputs: tensor {position} of shape {tuple(tensor.shape)} contains NaN or infinity; clean the samples"
            )


def require_repeatable(module: StatelessModule, inputs: Inputs) -> None:
    """Refuse a network that is random in evaluation mode.

    Raises:
        ValueError: two forward passes of one batch differ by more than rounding.
    """
    # Gradients stay enabled because the forward may differentiate inside; no parameter asks for a graph.
    first, second = (module.outputs({}, inputs).detach() for _ in range(2))
    change = float((first - second).abs().max())
    if change > torch.finfo(module.dtype).eps ** 0.5 * float(first.abs().max()):
        raise ValueError(
            f"model: two forward passes of one batch differ by {change:.1e}, so the forward is random in evaluation mode; "
            "remove what is random"
        )
