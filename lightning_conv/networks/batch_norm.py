"""BatchNorm layers: which statistics they normalise by, without touching those of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
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


@dataclass(frozen=True)
class BatchStatistics:
    """The statistics of a batch in all BatchNorm layers of a module, and what the module makes of the batch with them.

    Attributes:
        buffers: Means and variances by the names of the module's buffers.
        made: What the forward returned.
    """

    buffers: Mapping[str, Tensor]
    made: object


def places_of_statistics(model: nn.Module) -> list[str]:
    """Return the attributes in which BatchNorm layers keep mean and variance, as ``places_of`` names them.

    Args:
        model: The module.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return [f"{name}.{kind}".lstrip(".") for name in layers for kind in ("running_mean", "running_var")]


def adopt_statistics(model: nn.Module, call: Callable[[], object]) -> object:
    """Overwrite the running statistics of BatchNorm layers by those of a batch, with the biased variance that train mode uses.

    Args:
        model: The module.
        call: Evaluates it on the batch, with the tensors that may be written in place of its own.

    Returns:
        What the call returned: the outputs with these statistics, since each layer adopts its own before it computes.

    Raises:
        ValueError: a layer is called twice.
    """
    calls: dict[nn.Module, int] = {}

    def adopt(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        calls[module] = calls.get(module, 0) + 1
        assert module.running_mean is not None
        assert module.running_var is not None
        axes = [axis for axis in range(args[0].ndim) if axis != 1]
        variance, mean = torch.var_mean(args[0].detach(), dim=axes, correction=0)
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    handles = [layer.register_forward_pre_hook(adopt) for layer in layers.values()]
    try:
        made = call()
    finally:
        for handle in handles:
            handle.remove()
    repeated = [name for name, layer in layers.items() if calls.get(layer, 0) > 1]
    if repeated:
        raise ValueError(
            f'batch_norm: "frozen" needs one call of each BatchNorm per forward, but {repeated} are called several '
            'times, each time with other statistics; use batch_norm="eval"'
        )
    return made


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse BatchNorm layers without running statistics.

    Raises:
        ValueError: There is one.
    """
    untracked = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    if untracked:
        raise ValueError(
            f"model: BatchNorm without running statistics ({', '.join(untracked)}) couples the samples of a batch, so a "
            "kernel entry would depend on the rest of the batch; build it with track_running_stats=True, or pass "
            'batch_norm="batch" for the kernel of the whole batch'
        )


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a layer of the model normalises by the statistics of a batch in training, and by running ones later.

    Args:
        model: any module.
    """
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())
