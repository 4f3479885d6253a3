"""Parameters that a forward adds, multiplies or expands by itself: position embeddings, class tokens, gates, scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, LayerRule


def unbroadcast(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum (N, K, *output) over the dimensions that a parameter of ``shape`` was broadcast to: (N, K, *shape).

    The parameter must not have samples of its own: where it reaches as far as dimension 0 of the output, its size is 1
    there.
    """
    extra = values.ndim - 1 - len(shape)  # dimensions of the output (samples among them) that the parameter lacks
    if extra > 0:
        summed = values.flatten(2, 1 + extra - 1).sum(2) if extra > 1 else values
        first = 2
        rest = shape
    else:
        summed, first, rest = values, 2, shape[1:]
    ones = [first + k for k, size in enumerate(rest) if size == 1 and summed.shape[first + k] != 1]
    if ones:
        summed = summed.sum(ones, keepdim=True)
    return summed.reshape(*values.shape[:2], *shape)


class _Elementwise(LayerRule):
    signature = "input other"
    parameters = ("input", "other")

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """By position: the methods of ``Tensor`` do not name their first argument."""
        return function(*arguments.values())

    def sampled(self, arguments: Arguments, output: Tensor) -> dict[str, Tensor]:
        """None for a sum: its derivative does not depend on what is added."""
        del arguments, output
        return {}

    def holds(self, arguments: Arguments) -> bool:
        """Two floating tensors and nothing else."""
        return all(isinstance(v, Tensor) and v.is_floating_point() for v in arguments.values()) and len(arguments) == 2

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """(N, K, *parameter)."""
        return unbroadcast(gradients, arguments[slot].shape)


class SumRule(_Elementwise):
    """``x + p`` and ``p + x``."""


class DifferenceRule(_Elementwise):
    """``x - p`` and ``p - x``."""

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """With the sign of the operand."""
        sign = 1 if slot == "input" else -1
        return sign * unbroadcast(gradients, arguments[slot].shape)


class ProductRule(_Elementwise):
    """``x * p`` and ``p * x``: the derivative carries the other factor."""

    def sampled(self, arguments: Arguments, output: Tensor) -> dict[str, Tensor]:
        """Both, broadcast to the output; the parameter itself is put back by the caller."""
        return {name: value.expand(output.shape) for name, value in arguments.items()}

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """(N, K, *parameter)."""
        factor = arguments["other" if slot == "input" else "input"]
        return unbroadcast(gradients * factor[:, None], arguments[slot].shape)


class ExpandRule(LayerRule):
    """``p.expand(n, ...)``: one copy a sample, as of a class token."""

    signature = "input"
    parameters = ("input",)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The parameter, and whatever says where to."""
        return {"input": args[0], "to": (args[1:], dict(kwargs))}

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """Expand."""
        args, kwargs = arguments["to"]
        return function(arguments["input"], *args, **kwargs)

    def sampled(self, arguments: Arguments, output: Tensor) -> dict[str, Tensor]:
        """None: where the parameter was expanded to is seen from the output."""
        del arguments, output
        return {}

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """(N, K, *parameter)."""
        return unbroadcast(gradients, arguments[slot].shape)
