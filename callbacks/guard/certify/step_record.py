"""``BatchRecord``: a batch of the run as it was when its step began."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.features_compared import Expected
from lightning_conv.callbacks.run.data.sample_keys import bytes_of, parts_of

Place: TypeAlias = tuple[Hashable, ...]
SMALL = 2**16  # numbers


@dataclass(frozen=True)
class BatchRecord:
    """Remembers a batch, to see whether anything changes it."""

    calls: int  # of the head since the last step, at its start
    expected: Expected | None
    batch: Any
    tensors: dict[Place, tuple[Tensor, int]]  # of the batch, with the number of writes in place so far
    small: list[Tensor]  # what is small in it, such as targets; the inputs are known by their features
    digest: bytes  # of these

    @classmethod
    def of(cls, batch: Any, expected: Expected | None, calls: int) -> BatchRecord:
        """Remember a batch.

        Args:
            batch: The batch that the training step is about to see; None: nothing is remembered.
            expected: The features that its samples must have; None: they are not known.
            calls: Number of calls of the head since the last step.
        """
        if batch is None:
            return cls(calls, expected, None, {}, [], _digest([]))
        small: list[Tensor] = []
        with suppress(Exception):  # pickling runs any code
            small = [each for each in parts_of(batch) if each.numel() <= SMALL and each.layout == torch.strided]
        tensors = {place: (each, _writes(each)) for place, each in _places(batch)}
        return cls(calls, expected, batch, tensors, small, _digest(small))

    def was_changed(self) -> bool:
        """Return whether a tensor of the batch was written to, or another one is in its place. The step may take some out, or add some."""
        if any(_writes(tensor) != before for tensor, before in self.tensors.values()):
            return True
        if any(place in self.tensors and self.tensors[place][0] is not each for place, each in _places(self.batch)):
            return True
        return _digest(self.small) != self.digest  # NumPy and ``.data`` write without being counted


def _places(batch: Any, at: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tensors in containers of a batch, and where they are."""
    if isinstance(batch, Tensor):
        yield at, batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for key, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
            yield from _places(value, (*at, key))


def _digest(tensors: Sequence[Tensor]) -> bytes:
    made = hashlib.blake2b(digest_size=16)
    for each in tensors:
        made.update(bytes_of(each, 1).tobytes())
    return made.digest()


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
