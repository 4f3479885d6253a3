"""BatchNorm layers that normalise by the current batch and do not update their running statistics: ``batch_statistics``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Switch the BatchNorm layers of ``model`` to the batch's statistics, as in train mode, without their running statistics.

    All other layers keep their mode: dropout stays off, and InstanceNorm with running statistics goes on using them. The
    BatchNorm layers do not track statistics meanwhile, so that no buffer is written to, not even a clone. (Forward mode
    and vmap refuse to write to a tensor from outside.) SyncBatchNorm takes the statistics of this process's batch and
    does not communicate, because a kernel is often evaluated on one rank only. The flags are restored even after an error.
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
