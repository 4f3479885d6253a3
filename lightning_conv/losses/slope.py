"""``wrong_slope``: whether what the backward pass gives is the gradient of the value, which code of its own need not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.losses.of_outputs import OutputLoss, Point, evaluate

STEP = 1e-2  # of the larger of 1 and the root mean square of u
SLACK = 1e-2  # part of the random walk of the samples' shares, for what a step of this size misses
UNITS = 16  # of rounding, of |phi| + sum |s u|


def wrong_slope(loss: OutputLoss, outputs: Tensor, seed: int = 0) -> str:
    r"""Return how the change of a loss along one random step differs from what its gradients make of it; empty if it does not.

    The step d, of random signs, starts at normally distributed outputs u, where no sample is fitted (the loss of a fitted one is rounding).
    The mean value theorem gives :math:`\phi(u + d) - \phi(u) = \nabla \phi(v) \cdot d` for some v in between. Where the slope along d is
    monotonic, as for convex losses, this lies between its values at both ends; a hundredth of
    :math:`(\sum_i (s_i \cdot d_i)^2)^{1/2}` and 16 units of rounding are allowed beside. A custom ``autograd.Function``, a reversed
    gradient, or samples that get none are seen so, in this direction.

    Args:
        loss: phi.
        outputs: The present outputs, (n, ...), whose size, if above 1, is that of d times 100.
        seed: Seed of u and d.

    Cost: two evaluations; three where they differ.
    """
    generator = torch.Generator().manual_seed(seed)
    size = STEP * max(1.0, float(outputs.double().square().mean().sqrt()))
    signs = torch.randint(0, 2, outputs.shape, generator=generator, dtype=torch.float64) * 2 - 1
    here = evaluate(loss, torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs))
    found = _unlike(loss, here, (size * signs).to(outputs))
    if found and size > STEP:  # over a longer step the slope may rise and fall
        found = _unlike(loss, here, (STEP * signs).to(outputs))
    return found


def _unlike(loss: OutputLoss, here: Point, step: Tensor) -> str:
    there = evaluate(loss, here.outputs + step)
    if not (here.finite and there.finite):
        return ""
    taken = there.outputs.double() - here.outputs.double()  # as it was rounded
    shares = [(each.slope.double() * taken).flatten(1).sum(1) for each in (here, there)]
    low, high = sorted(float(each.sum()) for each in shares)
    walk = math.sqrt(max(float(each.square().sum()) for each in shares))
    allowed = SLACK * walk + UNITS * torch.finfo(step.dtype).eps * (here.size + there.size)
    change = there.value - here.value
    if low - allowed <= change <= high + allowed:
        return ""
    return f"the loss changes by {change:.6g} where its gradients say {low:.6g} to {high:.6g}"
