"""Functions and hooks of a copied module that do not reach back into the original."""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import Tensor, nn

from lightning_conv.networks.copying import HOOKS, own


def hooks_from_outside(module: nn.Module) -> list[Any]:
    """Return the forward hooks that are methods of something else than a module, whose copy would bring all that it holds.

    Args:
        module: Any module.
    """
    hooks = [hook for each in module.modules() for kind in HOOKS for hook in vars(each)[kind].values()]
    return [hook for hook in hooks if not isinstance(getattr(hook, "__self__", module), nn.Module)]


def make_functions_anew(module: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copied module functions and hooks that do not reach back into the original, nor into what its hooks collect.

    Args:
        module: The copy.
        memo: Copies by the ``id`` of their originals.
    """
    for name, value in list(vars(module).items()):
        if name in HOOKS:
            value |= {key: _hook(hook, memo) for key, hook in value.items()}
        elif isinstance(value, types.FunctionType):
            vars(module)[name] = own(value, memo)


def _hook(hook: Any, memo: dict[int, Any]) -> Any:
    if isinstance(hook, types.FunctionType):
        return own(hook, memo, isolated=True)
    if isinstance(hook, types.MethodType) and not isinstance(hook.__self__, nn.Module):
        return types.MethodType(hook.__func__, _isolated(hook.__self__, memo))
    return hook


def _isolated(owner: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an object that has containers and tensors of its own, and shares everything else."""
    if isinstance(owner, type):
        return owner
    made = copy.copy(owner)
    for name, value in list(getattr(made, "__dict__", {}).items()):
        if isinstance(value, (list, dict, set, Tensor)):
            vars(made)[name] = own(value.detach().clone() if isinstance(value, Tensor) else value, memo)
    return made
