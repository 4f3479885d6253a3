"""One forward pass of a network with temporary hooks, which are removed again even after an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.undisturbed import undisturbed


def watched_forward(
    module: StatelessModule,
    inputs: Inputs,
    handles: Iterable[RemovableHandle],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    within: AbstractContextManager[object] | None = None,
) -> object:
    """Run one forward in eval mode without gradients, remove the hooks and return the result.

    Args:
        module: network to run.
        inputs: samples, in any floating type.
        handles: handles of the registered hooks.
        parameters: parameters that replace the network's own.
        within: context of the forward alone, such as a mode that intercepts every operator.
    """
    try:
        with undisturbed(module.model), torch.no_grad():
            converted = module.convert(inputs)
            with within or nullcontext():
                return module.call(parameters or {}, converted)
    finally:
        for handle in handles:
            handle.remove()


def as_rows(tensor: Tensor) -> Tensor:
    """Return what enters or leaves a linear layer as a matrix, (rows, m): (n, T, m) is n T rows.

    Args:
        tensor: (..., m).
    """
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def entering(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """Return the input of a layer from the arguments of its hook, for ``layer(h)`` and ``layer(input=h)`` alike."""
    return (args[0] if args else kwargs["input"]).detach()
