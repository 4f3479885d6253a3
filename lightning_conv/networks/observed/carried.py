"""``Carried``: what a step writes into attributes of its modules with a row for each sample, as a hidden state from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_conv.networks.copying import TORCH
from lightning_conv.networks.observed.leaves import Place, tensors_in

Attribute: TypeAlias = tuple[str, str]
"""Dotted name of a module, and name of its attribute or buffer."""

Tensors: TypeAlias = dict[Place, Tensor]

HELD_WITHIN = 3
"""Levels of a list, a dictionary or a dataclass among the attributes that are looked into."""


def attributes_of(model: nn.Module) -> Iterator[tuple[Attribute, Any]]:
    """Yield the attributes and buffers of all modules with their values, but for scripted ones and what torch itself keeps there.

    Args:
        model: Any module.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        own = {key: value for key, value in vars(module).items() if key not in TORCH}
        for key, value in (own | module._buffers).items():
            yield (name, key), value


def tensors_held(model: nn.Module) -> dict[Attribute, Tensors]:
    """Return the tensors in the attributes and buffers of all modules.

    Args:
        model: Any module.
    """
    return {
        attribute: dict(tensors_in(value, HELD_WITHIN))
        for attribute, value in attributes_of(model)
        if isinstance(value, (Tensor, list, tuple, dict)) or is_dataclass(value)
    }


def written(before: dict[Attribute, Tensors], after: dict[Attribute, Tensors]) -> dict[Attribute, Tensors]:
    """Return the tensors that were put into attributes between two moments.

    Args:
        before: What ``tensors_held`` has returned at the first one.
        after: At the second one.
    """
    found = {
        attribute: {place: each for place, each in tensors.items() if each is not before.get(attribute, {}).get(place)}
        for attribute, tensors in after.items()
    }
    return {attribute: tensors for attribute, tensors in found.items() if tensors}
