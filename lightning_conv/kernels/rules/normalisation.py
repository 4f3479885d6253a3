"""Weight and bias after a normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, LayerRule


class NormalisationRule(LayerRule):
    r"""Rule of normalisations that end in ``x_hat * weight + bias``: batch, instance, group, layer and RMS norm.

    With output gradients b and sums over the dimensions to which the parameters are broadcast,

    .. math:: \partial u / \partial \text{weight} = \sum b \, \hat x, \qquad \partial u / \partial \text{bias} = \sum b .

    x_hat is computed once more, by the same function without weight and bias. The derivative through the statistics
    does not enter here; autograd includes it in B of the layers below.

    Args:
        function: the normalisation as a function of torch.
        signature: names of its arguments.
        channels: whether weight and bias belong to dimension 1; otherwise they belong to the last dimensions.
    """

    def __init__(self, function: Callable[..., Tensor], signature: str, *, channels: bool) -> None:
        self.function, self.channels = function, channels
        self.signature = signature  # type: ignore[misc]  # one class for five functions

    def holds(self, arguments: Arguments) -> bool:
        """Return False for batch statistics, which couple the samples."""
        return not arguments.get("training", False)

    def prepare(self, arguments: Arguments) -> Arguments:
        """Add x_hat to the arguments."""
        plain = {name: value for name, value in arguments.items() if name not in self.parameters}
        return {**arguments, "normalised": self.normalised(plain)}

    def normalised(self, plain: Mapping[str, Any]) -> Tensor:
        """Compute x_hat, by the function without weight and bias."""
        return self.function(**plain)

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """Return the derivatives, (N, K, *parameter); see ``LayerRule.rows``."""
        values = gradients * arguments["normalised"][:, None] if slot == "weight" else gradients
        if self.channels:
            return values.flatten(3).sum(3) if values.ndim > 3 else values
        keep = arguments[slot].ndim
        return values.flatten(2, -keep - 1).sum(2) if values.ndim > 2 + keep else values


class BatchNormRule(NormalisationRule):
    """Rule of batch normalisation with running statistics, which are constants: it scales and shifts each channel."""

    rewrites = True

    def __init__(self) -> None:
        super().__init__(
            F.batch_norm, "input running_mean running_var weight bias training momentum eps", channels=True
        )

    def normalised(self, plain: Mapping[str, Any]) -> Tensor:
        """Compute x_hat as ``call`` does."""
        return self.call(self.function, plain)

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """Compute the same numbers so that the backward is a single product.

        That of torch takes twenty times as long on a CPU.
        """
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
