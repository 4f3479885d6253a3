"""The sum over layers that every engine returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KernelSum:
    """A kernel with its parts and the proven bound on the rounding of its products and sums."""

    matrix: Tensor
    floor: float
    layer_traces: Mapping[str, float]
    layer_matrices: Mapping[str, Tensor]
