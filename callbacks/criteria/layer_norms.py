"""``LayerNorms``: how far every layer's weight matrix is from its start, and its stable rank, with no spectral norm taken twice."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_conv.theory.tools.matrix_norms import Distance, distances, spectral_norm


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

        Cost: two ``spectral_norm`` a layer, and once a run, where it goes on from a checkpoint, a third one.
        """
        ranks: list[float] = []
        moved: list[Distance] = []
        for name in (name for name, weight in now.items() if weight.ndim > 1):
            # Converted once, and a layer at a time: float64 copies of all of them may be too large.
            weight, first = now[name].double().flatten(1), start[name].double().flatten(1)
            norm = spectral_norm(weight)
            if name not in self._start:
                self._start[name] = norm.value if torch.equal(weight, first) else spectral_norm(first).value
            if norm.value > 0:
                ranks.append((float(weight.norm()) / norm.value) ** 2)
            moved += distances({name: weight}, {name: first}, self._start)
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
