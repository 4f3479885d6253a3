"""``outputs_on``: the outputs of a network on the samples of a probe."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.state import restored
from lightning_conv.networks.undisturbed import undisturbed

SAMPLES_AT_ONCE = 128
"""Samples that go through the network together for its outputs alone."""


def outputs_on(network: nn.Module, inputs: Inputs, batch_norm: BatchNormMode, *, shaped: bool) -> Tensor:
    """Return u on some samples, (m, C), in the network's type, without dropout.

    Args:
        network: The network, on the device of the samples.
        inputs: The samples.
        batch_norm: See ``Probe``.
        shaped: Whether in the shape that the network gives, (m, ...), as losses take it.
    """
    with isolated(), restored(network), undisturbed(network), torch.no_grad():
        module = StatelessModule(network, batch_norm=batch_norm, statistics_of=inputs)
        converted = module.convert(inputs)
        starts = range(0, sample_count(inputs), SAMPLES_AT_ONCE)
        parts = [take(converted, slice(s, s + SAMPLES_AT_ONCE)) for s in starts]
        made = torch.cat([module.outputs({}, part) for part in parts])
        if not shaped:
            return made
        one = module.call({}, parts[0])
        rest = one.shape[1:] if isinstance(one, Tensor) and len(one) == sample_count(parts[0]) else made.shape[1:]
        return made.reshape(len(made), *rest)
