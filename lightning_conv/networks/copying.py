"""Copies of a module's structure: ``structural_copy``, and what ``copy.deepcopy`` needs to be told for it."""

from __future__ import annotations

import copy
import functools
import random
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Iterator
from io import IOBase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.networks.equal_numbers import equal_numbers

Lock, RLock = type(threading.Lock()), type(threading.RLock())
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Modules of torch that run another one in their own way, and the name of that one."""
TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
IMMEDIATE = frozenset({int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
"""Types of values that cannot change."""
COPIED = (
    list, dict, set, Iterator, types.MethodType, types.SimpleNamespace, functools.partial, random.Random, torch.Generator,
)  # fmt: skip
"""What a function may hold and change by using it."""


class Copy:
    """A copy of a module's structure, with attributes of its own and parameters on the memory of the original's.

    Nothing that is written to an attribute of the copy reaches the original. Its parameters and buffers are new tensors on the same
    memory, to be replaced in every call (``StatelessModule``). Functions among the attributes and hooks are made anew, so that they
    use the copy; what they count and collect is a copy, too. ``torch.compile`` and ``DataParallel`` are taken off, under
    the names that their modules had.

    Args:
        model: any module.

    Attributes:
        original: the module.
        module: the copy.
        memo: the copies of modules, parameters and buffers by the ``id`` of their originals.

    Raises:
        TypeError, RuntimeError, ...: something in it cannot be copied, as ``copy.deepcopy`` says.
    """

    def __init__(self, model: nn.Module) -> None:
        self.original = model
        memo: dict[int, Any] = not_copied(model)
        for parameter in model.parameters():
            memo[id(parameter)] = _on_the_same_memory(parameter)
        memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
        wrapped = [each for each in model.modules() if type(each).__name__ in WRAPPERS]
        memo |= {id(each): Unwrapped(WRAPPERS[type(each).__name__]) for each in wrapped}
        memo |= {id(each): each for each in _too_much(model)}
        self.memo = {id(each): memo[id(each)] for each in (*model.parameters(), *model.buffers())}
        plain = [each for each in model.modules() if id(each) not in memo and _is_copied_plainly(type(each))]  # type: ignore[arg-type]
        memo |= {id(each): type(each).__new__(type(each)) for each in plain}
        for each in plain:
            vars(memo[id(each)]).update((name, _deep(value, memo)) for name, value in vars(each).items())
        self.module: nn.Module = copy.deepcopy(model, memo)
        for each in wrapped:
            name = WRAPPERS[type(each).__name__]
            memo[id(each)].add_module(name, copy.deepcopy(getattr(each, name), memo))
            memo[id(each)].training = each.training
        self.pairs = [(mine, memo[id(mine)]) for mine in model.modules() if id(mine) in memo]
        for mine, its in self.pairs:
            self.memo[id(mine)] = its
            for name, value in list(vars(its).items()):
                if type(value) in IMMEDIATE and value is not None:
                    continue
                if name in HOOKS:
                    value |= {key: own(hook, memo, isolated=True) for key, hook in value.items() if _is_plain(hook)}
                elif isinstance(value, types.FunctionType | list | dict) and name not in TORCH:
                    vars(its)[name] = with_own_functions(value, memo)
                elif value is None and vars(mine).get(name) is not None:  # left out by its own way to be copied
                    vars(its)[name] = vars(mine)[name]


class Unwrapped(nn.Module):
    """Stands for a wrapper of torch: calls the module inside, which has the name that it had there."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module inside."""
        return getattr(self, self._name)(*args, **kwargs)


def _on_the_same_memory(parameter: nn.Parameter) -> nn.Parameter:
    found = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    found.__dict__.update(parameter.__dict__)
    return found


@functools.cache
def _is_copied_plainly(kind: type) -> bool:
    """Return whether a copy of a module of this class is a copy of its attributes, and no code of the class takes part."""
    ways = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__", "__copy__", "__deepcopy__")
    return all(getattr(kind, way, None) is getattr(nn.Module, way, None) for way in ways)


def _deep(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in IMMEDIATE:
        return value
    if type(value) in (dict, set, OrderedDict) and not value:  # as most of what every module has
        return type(value)()
    return copy.deepcopy(value, memo)


def with_own_functions(value: Any, memo: dict[int, Any]) -> Any:
    """Return a function made anew; in a container, which is a copy already, replace the functions."""
    if isinstance(value, types.FunctionType):
        return memo[id(value)] if id(value) in memo else made_anew(value, memo)
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, each in list(places):
        if isinstance(each, types.FunctionType | list | dict):
            value[place] = with_own_functions(each, memo)
    return value


def _is_plain(hook: Any) -> bool:
    return isinstance(hook, types.FunctionType)


def _too_much(module: nn.Module) -> list[Any]:
    """Return the owners of hooks that hold more than numbers: their copy would bring all of it."""
    return [owner for owner in _owners(module) if not all(map(_is_data, _leaves([*vars(owner).values()])))]


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor | set | nn.Module)


