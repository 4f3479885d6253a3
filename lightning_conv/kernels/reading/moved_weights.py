"""What is found of a network where the gradients of some layers vanish, such as behind a low-rank adapter that is zero at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.reading.jacobian_error import parameter_gradients
from lightning_conv.kernels.reading.recording import LayerCall, layer_gradients, record, signature_of
from lightning_conv.kernels.reading.sample_axis import SampleAxis, sample_axes
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs

MOVE = 0.1
"""Standard deviation of the numbers that take the place of zeros."""


@dataclass(frozen=True)
class MovedReading:
    """The calls of a forward at other weights, with their gradients."""

    calls: Sequence[LayerCall]
    gradients: Sequence[Tensor]  # B of each call
    axes: Mapping[int, SampleAxis]
    truth: Mapping[str, Tensor | None]  # gradients of autograd there


def silent_calls(plain: Sequence[Tensor | None], axes: Mapping[int, SampleAxis]) -> set[int]:
    """Return the calls whose B is zero, so that it tells neither where the samples are nor whether a rule is right.

    Args:
        plain: B of each call; None where the outputs do not depend on it.
        axes: where the samples are known to be.
    """
    return {k for k, each in enumerate(plain) if each is not None and k not in axes and not bool(each.any())}


def read_at_moved_weights(
    module: StatelessModule,
    names: Sequence[str],
    tracked: Mapping[str, Tensor],
    given: Inputs,
    probe: Inputs,
    *,
    mixture: Tensor,
    combination: Tensor,
    weights: Tensor,
    tolerance: float,
    signature: tuple[tuple[str, ...], ...],
) -> MovedReading | None:
    """Look at a network with random numbers in place of the parameters that are zero; its own are left alone.

    A zero factor hides the gradients of all that lies behind it: in y = W x + B A x with B = 0 that of A. Which dimension has the
    samples and which rule a layer obeys does not depend on the weights, and is seen where they are not zero.

    Args:
        module: the network.
        names: parameters to differentiate by.
        tracked: parameters whose uses are recorded.
        given: the samples, in the layout in which layers are read.
        probe: those of them whose gradients are compared, in the layout of the caller.
        mixture: combinations of the outputs of ``given``.
        combination: those of ``probe``.
        weights: of the samples, see ``sample_axes``.
        tolerance: relative deviation that counts as rounding.
        signature: of the calls at the network's own weights.

    Returns:
        What is found there; None: no parameter is zero, or the forward takes another way there, or fails.

    Raises:
        OutOfMemoryError: the device is out of memory.

    Cost: one forward and two backward passes of ``given``, and one of each for ``probe``.
    """
    generator = torch.Generator().manual_seed(3)
    moved = {
        name: (MOVE * torch.randn(each.shape, generator=generator)).to(each)
        for name, each in module.parameters.items()
        if not bool(each.any())
    }
    if not moved:
        return None
    try:
        outputs, recorder = record(
            module, given, {name: moved.get(name, each) for name, each in tracked.items()}, moved
        )
        calls = recorder.calls
        if signature_of(calls) != signature:
            return None
        plain = layer_gradients(outputs, mixture, calls, keep=True)
        weighted = layer_gradients(outputs, weights[:, None] * mixture, calls, keep=False)
        return MovedReading(
            calls=calls,
            gradients=[outputs.new_zeros(call.shape) if b is None else b for call, b in zip(calls, plain, strict=True)],
            axes=sample_axes(calls, plain, weighted, weights, tolerance),
            truth=parameter_gradients(module, names, probe, combination, moved),
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, ArithmeticError):  # a forward that checks its own weights
        return None
