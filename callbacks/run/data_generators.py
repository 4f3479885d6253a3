"""``unread``, ``unmoved``: read samples of a run and put back every generator that reading them has moved."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.isolated import isolated

DEPTH = 6
"""Levels of attributes, containers and closures that are looked into."""

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


@contextmanager
def unmoved(*readers: object) -> Iterator[None]:
    """Put back the generators that the readers hold after the block.

    Inside it they move on, so that two readings of an augmented sample differ.

    Args:
        *readers: A data set, a collate function, transforms: generators are looked for in their attributes, in containers, and in the
            closures and defaults of functions.

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
    if isinstance(holder, (Tensor, np.ndarray, str, bytes, int, float, type, types.ModuleType, nn.Module)):
        return []
    if isinstance(holder, Mapping):
        return list(holder.values())
    if isinstance(holder, (list, tuple, set, frozenset)):
        # A list of plain samples may be long, and its members are alike.
        members = list(holder)
        return members if len(members) <= 64 else members[:4]
    if isinstance(holder, types.FunctionType):
        cells = [cell.cell_contents for cell in holder.__closure__ or () if _is_filled(cell)]
        around = [holder.__globals__[name] for name in holder.__code__.co_names if name in holder.__globals__]
        return [*cells, *(holder.__defaults__ or ()), *(holder.__kwdefaults__ or {}).values(), *around]
    if isinstance(holder, types.MethodType):
        return [holder.__self__, holder.__func__]
    slots = [getattr(holder, name, None) for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())]
    own = [*getattr(holder, "__dict__", {}).values(), *slots]
    # What the class of the user's own object does may draw from a generator of its module.
    code = [each for each in vars(type(holder)).values() if isinstance(each, types.FunctionType)]
    return [*own, *(code if own and not type(holder).__module__.startswith(("torch.", "numpy.")) else ())]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


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
