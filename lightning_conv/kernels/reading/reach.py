"""Parameters that later samples reach but the first ones do not, such as an expert that serves some samples only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_conv.kernels.reading.anatomy import Anatomy
from lightning_conv.machine.memory import blocks
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take

REACH_TARGET = 64 * 2**20
"""Bytes of activations that pass through the network at once; larger blocks are not faster."""

LATE = "the samples that were read do not reach it, others do"


def with_late_parameters(anatomy: Anatomy, module: StatelessModule, sets: Sequence[Inputs], max_memory: int) -> Anatomy:
    """Return an anatomy in which the general engine has those unused parameters that some sample of ``sets`` reaches.

    A parameter is reached if the graph of autograd leads from the outputs to it, whatever the value of its derivative.
    So the derivative by a parameter that remains unused is exactly zero for every sample.

    Args:
        anatomy: what was found on the first samples.
        module: the network that was read.
        sets: all samples of the kernel.
        max_memory: number of bytes that may be used.

    Cost: nothing if all parameters are used. Otherwise one forward over all samples, which builds a graph for the
    unused parameters only.
    """
    unused = list(anatomy.unused)
    rows = max(1, min(REACH_TARGET, max_memory // 4) // max(1, anatomy.forward_bytes))
    late: list[str] = []
    for inputs in sets:
        for block in blocks(sample_count(inputs), rows):
            if unused:
                late += (found := _reached(module, unused, anatomy.arranged(take(inputs, block))))
                unused = [name for name in unused if name not in found]
    return anatomy.with_general({name: module.parameters[name].numel() for name in late}, LATE) if late else anatomy


def _reached(module: StatelessModule, names: Sequence[str], inputs: Inputs) -> list[str]:
    leaves = {name: module.parameters[name].detach().requires_grad_() for name in names}
    outputs = module.outputs(leaves, inputs)
    if not outputs.requires_grad:
        return []
    found = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    return [name for name, gradient in zip(names, found, strict=True) if gradient is not None]
