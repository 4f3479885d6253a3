"""Linear layers with any leading dimensions."""

from __future__ import annotations

from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, OuterRule


class LinearRule(OuterRule):
    r"""Rule of ``F.linear(input, weight, bias)`` with input (N, ..., in), weight (out, in) and bias (out).

    With a_r the input and b_r the output gradient at position r,

    .. math:: \partial u / \partial W = \sum_r b_r a_r^T, \qquad \partial u / \partial \text{bias} = \sum_r b_r .

    Source: Goodfellow 2015 (1510.01799), per-example gradients of one position; Rochette et al. 2019 (1912.06015), of
    several.
    """

    signature = "input weight bias"

    def factor_inputs(self, arguments: Arguments) -> Tensor:
        """Return A, the inputs as (N, R, 1, in)."""
        values: Tensor = arguments["input"]
        return values.reshape(values.shape[0], -1, 1, values.shape[-1])

    def factor_gradients(self, arguments: Arguments, gradients: Tensor) -> Tensor:
        """Return B, the output gradients as (N, R, 1, out)."""
        del arguments
        return gradients.reshape(gradients.shape[0], -1, 1, gradients.shape[-1])

    def to_parameter(self, arguments: Arguments, outer: Tensor) -> Tensor:
        """Drop the group: (..., 1, out, in) -> (..., out, in)."""
        del arguments
        return outer.squeeze(-3)

    def bias_rows(self, gradients: Tensor) -> Tensor:
        """Sum the gradients over the positions."""
        return gradients.flatten(2, -2).sum(2) if gradients.ndim > 3 else gradients
