"""``KernelSum``: a kernel as a sum over layers, which is what every engine returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KernelSum:
    """A kernel with its summands, and a bound on the rounding errors of its products and sums."""

    matrix: Tensor  # float64
    floor: float  # proven bound on the spectral norm of the rounding error
    layer_traces: Mapping[str, float]
    layer_matrices: Mapping[str, Tensor]  # empty unless they were asked for
    projection_error: float = 0.0  # standard error of a projected kernel, in the Frobenius norm
