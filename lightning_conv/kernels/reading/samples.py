"""The samples of a kernel: whether they may be used, whether they couple, and how they are laid out in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


COMPARED = 16
"""Number of samples among which a coupling is looked for."""


def check_samples_do_not_couple(
    outputs_of: Callable[[Tensor], Tensor], samples: int, few: Tensor | None = None, level: float = 0.0
) -> None:
    """Refuse a network whose output for a sample changes with the others in its batch, or with their order.

    The kernel of a pair of samples would then not be defined. Up to 16 samples are evaluated in their order, in reverse order,
    without those behind the first few, and without the first one: a sample may see all others, or only those before it, as in a
    cumulative sum over the batch.

    Args:
        outputs_of: the outputs of the samples with these indices, in this order, (k, ...) for (k,).
        samples: number of samples.
        few: outputs of the first samples alone, where they are known already; None: they are computed.
        level: size of the terms that add up to an output; where they cancel, what remains is rounding.

    Raises:
        ValueError: the outputs change by more than rounding.

    Cost: four forwards of up to 16 samples, three where ``few`` is given.
    """
    count = min(COMPARED, samples)
    order = torch.arange(count)
    whole = outputs_of(order)
    few = outputs_of(order[: max(1, min(3, count - 1))]) if few is None else few
    _compare(
        few, whole[: len(few)], f"of the first {len(few)} samples", "when the rest of the batch is added", whole, level
    )
    if count > 1:
        _compare(outputs_of(order.flip(0)).flip(0), whole, "of a sample", "with the order of the batch", whole, level)
        _compare(
            outputs_of(order[1:]), whole[1:], "of the other samples", "when the first sample is left out", whole, level
        )


def _compare(found: Tensor, expected: Tensor, whose: str, when: str, whole: Tensor, level: float) -> None:
    tolerance = torch.finfo(whole.dtype).eps ** 0.5
    scale = max(float(whole.abs().max()), tolerance * level, torch.finfo(whole.dtype).tiny)
    change = float((found - expected).abs().max()) / scale
    if change > tolerance:
        raise ValueError(
            f"model: the outputs {whose} change by {change:.1e} (relative) {when}, so samples couple or the forward is random; "
            "remove what mixes samples (batch-wide attention, a sum along the batch) or what is random in evaluation mode, or use "
            'batch_norm="batch", which computes the kernel of the whole batch'
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
