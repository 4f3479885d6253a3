"""Scale and shift after a normalisation: du/dw = sum b * x_hat, du/db = sum b, summed over what they are broadcast to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, LayerRule


class NormalisationRule(LayerRule):
    """A normalisation that ends in ``x_hat * weight + bias``: batch, instance, group, layer and RMS norm.

    The derivative through the statistics is autograd's business (it is in B of the layers below); here x_hat is computed
    once more, by the same function without weight and bias.

    Args:
        function: the function itself.
        signature: its arguments.
        channels: whether weight and bias belong to dimension 1; otherwise to the last dimensions.
    """

    def __init__(self, function: Callable[..., Tensor], signature: str, *, channels: bool) -> None:
        self.function, self.channels = function, channels
        self.signature = signature  # type: ignore[misc]  # one class for five functions

    def holds(self, arguments: Arguments) -> bool:
        """Not with batch statistics, which couple the samples."""
        return not arguments.get("training", False)

    def prepare(self, arguments: Arguments) -> Arguments:
        """With x_hat."""
        plain = {name: value for name, value in arguments.items() if name not in self.parameters}
        return {**arguments, "normalised": self.normalised(plain)}

    def normalised(self, plain: Mapping[str, Any]) -> Tensor:
        """x_hat: the function without weight and bias."""
        return self.function(**plain)

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """(N, K, *weight)."""
        values = gradients * arguments["normalised"][:, None] if slot == "weight" else gradients
        if self.channels:
            return values.flatten(3).sum(3) if values.ndim > 3 else values
        keep = arguments[slot].ndim
        return values.flatten(2, -keep - 1).sum(2) if values.ndim > 2 + keep else values


class BatchNormRule(NormalisationRule):
    """Batch normalisation by running statistics: constants, so the layer is a scale and a shift for each channel."""

    rewrites = True

    def __init__(self) -> None:
        super().__init__(
            F.batch_norm, "input running_mean running_var weight bias training momentum eps", channels=True
        )

    def normalised(self, plain: Mapping[str, Any]) -> Tensor:
        """x_hat, as ``call`` computes it."""
        return self.call(self.function, plain)

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """The same numbers, written so that the backward is one product: torch's own takes twenty times as long on a CPU."""
        values, mean, variance = (arguments[name] for name in ("input", "running_mean", "running_var"))
        if arguments.get("training", False) or mean is None or variance is None or values.ndim < 2:
            return super().call(function, arguments)
        scale = torch.rsqrt(variance + arguments.get("eps", 1e-5))
        if arguments.get("weight") is not None:
            scale = scale * arguments["weight"]
        shift = -mean * scale
        if arguments.get("bias") is not None:
            shift = shift + arguments["bias"]
        shape = (-1, *[1] * (values.ndim - 2))
        shifted: Tensor = values * scale.view(shape) + shift.view(shape)
        return shifted
