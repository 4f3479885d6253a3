"""Which outputs of a sample are compared between batches, where those of all samples do not fit into the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, take

LEAST = 2**16
"""Outputs of a sample that are compared whatever room there is (all of them where there are fewer)."""


def compared_outputs(outputs: int, samples: int, width: int, room: float) -> int | None:
    """Return how many of the outputs of each sample are compared, so that those of all samples fit; None: all of them.

    Args:
        outputs: number of outputs of a sample.
        samples: number of samples.
        width: bytes of a number.
        room: bytes that they may take.
    """
    fit = max(LEAST, int(room) // max(1, samples * width))
    return None if outputs <= fit else fit


def drawn_outputs(module: StatelessModule, inputs: Inputs, compared: int) -> Tensor | None:
    """Return the numbers of outputs that are drawn, in order; None: there are no more than that.

    Args:
        module: the network.
        inputs: its samples, of which the first is evaluated.
        compared: how many are drawn.
    """
    outputs = module.outputs({}, take(inputs, slice(1))).shape[1]
    if outputs <= compared:
        return None
    generator = torch.Generator().manual_seed(0)
    # One of each of so many equal parts, so that they cover all positions and words without a permutation of all outputs.
    parts = torch.arange(compared, dtype=torch.float64) + torch.rand(compared, generator=generator, dtype=torch.float64)
    return (parts * (outputs / compared)).long().clamp_(max=outputs - 1)
