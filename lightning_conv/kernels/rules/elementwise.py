"""Parameters that a forward adds, multiplies or expands: position embeddings, class tokens, gates and scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, LayerRule


def unbroadcast(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum (N, K, *output) over the dimensions to which a parameter was broadcast, and return (N, K, *shape).

    The parameter must not have a row per sample: if it extends to dimension 0 of the output, its size there is 1.
    """
    extra = values.ndim - 1 - len(shape)  # dimensions of the output (samples among them) that the parameter lacks
    rest = shape if extra > 0 else shape[1:]
    summed = values.flatten(2, extra).sum(2) if extra > 1 else values
    ones = [2 + k for k, size in enumerate(rest) if size == 1 and summed.shape[2 + k] != 1]
    if ones:
        summed = summed.sum(ones, keepdim=True)
    return summed.reshape(*values.shape[:2], *shape)


class _Broadcast(LayerRule):
    def sampled(self, arguments: Arguments, output: Tensor) -> dict[str, Tensor]:
        """Return nothing, since the derivative needs only the shapes of the parameter and of the output."""
        del arguments, output
        return {}

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """Sum over the broadcast dimensions; see ``LayerRule.rows``."""
        return unbroadcast(gradients, arguments[slot].shape)


class _Elementwise(_Broadcast):
    signature = "input other"
    parameters = ("input", "other")

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """Call by position, since the methods of ``Tensor`` do not name their first argument."""
        return function(*arguments.values())

    def holds(self, arguments: Arguments) -> bool:
        """Return whether the arguments are two floating-point tensors and nothing else."""
        return all(isinstance(v, Tensor) and v.is_floating_point() for v in arguments.values()) and len(arguments) == 2


class SumRule(_Elementwise):
    """Rule of ``x + p`` and ``p + x``."""


class DifferenceRule(_Elementwise):
    """Rule of ``x - p`` and ``p - x``."""

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """Apply the sign of the operand and sum over the broadcast dimensions; see ``LayerRule.rows``."""
        sign = 1 if slot == "input" else -1
        return sign * unbroadcast(gradients, arguments[slot].shape)


class ProductRule(_Elementwise):
    """Rule of ``x * p`` and ``p * x``, whose derivative is the other factor."""

    def sampled(self, arguments: Arguments, output: Tensor) -> dict[str, Tensor]:
        """Return both factors, broadcast to the output; the caller puts the parameter itself back."""
        return {name: value.expand(output.shape) for name, value in arguments.items()}

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """Sum over the broadcast dimensions; see ``LayerRule.rows``."""
        factor = arguments["other" if slot == "input" else "input"]
        return unbroadcast(gradients * factor[:, None], arguments[slot].shape)


class ExpandRule(_Broadcast):
    """Rule of ``p.expand(n, ...)``: one copy per sample, as for a class token."""

    signature = "input"
    parameters = ("input",)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameter, and the arguments that give the target shape."""
        return {"input": args[0], "to": (args[1:], dict(kwargs))}

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """Expand the parameter."""
        args, kwargs = arguments["to"]
        return function(arguments["input"], *args, **kwargs)
