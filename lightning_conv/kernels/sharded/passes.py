"""Forward and backward passes of a sharded module, which all of its processes make together."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_conv.kernels.reading.recording import layer_gradients, record
from lightning_conv.kernels.sharded.module import ShardedModule
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.sharded import as_found
from lightning_conv.networks.undisturbed import undisturbed

AT_ONCE = 128
"""Samples that go through the network together for its outputs alone."""


def sharded_outputs(model: nn.Module, inputs: Inputs, *, batch_norm: BatchNormMode = "eval") -> Tensor:
    """Return the outputs of a sharded module in the shape that it gives, (n, ...), without dropout; it is left as it was found.

    Args:
        model: the module.
        inputs: n samples.
        batch_norm: see ``ntk_gram``.

    Raises:
        TypeError: the module does not return one tensor.

    Cost: one forward.
    """
    with undisturbed(model), as_found(model), torch.no_grad():
        module = ShardedModule(model, batch_norm=batch_norm)
        given, parts = module.convert(inputs), []
        for start in range(0, sample_count(inputs), AT_ONCE):
            part = module.call({}, take(given, slice(start, start + AT_ONCE)))
            if not isinstance(part, Tensor):
                raise TypeError(f"model: returned {type(part).__name__}; need one tensor")
            parts.append(part)
        return torch.cat(parts)


def seconds_of_pass(model: nn.Module, names: Sequence[str], inputs: Inputs) -> tuple[float, float, int]:
    """Return the seconds of a forward and a backward pass of a sharded module, those of the backward pass, and the number of outputs.

    Args:
        model: the module.
        names: parameters whose layers the backward pass reaches.
        inputs: samples.
    """
    with undisturbed(model), as_found(model):
        module = ShardedModule(model)
        start = time.perf_counter()
        outputs, recorder = record(module, module.convert(inputs), {name: module.parameters[name] for name in names})
        between = time.perf_counter()
        layer_gradients(outputs, torch.ones_like(outputs), recorder.calls, keep=False)
        now = time.perf_counter()
        return now - start, now - between, int(outputs.shape[1])
