"""The network's outputs on the training set in phase 2, from the rows that are known to enter the head: no forward of the trunk."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_conv.callbacks.guard.head.feature_cache import FeatureCache, memory_obstacle
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.networks.evaluation import undisturbed
from lightning_conv.networks.head import Head

STRIP = 4096
"""Rows that go through the head at a time."""


class KnownOutputs:
    """head(rows) for all samples, in the precision in which the network is measured: its own, at least float32.

    A run in float32 or float64 has these rows in its cache. Those of a run that computes in less are rounded, as its steps see them; then
    they are computed once more, without that, so that the loss and the gap are the same with and without a cache.

    Args:
        trainer: of the run.
        network: that takes the inputs.
        head: of the network, whose result is the network's result.
        data: the training set.
        cache: of the run.

    Raises:
        MemoryError: a second table does not fit.
    """

    def __init__(
        self, trainer: pl.Trainer, network: nn.Module, head: Head, data: TrainingSet, cache: FeatureCache
    ) -> None:
        self._head, self._data, self._shape = head, data, cache.shape
        self._rows = cache.rows
        if str(trainer.precision) not in ("32-true", "64-true"):
            need = 4 * cache.rows.numel()
            if why := next(
                filter(None, data.ranks.gather(lambda: memory_obstacle(need, torch.device("cpu"), data.ranks.world))),
                None,
            ):
                raise MemoryError(why)
            self._rows = data.features(network, head)

    def __call__(self) -> Tensor:
        """(n, ...), float64, on the CPU; each rank computes its share."""
        return torch.cat(self._data.ranks.gather(self._part))

    @torch.no_grad()
    def _part(self) -> Tensor:
        layer, mine = self._head.module, self._data.ranks.share(0, self._data.size)
        weights = {name: tensor.detach().to(self._rows.dtype) for name, tensor in layer.named_parameters()}
        parts = []
        with undisturbed(layer):
            for start in range(mine.start, mine.stop, STRIP):
                rows = self._rows[start : min(start + STRIP, mine.stop)].to(layer.weight.device)
                parts.append(functional_call(layer, weights, (rows,)).cpu().double())
        made = torch.cat(parts) if parts else torch.empty(0, layer.out_features, dtype=torch.float64)
        return made.reshape(len(made), *self._shape)
