"""``outputs_on``: the outputs of a network on the samples of a probe."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.networks.batch_norm import BatchStatistics
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.state import restored
from lightning_conv.networks.undisturbed import undisturbed

SAMPLES_AT_ONCE = 128
"""Samples that go through the network together for its outputs alone."""


def outputs_on(network: nn.Module, inputs: Inputs, batch_norm: BatchNormMode) -> tuple[Tensor, BatchStatistics | None]:
    """Return u on some samples in the shape that the network gives, (m, ...), in its type, without dropout.

    Args:
        network: The network, on the device of the samples.
        inputs: The samples.
        batch_norm: See ``Probe``.

    Returns:
        u, and the statistics of the samples in the BatchNorm layers with ``"frozen"``; None: there are none.

    Cost: one forward; of more than ``SAMPLES_AT_ONCE`` samples one more with ``"frozen"`` where there is BatchNorm.
    """
    with isolated(), restored(network), undisturbed(network), torch.no_grad():
        module = StatelessModule(network, batch_norm=batch_norm, statistics_of=inputs)
        samples = sample_count(inputs)
        if (
            module.statistics is not None and samples <= SAMPLES_AT_ONCE
        ):  # the forward that has found them gave the outputs
            return _shaped(module, inputs, module.statistics.made), module.statistics
        converted = module.convert(inputs)
        parts = [take(converted, slice(s, s + SAMPLES_AT_ONCE)) for s in range(0, samples, SAMPLES_AT_ONCE)]
        return torch.cat([_shaped(module, part, module.call({}, part)) for part in parts]), module.statistics


def _shaped(module: StatelessModule, inputs: Inputs, found: object) -> Tensor:
    """Return the outputs in their own shape, or as rows where they have none of their own (``StatelessModule.outputs``)."""
    if isinstance(found, Tensor) and found.dtype == module.dtype and found.shape[:1] == (sample_count(inputs),):
        return found
    return module.outputs({}, inputs)
