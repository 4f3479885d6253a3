"""BatchNorm layers that normalise by the very batch they see, and track nothing: ``batch_statistics``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm layers of ``model`` normalise by the batch as in train mode; their running statistics are not looked at.

    Everything else keeps its mode: dropout stays off, and InstanceNorm with running statistics goes on using them. The
    layers track nothing meanwhile, so that no buffer is written to, not even a clone (a write would also stop forward
    mode and vmap, which refuse to change a tensor from outside). SyncBatchNorm takes the statistics of this process's
    batch and exchanges nothing: a kernel is often evaluated on one rank only. Flags are put back on every way out.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(layer, layer.training, layer.track_running_stats, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
            if isinstance(layer, nn.SyncBatchNorm):
                layer.__dict__["forward"] = partial(_BatchNorm.forward, layer)
        yield
    finally:
        for layer, training, tracks, forward in before:
            layer.training, layer.track_running_stats = training, tracks
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward
