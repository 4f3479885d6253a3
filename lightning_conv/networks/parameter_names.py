"""``aliases_of``, ``places_of``: the names of tensors that a module holds in several places."""

from __future__ import annotations

from torch import nn


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Map every name of a parameter to the first one, under which ``named_parameters`` has it; tied weights have several."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: names[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def places_of(model: nn.Module) -> dict[str, str]:
    """Map each attribute that holds a parameter or buffer, listed once, to the name of its tensor.

    One tensor may be held in several places. Torch's own tying of weights cannot be used: of a module with two names
    (``self.net = nn.Sequential(self.trunk, self.head)``) it takes both for different places, and leaves its copies in
    place of the parameters when the call is over.
    """
    names: dict[int, str] = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    places: dict[str, str] = {}
    for prefix, module in model.named_modules():
        own = (*module.named_parameters("", False, False), *module.named_buffers("", False, False))
        places |= {f"{prefix}.{name}" if prefix else name: names[id(tensor)] for name, tensor in own}
    return places
