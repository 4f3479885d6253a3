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
    The change is the mean of the slopes in between, :math:`\phi(u + d) - \phi(u) = \sum_{ij} d_{ij} \int_0^1 s_{ij}(u + t d)\, dt`. Where
    each s_ij along d is monotonic, this lies between the sums of the smaller and of the larger of its values at both ends; a hundredth of
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
    shares = torch.stack([each.slope.double() * taken for each in (here, there)])
    low, high = float(shares.amin(0).sum()), float(shares.amax(0).sum())
    walk = math.sqrt(max(float(each.flatten(1).sum(1).square().sum()) for each in shares))
    allowed = SLACK * walk + UNITS * max(here.unit, there.unit) * (here.size + there.size)
    change = there.value - here.value
    if low - allowed <= change <= high + allowed:
        return ""
    return f"the loss changes by {change:.6g} where its gradients say {low:.6g} to {high:.6g}"
