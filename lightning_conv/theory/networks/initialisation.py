"""Layers whose weights are drawn as in the papers, from a separate generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

_Layer = TypeVar("_Layer", bound=nn.Module)


def undrawn(layer: Callable[..., _Layer], *arguments: Any, **settings: Any) -> _Layer:
    """Construct a torch layer on the CPU whose weights are not initialised; the caller sets them.

    The layer is first constructed on the meta device, because torch would otherwise draw weights from the global random state.
    """
    return layer(*arguments, **settings, device="meta").to_empty(device="cpu")


def gaussian(inputs: int, outputs: int, std: float, generator: torch.Generator, dtype: torch.dtype) -> nn.Linear:
    """Construct a linear layer without bias whose entries are drawn from N(0, std^2).

    The numbers are drawn in float64 for every ``dtype``, so that networks of two precisions start from the same
    weights.

    Args:
        inputs: Length of an input.
        outputs: Length of an output.
        std: Standard deviation of an entry.
        generator: Draws the numbers; the global random state is not used.
        dtype: Type of the weights.
    """
    layer = undrawn(nn.Linear, inputs, outputs, bias=False, dtype=dtype)
    drawn = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) * std
    with torch.no_grad():
        layer.weight.copy_(drawn)
    return layer


def signs(count: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Draw a vector of -1 and 1, each with probability 1/2."""
    return (2 * torch.randint(2, (count,), generator=generator) - 1).to(dtype)


def require_sizes(**sizes: int) -> None:
    """Refuse sizes below 1.

    Raises:
        ValueError: A size is below 1; the message names the first one.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size}; need 1 or more")
