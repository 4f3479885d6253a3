"""``step_departure``: how far a step of the run, seen on the weights, is off a gradient step on the known loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_conv.losses.gradient import norm, wide

SAME_STEP = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative deviation from -h grad f up to which rounding is not looked into; float32 may mean TF32 on a GPU."""

SAFETY = 10.0
"""Factor on the estimated rounding error of a gradient: the run's own gradient is another evaluation of it."""


def step_departure(
    moved: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    step: float,
    again: Callable[[torch.dtype], Mapping[str, Tensor]],
) -> tuple[float, float]:
    """Return |w_{t+1} - w_t + h grad f_t| / (h |grad f_t|), and an estimate of what rounding may contribute to it.

    Args:
        moved: w_{t+1} - w_t.
        before: w_t.
        gradient: of f at w_t.
        step: h.
        again: function of a type that returns the same gradient, computed in that type.

    Returns:
        The relative deviation and its rounding error; NaN for both where the step or the gradient is zero or not known.

    Cost: one gradient in the other precision if the deviation exceeds ``SAME_STEP`` and the rounding of the weights.
    Near a minimum a gradient is a small difference of large numbers, so its error is measured.
    """
    size = step * norm(gradient)
    if not size > 0:
        return math.nan, math.nan
    off = {name: wide(change.to(gradient[name].device)) + step * wide(gradient[name]) for name, change in moved.items()}
    own = next(iter(gradient.values())).dtype
    departure, rounding = norm(off) / size, SAME_STEP[own] + torch.finfo(own).eps * norm(before) / size
    if departure <= rounding:
        return departure, rounding
    other = again(torch.float32 if own == torch.float64 else torch.float64)
    error = norm({name: wide(value) - wide(gradient[name]) for name, value in other.items()})
    scale = 16 * 2.0**-29 if own == torch.float64 else 1.0  # from float32 to float64, with room
    return departure, rounding + SAFETY * scale * error / norm(gradient)
