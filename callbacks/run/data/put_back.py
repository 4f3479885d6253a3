"""``put_back``: notice what reading samples changes in the objects that read them, such as counts and caches, and put it back."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_conv.callbacks.run.data.data_generators import (
    GENERATORS,
    LONG,
    globals_of,
    objects_of,
    own_classes,
)
from lightning_conv.networks.copying import IMMEDIATE, is_filled


@dataclass
class Changes:
    """What a block has changed, known after it.

    Attributes:
        what: Such as ``"reads of Counting"``; empty: nothing that is looked at.
    """

    what: str = ""


@dataclass(frozen=True)
class _Kept:
    """One thing as it was: how it is called, what it is now, what it was, and how to set it."""

    name: str
    now: Callable[[], Any]
    before: Any
    restore: Callable[[Any], None]


@contextmanager
def put_back(*readers: object) -> Iterator[Changes]:
    """Put back what the block changes in the readers, generators aside (``unread``).

    Looked at are attributes of objects and of classes of the user's own, lists and other containers, closures, the globals that code names,
    tensors, and arrays of up to ``LONG`` numbers. Of larger containers the length is compared, and of larger tensors the version; these,
    and the attributes of objects of libraries, are not put back. Larger arrays and open files are not looked at.

    Args:
        *readers: A data set, a collate function.

    Yields:
        What was changed, known after the block.

    Cost: a walk over the objects that they hold, before and after.
    """
    kept = [each for reader in readers for held in objects_of(reader) for each in _parts_of(held)]
    changes = Changes()
    try:
        yield changes
    finally:
        for each in kept:
            if not _same(each.now(), each.before):
                changes.what = changes.what or each.name
                each.restore(each.before)


def _parts_of(held: Any) -> Iterator[_Kept]:
    """Yield what of an object may change."""
    if isinstance(held, (*GENERATORS, type, types.ModuleType)):
        return
    if isinstance(held, Tensor):
        yield from _of_tensor(held)
    elif isinstance(held, np.ndarray):
        if held.size <= LONG:
            yield _Kept("an array", held.copy, held.copy(), lambda before: held.__setitem__(..., before))
    elif isinstance(held, (list, dict, set, deque)):
        yield from _of_container(held)
    elif isinstance(held, types.FunctionType):
        around = held.__globals__
        yield from (_entry(around, name, f"the global {name}") for name in globals_of(held))
        cells = zip(held.__code__.co_freevars, held.__closure__ or (), strict=True)
        yield from (_attribute(cell, "cell_contents", name) for name, cell in cells if is_filled(cell))
    elif isinstance(getattr(held, "__dict__", None), dict):
        # An object of a library may hold what cannot be put back, such as the place in a file, and would contradict itself.
        restore = (lambda before: _set_all(held, before)) if own_classes(type(held)) else _leave
        yield _Kept(f"attributes of {type(held).__name__}", lambda: dict(vars(held)), dict(vars(held)), restore)
    for each in own_classes(type(held)):
        plain = [name for name, value in vars(each).items() if type(value) in IMMEDIATE and not name.startswith("__")]
        yield from (_attribute(each, name, f"{each.__name__}.{name}") for name in plain)


def _entry(around: dict[str, Any], key: str, name: str) -> _Kept:
    return _Kept(name, lambda: around.get(key), around[key], lambda before: around.__setitem__(key, before))


def _attribute(holder: Any, key: str, name: str) -> _Kept:
    return _Kept(name, lambda: getattr(holder, key), getattr(holder, key), lambda before: setattr(holder, key, before))


def _leave(_: Any) -> None:
    """Leave it as it is."""


def _of_tensor(held: Tensor) -> Iterator[_Kept]:
    if held.is_inference():
        return
    before = held.detach().clone() if held.numel() <= LONG else None

    def restore(_: Any) -> None:
        if before is not None:
            held.data.copy_(before)

    yield _Kept("a tensor", lambda: held._version, held._version, restore)


def _of_container(held: Any) -> Iterator[_Kept]:
    name = f"a {type(held).__name__}"
    if len(held) > LONG:
        yield _Kept(name, lambda: len(held), len(held), _leave)
    elif isinstance(held, dict):
        yield _Kept(name, lambda: dict(held), dict(held), lambda v: _refill(held, held.update, v))
    elif isinstance(held, set):
        yield _Kept(name, lambda: set(held), set(held), lambda v: _refill(held, held.update, v))
    else:
        yield _Kept(name, lambda: list(held), list(held), lambda v: _refill(held, held.extend, v))


def _refill(held: Any, fill: Callable[[Any], None], before: Any) -> None:
    held.clear()
    fill(before)


def _set_all(held: Any, before: dict[str, Any]) -> None:
    vars(held).clear()
    vars(held).update(before)


def _same(now: Any, before: Any) -> bool:
    """Return whether values are the same objects, or equal plain ones."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, Mapping):
        return list(now) == list(before) and all(_same(value, before[key]) for key, value in now.items())
    if isinstance(now, list):
        return len(now) == len(before) and all(map(_same, now, before))
    if isinstance(now, np.ndarray):
        return bool(np.array_equal(now, before))
    return type(now) in (*IMMEDIATE, set) and bool(now == before)