def held_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors among the attributes of all modules, in containers too, without parameters and buffers."""
    return [leaf for leaf in _held(module) if isinstance(leaf, Tensor)]


def _held(module: nn.Module) -> list[Any]:
    """Return what the attributes of all modules are or contain, but for those of ``nn.Module`` itself, and what owners of hooks hold."""
    own_values = [value for each in module.modules() for name, value in vars(each).items() if name not in TORCH]
    return _leaves([*own_values, *(value for owner in _owners(module) for value in vars(owner).values())])


def _owners(module: nn.Module) -> list[Any]:
    """Return the objects, but no modules, of which a hook is a method or that are called as a hook."""
    hooks = [hook for each in module.modules() for kind in HOOKS for hook in vars(each)[kind].values()]
    owners = [getattr(hook, "__self__", hook) for hook in hooks if not isinstance(hook, types.FunctionType)]
    return [owner for owner in owners if not isinstance(owner, nn.Module) and hasattr(owner, "__dict__")]


def _leaves(values: list[Any]) -> list[Any]:
    """Return what these values are or contain, in lists, tuples and dictionaries, without numbers and text."""
    found: list[Any] = []
    seen: set[int] = set()
    while values:
        value = values.pop()
        if isinstance(value, dict | list | tuple | deque):
            if id(value) not in seen and type(value) not in IMMEDIATE:
                seen.add(id(value))
                values += value.values() if isinstance(value, dict) else value
        elif type(value) not in IMMEDIATE:
            found.append(value)
    return found


def not_copied(module: nn.Module) -> dict[int, Any]:
    """Return what stands for the attributes that ``copy.deepcopy`` refuses, by their ``id``.

    Tensors with a graph, such as outputs that a module collects, are copied without it; locks and open files are shared.
    """
    return _stand_ins(_held(module))


def _stand_ins(held: list[Any]) -> dict[int, Any]:
    graphs = {id(leaf): leaf.detach().clone() for leaf in held if isinstance(leaf, Tensor) and not leaf.is_leaf}
    return graphs | {id(leaf): leaf for leaf in held if isinstance(leaf, (Lock, RLock, IOBase))}


def made_anew(function: types.FunctionType, memo: dict[int, Any], *, isolated: bool = False) -> types.FunctionType:
    """Return the function over the copies of what its closure, its defaults and its globals hold of the module, and of containers in them.

    Args:
        function: a function.
        memo: copies by the ``id`` of their originals, as ``copy.deepcopy`` keeps them.
        isolated: whether containers among its globals are copied, too, and names that it rebinds are its own.
    """
    memo[id(function)] = function  # it may hold itself
    # What is known by its address must live as long as the memo; ``copy.deepcopy`` keeps it so, too.
    memo.setdefault(id(memo), []).append(function)
    named = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    of_module = {
        name: own(value, memo)
        for name, value in named.items()
        if (isinstance(value, nn.Module) and id(value) in memo) or (isolated and isinstance(value, (list, dict, set)))
    }
    around = {**function.__globals__, **of_module} if of_module or isolated else function.__globals__
    cells = function.__closure__ or ()
    closure = tuple(types.CellType(own(each.cell_contents, memo)) if is_filled(each) else each for each in cells)
    defaults = None if function.__defaults__ is None else tuple(own(each, memo) for each in function.__defaults__)
    new = types.FunctionType(function.__code__, around, function.__name__, defaults, closure)
    new.__kwdefaults__ = {name: own(value, memo) for name, value in (function.__kwdefaults__ or {}).items()} or None
    memo[id(function)] = new
    return new


def own(value: Any, memo: dict[int, Any], *, isolated: bool = False) -> Any:
    """Return the copy of what a function uses: of modules, parameters, functions and containers; anything else is itself."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.FunctionType):
        return made_anew(value, memo, isolated=isolated)
    if isinstance(value, COPIED) or (isolated and callable(value) and not isinstance(value, (type, nn.Module))):
        if isinstance(value, list | dict):
            memo |= {key: each for key, each in _stand_ins(_leaves([value])).items() if key not in memo}
        try:
            return copy.deepcopy(value, memo)
        except Exception:  # what cannot be copied is used as it is
            return value
    return value


def is_filled(cell: types.CellType) -> bool:
    """Return whether a closure's cell holds anything yet.

    Args:
        cell: of a function's closure.
    """
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def same(mine: Any, its: Any, memo: dict[int, Any]) -> bool:
    """Return whether a value and its copy are still equal; False where that cannot be told.

    Args:
        mine: the value.
        its: its copy.
        memo: see ``Copy``; pairs that are being compared are added.
    """
    if mine is its or isinstance(mine, (types.FunctionType, types.BuiltinFunctionType, type)):
        return True
    if id(mine) in memo:
        return memo[id(mine)] is its
    if type(mine) is not type(its):
        return False
    memo[id(mine)] = its
    if isinstance(mine, Tensor):
        return _same_numbers(mine, its)
    if isinstance(mine, torch.Generator):
        return torch.equal(mine.get_state(), its.get_state())
    if isinstance(mine, dict):
        return list(mine) == list(its) and all(same(value, its[key], memo) for key, value in mine.items())
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(its) and all(same(a, b, memo) for a, b in zip(mine, its, strict=True))
    if isinstance(mine, types.MethodType):
        return same(mine.__self__, its.__self__, memo)
    try:
        if bool(mine == its):
            return True
    except (TypeError, ValueError, RuntimeError):  # as of arrays, which have many truth values
        return bool(getattr(mine == its, "all", bool)())
    return hasattr(mine, "__dict__") and same(vars(mine), vars(its), memo)


def _same_numbers(mine: Tensor, its: Tensor) -> bool:
    kinds = [(each.shape, each.dtype, each.device, each.layout, each.requires_grad) for each in (mine, its)]
    return kinds[0] == kinds[1] and mine.layout == torch.strided and equal_numbers(mine.detach(), its.detach())
