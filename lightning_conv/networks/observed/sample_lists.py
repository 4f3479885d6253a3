"""Lists of samples of several shapes, as tensors with one row per sample, and back."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_conv.networks.observed.leaves import DEPTH, Place, at, parts_of, tensors_in, with_part, with_tensors

REST = " rest"
"""Ends the name of the hashes of what is no tensor in the samples."""


def lists_of_samples(structure: Any, count: int) -> tuple[Place, ...]:
    """Return the places of the outermost lists and tuples that may have one entry per sample, in order.

    The entries hold tensors at the same places, of the same types and numbers of axes, or none, such as texts.

    Args:
        structure: A batch.
        count: Number of samples.
    """
    return tuple(place for place, entries in _lists(structure) if len(entries) == count)


def ragged_count(structure: Any) -> int:
    """Return the number of entries of the first list of at least three samples of several lengths; 0: there is none.

    Args:
        structure: A batch.
    """
    for _, entries in _lists(structure):
        lengths = {tuple(len(each) for _, each in tensors_in(entry) if each.ndim) for entry in entries}
        if len(entries) > 2 and len(lengths) > 1:
            return len(entries)
    return 0


def chosen(structure: Any, places: Sequence[Place], numbers: Sequence[int]) -> Any:
    """Return a structure with some entries of some of its lists.

    Args:
        structure: A batch.
        places: Those of the lists.
        numbers: Numbers of the entries.
    """
    for place in places:
        entries = at(structure, place)
        structure = with_part(structure, place, type(entries)(entries[number] for number in numbers))
    return structure


def as_rows(entries: Sequence[Any], name: str) -> dict[str, Tensor]:
    """Return the tensors of a list of samples, each padded by zeros to one shape, (n, ...), and beside it the shapes, (n, axes).

    The numbers of the samples, (n,), stand for what else is in them, such as a text; a hash of it is kept beside them.

    Args:
        entries: The samples.
        name: What the names of the tensors begin with.
    """
    found = {name: torch.arange(len(entries)), name + REST: torch.tensor([_hash_of_rest(each) for each in entries])}
    for place, _ in tensors_in(entries[0]):
        tensors = [at(entry, place).detach() for entry in entries]
        shapes = torch.tensor([list(each.shape) for each in tensors], device=tensors[0].device)
        padded = tensors[0].new_zeros(len(tensors), *shapes.amax(0).tolist() if tensors[0].ndim else ())
        for row, each in zip(padded, tensors, strict=True):
            row[_within(each.shape)] = each
        found[_named(name, place)], found[_named(name, place) + " shape"] = padded, shapes.long()
    return found


def as_list(entries: Sequence[Any], name: str, rows: Mapping[str, Tensor]) -> Any:
    """Return the list of samples that ``as_rows`` was given, or some of them.

    Args:
        entries: The samples that it was given.
        name: As there.
        rows: What it returned, for any number of samples.
    """

    def entry(row: int, number: int) -> Any:
        def cut(place: Place, _: Tensor) -> Tensor:
            shape = rows[_named(name, place) + " shape"][row].tolist()
            return rows[_named(name, place)][row][_within(shape)]

        return with_tensors(entries[number], cut)

    made = [entry(row, number) for row, number in enumerate(rows[name].tolist())]
    return tuple(made) if isinstance(entries, tuple) else made


def same_rest(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> bool:
    """Return whether samples that have been stored are some of those that are there now, as far as no tensor tells.

    Args:
        now: Rows of all samples.
        then: Those that were stored.
    """
    names = [each.removesuffix(REST) for each in then if each.endswith(REST)]
    return all(
        int(then[name].max()) < len(now[name]) and torch.equal(now[name + REST][then[name]], then[name + REST])
        for name in names
    )


def _hash_of_rest(entry: Any) -> int:
    """Return a hash of what is no tensor in a sample; 0: it has none that stays the same."""
    try:
        rest = pickle.dumps(with_tensors(entry, lambda *_: None))
    except Exception:  # what a user's object is stored by may raise anything
        return 0
    return int.from_bytes(hashlib.blake2b(rest, digest_size=8).digest(), "big", signed=True)


def _named(name: str, place: Place) -> str:
    return ".".join(str(key) for key in (name, *place, "rows"))


def _within(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(length) for length in shape)


def _lists(structure: Any, place: Place = ()) -> Iterator[tuple[Place, Sequence[Any]]]:
    if type(structure) in (list, tuple) and len(structure) > 1 and _alike(structure):
        yield place, structure
    elif len(place) < DEPTH:
        for key, part in parts_of(structure):
            yield from _lists(part, (*place, key))


def _alike(entries: Sequence[Any]) -> bool:
    """Return whether the entries hold tensors of the same kinds at the same places."""
    kinds = [[(place, each.dtype, each.ndim) for place, each in tensors_in(entry)] for entry in entries]
    return all(each == kinds[0] for each in kinds)
