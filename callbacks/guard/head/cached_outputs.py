"""The network's outputs on the training set in phase 2, from the features in the cache: the trunk is not called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_conv.callbacks.guard.head.feature_cache import FeatureCache, memory_obstacle
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.trunk_rows import TrunkRows
from lightning_conv.networks.undisturbed import undisturbed

STRIP = 4096  # rows that go through the head at a time


class CachedOutputs:
    """head(rows) for all samples, in the precision in which the network is measured: its own, at least float32.

    A run in float32 or float64 has these rows in its cache. Those of a run that computes in less are rounded, as its steps see them; then
    they are computed once more, without that, so that the loss and the gap are the same with and without a cache.

    Args:
        view: The run, whose head's result is the network's result.
        cache: Cache of the run.

    Raises:
        MemoryError: A second table does not fit.
    """

    def __init__(self, view: GuardView, cache: FeatureCache) -> None:
        self._view, self._shape, self._rows = view, cache.shape, cache.rows
        if str(view.trainer.precision) not in ("32-true", "64-true"):
            need, cpu, ranks = 4 * cache.rows.numel(), torch.device("cpu"), view.ranks
            if why := next(filter(None, ranks.gather(lambda: memory_obstacle(need, cpu, ranks.world))), None):
                raise MemoryError(why)
            self._rows = TrunkRows.of(view.data, view.network, view.head).all()

    def __call__(self) -> Tensor:
        """Return the outputs, (n, ...), in float64 on the CPU; each rank computes its share."""
        return torch.cat(self._view.ranks.gather(self._part))

    @torch.no_grad()
    def _part(self) -> Tensor:
        layer, mine = self._view.head.module, self._view.ranks.share(0, len(self._rows))
        weights = {name: tensor.detach().to(self._rows.dtype) for name, tensor in layer.named_parameters()}
        parts = [torch.empty(0, layer.out_features, dtype=torch.float64)]
        with undisturbed(layer):
            for start in range(mine.start, mine.stop, STRIP):
                rows = self._rows[start : min(start + STRIP, mine.stop)].to(layer.weight.device)
                parts.append(functional_call(layer, weights, (rows,)).cpu().double())
        made = torch.cat(parts)
        return made.reshape(len(made), *self._shape)
