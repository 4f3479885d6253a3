"""``LayerNorms``: how far each layer's weight matrix has moved from its start, and its stable rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_conv.theory.tools.matrix_norms import Distance, distances, spectral_norm


class LayerNorms:
    """Measures the layers of one run; no spectral norm is computed twice.

    |W_l(0)|_2 is computed once per run, |W_l|_2 and |W_l - W_l(0)|_2 at every measurement.
    """

    def __init__(self) -> None:
        self._start: dict[str, float] = {}  # |W_l(0)|_2 by name

    def measure(self, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the largest distance of a layer's weight matrix from its start, and the least and largest stable rank.

        Distances are measured in the spectral and in the Frobenius norm, absolute and relative to the norm at the start. Vectors
        (biases, scales) are left out. A layer that is zero has no stable rank, and one that started at zero no relative distance.

        Args:
            now: weights by name.
            start: the weights at the start of the run, by the same names.

        Cost: two spectral norms per layer; a third one at the first measurement after a resumption.
        """
        ranks: list[float] = []
        moved: list[Distance] = []
        for name in (name for name, weight in now.items() if weight.ndim > 1):
            # Converted once, and one layer at a time: float64 copies of all of them may be too large.
            weight, first = now[name].double().flatten(1), start[name].double().flatten(1)
            norm = spectral_norm(weight)
            if name not in self._start:
                self._start[name] = norm.value if torch.equal(weight, first) else spectral_norm(first).value
            if norm.value > 0:
                ranks.append((float(weight.norm()) / norm.value) ** 2)
            moved += distances({name: weight}, {name: first}, self._start)
        columns = {
            "layer_distance_spectral": [each.spectral.value for each in moved],
            "layer_distance_frobenius": [each.frobenius for each in moved],
            "layer_distance_spectral_relative": [each.relative_spectral for each in moved],
            "layer_distance_frobenius_relative": [each.relative_frobenius for each in moved],
        }
        largest = {name: max(filter(math.isfinite, values), default=math.nan) for name, values in columns.items()}
        largest |= {
            "layer_stable_rank_min": min(ranks, default=math.nan),
            "layer_stable_rank_max": max(ranks, default=math.nan),
        }
        return {name: value for name, value in largest.items() if math.isfinite(value)}
