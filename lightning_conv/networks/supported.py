"""What is no network, and layers that have no kernel, refused before anything is computed: ``require_module``, ``require_supported``."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_conv.arguments import described, require_type


def require_module(model: object) -> None:
    """Refuse what is no module.

    Args:
        model: the argument of this name.

    Raises:
        TypeError: it is none.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model: {described(model)}; need an object of it, such as {model.__name__}(...)")
    require_type("model", model, nn.Module, "a torch.nn.Module, such as the network of a LightningModule")


def require_supported(model: nn.Module) -> None:
    """Refuse a module with layers that are not initialised yet, or that are quantised.

    Raises:
        ValueError: there is such a layer; the message names it.
    """
    for name, layer in model.named_modules():
        where = f"{name!r} ({type(layer).__name__})" if name else f"the module itself ({type(layer).__name__})"
        tensors = (*layer._parameters.values(), *layer._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            raise ValueError(
                f"model: {where} has no weights yet, since a lazy layer takes its size from the first batch; run one batch first: "
                "model(batch)"
            )
        if ".quantized" in type(layer).__module__ and type(layer).__module__.startswith("torch."):
            raise ValueError(
                f"model: {where} is quantised, and integer weights have no gradients; pass the network from before the quantisation"
            )
