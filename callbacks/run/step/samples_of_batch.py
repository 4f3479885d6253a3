"""``count_samples``, ``places_of_samples``, ``describe``: what of a batch has one row per sample, whatever its structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_conv.networks.observed.leaves import Place, tensors_in, with_tensors
from lightning_conv.networks.observed.sample_lists import chosen, lists_of_samples, ragged_count


def count_samples(batch: Any) -> int:
    """Return the number of samples in a batch, as far as its tensors tell.

    It is that of a list of samples of several lengths, or else the most common length, of equally common ones the first. 0: there is none.

    Args:
        batch: A batch.
    """
    if ragged := ragged_count(batch):
        return ragged
    lengths = Counter(len(tensor) for _, tensor in tensors_in(batch) if tensor.ndim)
    return lengths.most_common(1)[0][0] if lengths else 0


def places_of_samples(batch: Any, other: Any = None) -> list[Place]:
    """Return the places of the tensors that have a row for each sample.

    Args:
        batch: A batch. Tensors of other lengths beside a tensor of the same kind, as in a list of sequences, are samples themselves.
        other: A batch with one sample more, as far as it is known: each of the tensors must have a row more in it.
    """
    found, count = dict(tensors_in(batch)), count_samples(batch)
    if other is not None:
        more = {place: each for place, each in tensors_in(other) if each.ndim}
        return [
            place for place, each in found.items() if each.ndim and place in more and len(more[place]) == len(each) + 1
        ]
    rows = {place: each for place, each in found.items() if each.ndim and len(each) == count}
    return [
        place
        for place, each in rows.items()
        if not any(
            beside[:-1] == place[:-1] and len(place) > 1 and near.shape[1:] == each.shape[1:] and near.ndim == each.ndim
            for beside, near in found.items()
            if beside not in rows
        )
    ]


def rows_of(batch: Any, count: int, rows: Tensor, lists: Sequence[Place] | None = None) -> Any:
    """Return some samples of a batch: of each tensor, along the first axis that is as long as there are samples, and of lists of samples.

    Args:
        batch: A batch.
        count: Number of its samples.
        rows: Numbers of those that are taken.
        lists: Places of the lists; None: those of the right length, where there are samples of several lengths.
    """
    if lists is None:
        lists = lists_of_samples(batch, count) if ragged_count(batch) == count else ()

    def some(place: Place, tensor: Tensor) -> Tensor:
        axis = None if is_inside(place, lists) else axis_of_length(tensor, count)
        return tensor if axis is None else tensor.index_select(axis, rows.to(tensor.device))

    return chosen(with_tensors(batch, some), lists, rows.tolist())


def is_inside(place: Place, lists: Sequence[Place]) -> bool:
    """Return whether a place is inside one of some others.

    Args:
        place: See ``tensors_in``.
        lists: The others.
    """
    return any(place[: len(each)] == each for each in lists)


def axis_of_length(tensor: Tensor, count: int) -> int | None:
    """Return the first axis of a length; None: there is none.

    Args:
        tensor: Any tensor.
        count: The length.
    """
    return next((axis for axis, length in enumerate(tensor.shape) if length == count), None)


def describe(batch: Any) -> str:
    """Return what a batch consists of, for a message.

    Args:
        batch: Anything.
    """
    found = [f"{place_name(place) or 'tensor'} {tuple(tensor.shape)}" for place, tensor in tensors_in(batch)]
    return f"{type(batch).__name__}: {', '.join(found[:6]) or 'no tensor'}{', ...' if len(found) > 6 else ''}"


def place_name(place: Place) -> str:
    """Return a name for the place of a tensor in a batch: its keys, such as ``views.left``.

    Args:
        place: See ``tensors_in``.
    """
    return ".".join(str(key) for key in place) or "batch"
