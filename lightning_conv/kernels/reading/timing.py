"""How long one sample of a large network takes where it passes through the network by itself, as the passes of a kernel have it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.reading.recording import layer_gradients, record
from lightning_conv.machine.clock import now
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.narrow_watch import NarrowWatch


@dataclass(frozen=True)
class AloneTiming:
    """Seconds of one sample by itself. Products of few rows run at a lower rate, and float64 is watched for narrower types."""

    forward: float  # recorded, with its graph
    backward: float  # by the outputs of the layers
    measuring: float  # of the rounding of its gradient: two gradients, and one in the other precision
    outside: bool  # whether numbers from outside of torch enter the forward, which is then evaluated twice more


def time_alone(
    module: StatelessModule,
    sample: Inputs,
    combination: Tensor,
    tracked: Mapping[str, Tensor],
    *,
    gradient: float,
    difference: float,
) -> AloneTiming:
    """Time the forward and the backward of one sample.

    Args:
        module: the network, inside ``undisturbed``.
        sample: the sample, in the layout in which it is passed.
        combination: of its outputs, (1, C).
        tracked: parameters whose uses are recorded.
        gradient: seconds that its gradient by the parameters has taken.
        difference: seconds that the comparison with the other precision has taken.

    Cost: one forward and one backward of it.
    """
    watch = NarrowWatch(module, sample) if module.dtype == torch.float64 else None
    with nullcontext() if watch is None else watch.watching():
        start = now(module.device)
        outputs, recorder = record(module, sample, tracked)
        middle = now(module.device)
        layer_gradients(outputs, combination, recorder.calls, keep=False)
        end = now(module.device)
    outside = watch is not None and bool(watch.from_outside)
    return AloneTiming(middle - start, end - middle, 2 * gradient + difference, outside)
