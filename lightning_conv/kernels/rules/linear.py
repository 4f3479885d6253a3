"""Linear layers with any leading dimensions: du/dW = sum_r b_r a_r^T over the positions r."""

from __future__ import annotations

from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, OuterRule


class LinearRule(OuterRule):
    """``F.linear(input, weight, bias)``: input (N, ..., in), weight (out, in), bias (out)."""

    signature = "input weight bias"

    def factor_inputs(self, arguments: Arguments) -> Tensor:
        """A: (N, R, 1, in)."""
        values: Tensor = arguments["input"]
        return values.reshape(values.shape[0], -1, 1, values.shape[-1])

    def factor_gradients(self, arguments: Arguments, gradients: Tensor) -> Tensor:
        """B: (N, R, 1, out)."""
        del arguments
        return gradients.reshape(gradients.shape[0], -1, 1, gradients.shape[-1])

    def to_parameter(self, arguments: Arguments, outer: Tensor) -> Tensor:
        """(..., 1, out, in) -> (..., out, in)."""
        del arguments
        return outer.squeeze(-3)

    def bias_rows(self, gradients: Tensor) -> Tensor:
        """Summed over the positions."""
        return gradients.flatten(2, -2).sum(2) if gradients.ndim > 3 else gradients
