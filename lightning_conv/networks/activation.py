"""Activation functions as the theorems use them: elementwise, with a derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

Activation: TypeAlias = Callable[[Tensor], Tensor]
"""An elementwise function, such as ``nn.Tanh()`` or ``torch.tanh``."""


def derivative(activation: Activation, values: Tensor) -> Tensor:
    """Compute sigma'(z) elementwise by autograd, also under ``no_grad``.

    At a kink the result is that of autograd, such as 0 for ReLU at 0.

    Args:
        activation: elementwise sigma.
        values: pre-activations z, of any shape.

    Returns:
        The derivative, detached, of the shape of ``values``.

    Raises:
        ValueError: the result has another shape, so sigma is not elementwise.
    """
    with torch.inference_mode(False), torch.enable_grad():
        z = values.detach().clone().requires_grad_()
        result = activation(z)
        if result.shape != z.shape:
            raise ValueError(
                f"activation: {activation!r} turns shape {tuple(z.shape)} into {tuple(result.shape)}; need an elementwise function"
            )
        if not result.requires_grad:  # a constant function
            return torch.zeros_like(values)
        (slope,) = torch.autograd.grad(result.sum(), z)
    return slope


def largest_slope(activation: Activation) -> float:
    """Estimate the Lipschitz constant L = sup |sigma'| by the largest slope on a grid of spacing 1e-3 over [-50, 50].

    This is an estimate from below. For a smooth sigma it errs by at most the square of the spacing times |sigma'''| / 8.
    It is exact for ReLU, softplus, tanh and other activations that are steepest at 0 or far out. An activation that grows
    faster than linearly has no L.

    Args:
        activation: elementwise sigma.

    Example:
        >>> largest_slope(nn.Tanh())
        1.0
    """
    return float(derivative(activation, torch.linspace(-50, 50, 100_001, dtype=torch.float64)).abs().max())


def is_relu(activation: Activation) -> bool:
    """Return whether the activation is ReLU, in one of torch's own forms."""
    return type(activation) is nn.ReLU or activation in (torch.relu, nn.functional.relu)
