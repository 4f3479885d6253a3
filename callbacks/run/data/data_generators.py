"""``unread``, ``unmoved``: read samples of a run and put back every generator that reading them has moved."""

from __future__ import annotations

import functools
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.networks.copying import is_filled

DEPTH = 10
"""Levels of attributes, containers and closures that are looked into."""

LONG, FEW = 64, 4
"""Of a container with more members than the first number, as many as the second one are looked into."""

LIBRARIES = ("torch", "torchvision", "numpy", "lightning", "pytorch_lightning", "PIL")

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


@contextmanager
def unmoved(*readers: object) -> Iterator[None]:
    """Put back the generators that the readers hold after the block.

    Inside it they move on, so that two readings of an augmented sample differ.

    Args:
        *readers: A data set, a collate function, transforms: generators are looked for in their attributes, in containers, in the
            closures and defaults of functions, in their classes, and among the globals that their code names.

    Cost: a walk over the objects that they hold; tensors and arrays are not looked into.
    """
    held = {id(each): each for reader in readers for each in generators_of(reader)}
    before = [(each, _state(each)) for each in held.values()]
    try:
        yield
    finally:
        for each, state in before:
            _restore(each, state)


@contextmanager
def unread(*readers: object) -> Iterator[None]:
    """Put back the generators of the process, and those that the readers hold, after the block; see ``unmoved``.

    Args:
        *readers: What reads samples.
    """
    with isolated(), unmoved(*readers):
        yield


def generators_of(holder: object) -> list[Any]:
    """Return the random generators that an object holds.

    Args:
        holder: Anything.
    """
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [(holder, 0)]
    while waiting:
        each, depth = waiting.pop()
        if id(each) in seen or depth > DEPTH:
            continue
        seen.add(id(each))
        if isinstance(each, GENERATORS):
            found.append(each)
        else:
            waiting += [(part, depth + 1) for part in _parts(each)]
    return found


def _parts(holder: object) -> list[object]:
    """Return what an object holds and what its code names."""
    if isinstance(holder, (Tensor, np.ndarray, str, bytes, int, float, type, types.ModuleType, pl.Trainer)):
        return []
    if isinstance(holder, Mapping):
        return list(holder.values() if len(holder) <= LONG else itertools.islice(holder.values(), FEW))
    if isinstance(holder, (list, tuple, set, frozenset, deque)):
        # A list of plain samples may be long, and its members are alike.
        members = list(holder) if len(holder) <= LONG else list(itertools.islice(holder, FEW))
        return [*members, *vars(holder).values()] if hasattr(holder, "__dict__") else members
    if isinstance(holder, (staticmethod, classmethod)):
        return [holder.__func__]
    if isinstance(holder, property):
        return [holder.fget]
    if isinstance(holder, types.FunctionType):
        return _parts_of_function(holder)
    if isinstance(holder, types.MethodType):
        return [holder.__self__, holder.__func__]
    if isinstance(holder, functools.partial):
        return [holder.func, *holder.args, *holder.keywords.values(), *vars(holder).values()]
    slots = [getattr(holder, name, None) for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(holder, "__dict__", {}).values(), *slots, *_parts_of_class(type(holder))]


def _parts_of_class(kind: type) -> list[object]:
    """Return what a class of the user's own has: its code may draw from a generator of the class, or of its module."""
    own = [each for each in kind.__mro__ if not _is_of_a_library(each.__module__)]
    return [value for each in own for name, value in vars(each).items() if name not in ("__dict__", "__weakref__")]


def _parts_of_function(function: types.FunctionType) -> list[object]:
    if _is_of_a_library(function.__globals__.get("__name__", "")):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if is_filled(cell)]
    names = set(_names(function.__code__))
    around = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [
        each for each in around if isinstance(each, types.ModuleType) and each.__name__ not in sys.stdlib_module_names
    ]
    inside = [vars(each)[name] for each in modules for name in names if name in vars(each)]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*cells, *defaults, *vars(function).values(), *around, *inside]


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code uses, those of functions and comprehensions inside it included."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _names(each)


def _is_of_a_library(module: str) -> bool:
    """Return whether a module is one of Python, torch, NumPy or Lightning, whose code draws from what is handed to it."""
    root = module.partition(".")[0]
    return root in LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.state if isinstance(generator, np.random.BitGenerator) else generator.get_state()


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    else:
        generator.set_state(state)
