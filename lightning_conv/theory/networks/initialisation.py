"""Linear layers with drawn weights, for the networks of the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

_Layer = TypeVar("_Layer", bound=nn.Module)


def undrawn(layer: Callable[..., _Layer], *arguments: Any, **settings: Any) -> _Layer:
    """Make a layer of torch on the CPU whose weights are not initialised; the caller sets them.

    Made without memory first: the layer would otherwise draw weights of its own, from the global random state.
    """
    return layer(*arguments, **settings, device="meta").to_empty(device="cpu")


def gaussian(inputs: int, outputs: int, std: float, generator: torch.Generator, dtype: torch.dtype) -> nn.Linear:
    """A linear layer without bias whose entries are N(0, std^2).

    Drawn in float64 whatever ``dtype``, so that networks of two precisions begin at the same weights.

    Args:
        inputs: length of its input.
        outputs: length of its result.
        std: standard deviation of an entry.
        generator: gives the numbers; the global random state is left alone.
        dtype: of the weights.
    """
    layer = undrawn(nn.Linear, inputs, outputs, bias=False, dtype=dtype)
    drawn = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) * std
    with torch.no_grad():
        layer.weight.copy_(drawn)
    return layer


def signs(count: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """A vector of -1 and 1, each with probability one half."""
    return (2 * torch.randint(2, (count,), generator=generator) - 1).to(dtype)


def require_sizes(**sizes: int) -> None:
    """Refuse sizes below 1.

    Raises:
        ValueError: names the first of them.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size}; need 1 or more")
