"""One forward of a network while hooks look on: nothing is disturbed, and the hooks come off again whatever happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_conv.networks.evaluation import Inputs, StatelessModule, undisturbed


def watched_forward(
    module: StatelessModule,
    inputs: Inputs,
    handles: Iterable[RemovableHandle],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    within: AbstractContextManager[object] | None = None,
) -> object:
    """The result of one forward in eval mode, without gradients.

    Args:
        module: the network.
        inputs: samples, in any floating type.
        handles: of the hooks that look on; they are removed.
        parameters: in the place of the network's own.
        within: entered around the forward alone, such as a mode that sees every operator.
    """
    try:
        with undisturbed(module.model), torch.no_grad():
            converted = module.convert(inputs)
            with within or nullcontext():
                return module.call(parameters or {}, converted)
    finally:
        for handle in handles:
            handle.remove()


def entering(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a layer was called on, in a hook with keyword arguments: ``layer(h)`` or ``layer(input=h)``."""
    return (args[0] if args else kwargs["input"]).detach()
