"""What a forward returned, in words, where it is not the one floating tensor that a kernel is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

NAMED = 4
"""Number of tensors that are named."""


def described(result: object) -> str:
    """Return what was returned, and how to get at the floating tensors in it, each by the exact expression."""
    if isinstance(result, Tensor):
        what = str(result.dtype)
        return f"{what}; need one floating tensor. {_cure('', 'numbers that have a derivative')}"
    kind, found = type(result).__name__, list(tensors_at(result))
    if not found:
        return f"{kind}, in which there is no floating tensor; need one floating tensor. {_cure('', 'the tensor whose kernel is wanted')}"
    places = ", ".join(f"{place} {tuple(each.shape)}" for place, each in found[:NAMED]) + (
        ", ..." if len(found) > NAMED else ""
    )
    return f"{kind} with the tensors {places}; need one floating tensor. {_cure(found[0][0], '')}"


def _cure(place: str, instead: str) -> str:
    said = f"model(*inputs){place}" if place else instead
    of_probe = (
        f" (Probe(forward_fn=lambda model, inputs: model(inputs){place}))"
        if place
        else " (or pass forward_fn to the Probe)"
    )
    return f"Wrap the model in a module whose forward returns {said}{of_probe}" + (
        ", or another of them" if place else ""
    )


def tensors_at(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the floating tensors in tuples, lists, mappings and objects with fields, with the expression that leads to each."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield place, value
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from tensors_at(getattr(value, each.name), f"{place}.{each.name}")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield from tensors_at(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from tensors_at(each, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from tensors_at(each, f"{place}[{index}]")
