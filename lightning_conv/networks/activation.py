"""Activation functions as the theorems use them: elementwise, with a derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

Activation: TypeAlias = Callable[[Tensor], Tensor]
"""An elementwise function, such as ``nn.Tanh()`` or ``torch.tanh``."""


def derivative(activation: Activation, values: Tensor) -> Tensor:
    """sigma'(z), elementwise by autograd; of the shape of ``values``, detached. Works under ``no_grad`` too.

    At a kink it is what autograd says: 0 for ReLU at 0.

    Args:
        activation: elementwise sigma.
        values: z.

    Raises:
        ValueError: the result has another shape, so it is not elementwise.
    """
    with torch.inference_mode(False), torch.enable_grad():
        z = values.detach().clone().requires_grad_()
        result = activation(z)
        if result.shape != z.shape:
            raise ValueError(
                f"activation: {activation!r} makes shape {tuple(result.shape)} of {tuple(z.shape)}; need an elementwise function"
            )
        if not result.requires_grad:  # a constant
            return torch.zeros_like(values)
        (slope,) = torch.autograd.grad(result.sum(), z)
    return slope


def largest_slope(activation: Activation) -> float:
    """L = sup |sigma'|, the Lipschitz constant, as the largest on a grid of spacing 1e-3 over [-50, 50].

    An estimate from below, off by the square of the spacing times its third derivative over 8 for a smooth sigma; exact for ReLU, softplus,
    tanh and others that are steepest at 0 or far out. A sigma that grows faster than linearly has no L.

    Args:
        activation: elementwise sigma.

    Example:
        >>> largest_slope(nn.Tanh())
        1.0
    """
    return float(derivative(activation, torch.linspace(-50, 50, 100_001, dtype=torch.float64)).abs().max())


def is_relu(activation: Activation) -> bool:
    """Whether it is ReLU, in one of torch's own forms."""
    return type(activation) is nn.ReLU or activation in (torch.relu, nn.functional.relu)
