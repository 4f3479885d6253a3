"""The tensors inside any structure: their places, and the same structure with other tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Place: TypeAlias = tuple[Any, ...]
"""Where a tensor stands in a structure: keys, numbers and attribute names, from the outside in."""

DEPTH = 8
"""Levels of a structure that are looked into."""


def tensors_in(structure: Any, depth: int = DEPTH) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tensors of a structure with their places, in its order.

    Looked into are mappings, lists, tuples, dataclasses, and objects that have attributes but are neither modules nor classes, such as a
    ``SimpleNamespace`` or the outputs of a language model.

    Args:
        structure: Anything.
        depth: Levels to look into.
    """
    if isinstance(structure, Tensor):
        yield (), structure
    elif depth > 0:
        for key, part in parts_of(structure):
            for place, tensor in tensors_in(part, depth - 1):
                yield (key, *place), tensor


def at(structure: Any, place: Place) -> Any:
    """Return what stands at a place.

    Args:
        structure: Anything.
        place: A place that ``tensors_in`` has named.

    Raises:
        LookupError: There is no such place.
    """
    for key in place:
        parts = dict(parts_of(structure))
        if key not in parts:
            raise LookupError(f"{type(structure).__name__} has no {key!r}")
        structure = parts[key]
    return structure


def with_tensors(structure: Any, function: Callable[[Place, Tensor], Any], place: Place = ()) -> Any:
    """Return the structure with ``function(place, tensor)`` in place of its tensors; everything else is shared with the original.

    Args:
        structure: Anything that ``tensors_in`` looks into.
        function: Gives what takes the tensor's place.
        place: Where this structure stands in the whole one.
    """
    if isinstance(structure, Tensor):
        return function(place, structure)
    if len(place) >= DEPTH:
        return structure
    made = {key: with_tensors(part, function, (*place, key)) for key, part in parts_of(structure)}
    if all(made[key] is part for key, part in parts_of(structure)):
        return structure
    return _rebuilt(structure, made)


def with_part(structure: Any, place: Place, part: Any) -> Any:
    """Return the structure with something else at a place; the rest is shared with the original.

    Args:
        structure: Anything that ``tensors_in`` looks into.
        place: Where.
        part: What stands there then.
    """
    if not place:
        return part
    made = dict(parts_of(structure))
    made[place[0]] = with_part(made[place[0]], place[1:], part)
    return _rebuilt(structure, made)


def parts_of(structure: Any) -> Sequence[tuple[Any, Any]]:
    """Return what a structure consists of: (key, part).

    Args:
        structure: Anything.
    """
    if isinstance(structure, Mapping):
        return list(structure.items())
    if isinstance(structure, (list, tuple)):
        return list(enumerate(structure))
    if isinstance(structure, torch.nn.utils.rnn.PackedSequence) or _is_plain(structure):
        return []
    if dataclasses.is_dataclass(structure):
        return [(field.name, getattr(structure, field.name, None)) for field in dataclasses.fields(structure)]
    return list(vars(structure).items()) if hasattr(structure, "__dict__") else []


def _is_plain(structure: Any) -> bool:
    """Return whether this is a value, a module, a function or a class, and no container."""
    values = (str, bytes, int, float, complex, bool, type(None), type, torch.nn.Module, torch.dtype, torch.device)
    return isinstance(structure, values) or callable(structure)


def _rebuilt(structure: Any, made: Mapping[Any, Any]) -> Any:
    if isinstance(structure, tuple):
        values = list(made.values())
        return type(structure)(*values) if hasattr(structure, "_fields") else type(structure)(values)
    new = copy.copy(structure)
    if isinstance(structure, (Mapping, list)):
        for key, value in made.items():
            new[key] = value
    else:
        for key, value in made.items():
            object.__setattr__(new, key, value)
    return new
