"""``LayerNorms``: how far every layer's weight matrix is from its start, and its stable rank, with no spectral norm taken twice."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_conv.theory.matrix_norms import distances, spectral_norm, stable_rank


class LayerNorms:
    """Follows one run: |W_l(0)|_2 is computed once, |W_l|_2 and |W_l - W_l(0)|_2 at every measurement."""

    def __init__(self) -> None:
        self._start: dict[str, float] = {}  # |W_l(0)|_2 by name

    def quantities(self, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, float]:
        """Largest distance of a layer's weight matrix from its start, in two norms, absolute and relative; least and largest stable rank.

        Vectors (biases, scales) are left out. A layer that is zero has no stable rank, and one that started at zero no relative distance.

        Args:
            now: weights by name.
            start: the same at the start of the run.

        Cost: two spectral norms a layer, of which a matrix that has not moved saves one; a third one once a run. Each is all singular
            values to 96 rows or columns, beyond that 20 to 80 products.
        """
        ranks = []
        for name, weight in now.items():
            if weight.ndim < 2:
                continue
            norm = spectral_norm(weight.flatten(1))
            if name not in self._start:
                same = torch.equal(weight, start[name])
                self._start[name] = norm.value if same else spectral_norm(start[name].flatten(1)).value
            if norm.value > 0:
                ranks.append(stable_rank(weight.flatten(1), norm).value)
        moved = distances(now, start, self._start)
        found = {
            "layer_distance_spectral": [each.spectral.value for each in moved],
            "layer_distance_frobenius": [each.frobenius for each in moved],
            "layer_distance_spectral_relative": [each.relative_spectral for each in moved],
            "layer_distance_frobenius_relative": [each.relative_frobenius for each in moved],
        }
        largest = {name: max(filter(math.isfinite, values), default=math.nan) for name, values in found.items()}
        largest |= {
            "layer_stable_rank_min": min(ranks, default=math.nan),
            "layer_stable_rank_max": max(ranks, default=math.nan),
        }
        return {name: value for name, value in largest.items() if math.isfinite(value)}
