"""Whether the gradients of samples change with their batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils import get_total_norm

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs


def change_of_gradient(
    module: StatelessModule, together: Inputs, alone: Sequence[Inputs], names: Sequence[str]
) -> float:
    r"""Return :math:`|g - \sum_i g_i| / \sum_i |g_i|` with g the gradient of v . u, v random, and g_i that of sample i evaluated alone.

    Args:
        module: the network.
        together: the samples as one batch.
        alone: each of them as a batch.
        names: parameters by which.
    """
    weights = {name: module.parameters[name].detach().requires_grad_() for name in names}
    generator = torch.Generator().manual_seed(0)
    apart, scale, drawn = [torch.zeros_like(each) for each in weights.values()], 0.0, torch.empty(0)
    for number, inputs in enumerate((together, *alone)):  # one graph at a time
        with torch.enable_grad():
            u = module.outputs(weights, inputs)
        if not u.requires_grad:  # the outputs depend on none of them
            return 0.0
        if number == 0:
            drawn = torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u)
        vector = drawn if number == 0 else drawn[number - 1 : number]
        found = torch.autograd.grad(u, [*weights.values()], vector, allow_unused=True, materialize_grads=True)
        for sum_, each in zip(apart, found, strict=True):
            sum_.add_(each, alpha=-1.0 if number else 1.0)
        scale += float(get_total_norm(found)) if number else 0.0
    return float(get_total_norm(apart)) / scale if scale > 0 else 0.0
