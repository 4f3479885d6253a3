"""Samples recognised by a hash of their bytes: ``batch_keys`` of a batch, ``sample_keys`` of what a module is called on."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_conv.networks.inputs import Inputs, input_tensors

PLAIN = (bool, int, float, complex, str, bytes, type(None))


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch, in whatever containers they are.

    Args:
        batch: A batch as the training step gets it.
    """
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def parts_of(batch: Any, seen: tuple[int, ...] = ()) -> list[Tensor]:
    """Return all that a batch holds as tensors: its tensors, NumPy arrays, and hashes of everything else.

    A list of plain values (labels, names) becomes one row per value. Of an object its attributes are taken.

    Args:
        batch: A batch as the training step gets it, or a part of it.
        seen: The ``id`` of the objects that it is an attribute of.

    Raises:
        TypeError, ValueError, AttributeError: Something in it can neither be looked into nor pickled.
    """
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, np.ndarray):
        plain = batch.dtype.kind in "biufc"
        return [torch.from_numpy(np.ascontiguousarray(batch))] if plain else parts_of(batch.tolist(), seen)
    if isinstance(batch, Mapping):
        return [part for value in batch.values() for part in parts_of(value, seen)]
    if isinstance(batch, (list, tuple)):
        if batch and all(isinstance(value, PLAIN) for value in batch):
            return [torch.tensor([list(_hash_of(value)) for value in batch], dtype=torch.uint8)]
        return [part for value in batch for part in parts_of(value, seen)]
    if hasattr(batch, "__dict__") and not callable(batch) and id(batch) not in seen:
        return [part for value in vars(batch).values() for part in parts_of(value, (*seen, id(batch)))]
    return [] if id(batch) in seen else [torch.tensor([list(_hash_of(batch))], dtype=torch.uint8)]


def _hash_of(value: object) -> bytes:
    held = repr(value).encode() if isinstance(value, PLAIN) else pickle.dumps(value)
    return hashlib.blake2b(held, digest_size=16).digest()


def batch_keys(batch: Any, inputs: Inputs) -> list[bytes] | None:
    """Return a hash of each sample of a batch: of all that the training step gets of it, targets included.

    Args:
        batch: A batch as the training step gets it.
        inputs: What of it enters the network; its first dimension counts the samples. Where these are made of the batch's own tensors,
            one of these that has a divisor of that number of rows has each row for several samples in turn. Any other tensor counts for
            all samples.

    Returns:
        None where a tensor has a gradient or no memory of its own (sparse, nested), or where ``parts_of`` fails.
    """
    entering = list(input_tensors(inputs))
    try:
        others = [each for each in parts_of(batch) if all(each is not one for one in entering)]
    except Exception:  # pickling runs any code
        return None
    if any(t.requires_grad or t.layout != torch.strided for t in (*entering, *others)):
        return None
    count = len(entering[0])
    if count == 0 or any(len(each) != count for each in entering):
        return None
    own = any(each is one for each in tensors_of(batch) for one in entering)

    def by_sample(tensor: Tensor) -> bool:
        rows = len(tensor) if tensor.ndim else 0
        return rows == count or (not own and 0 < rows < count and count % rows == 0)

    rows = [*entering, *(each for each in others if by_sample(each))]
    constants = [bytes_of(each, 1)[0].tobytes() for each in others if not by_sample(each)]
    kinds = [(str(each.dtype), tuple(each.shape[1:])) for each in (*rows, *others)]
    return _digests((constants, kinds), rows, count)


def sample_keys(given: tuple[tuple[Any, ...], dict[str, Any]]) -> list[bytes] | None:
    """Return a hash of each sample of what a module is called on: tensors with one row per sample, and constants.

    Args:
        given: Positional and keyword arguments of the call.

    Returns:
        None where the module is called on something else, or on a tensor with a gradient, which features from a table would not have.
    """
    args, kwargs = given
    named = [*enumerate(args), *sorted(kwargs.items())]
    tensors = [value for _, value in named if isinstance(value, Tensor)]
    constants = [(str(name), value) for name, value in named if not isinstance(value, Tensor)]
    plain = all(value is None or isinstance(value, (bool, int, float, str)) for _, value in constants)
    if not tensors or not plain or any(t.requires_grad or t.ndim == 0 or t.layout != torch.strided for t in tensors):
        return None
    count = tensors[0].shape[0]
    if count == 0 or any(tensor.shape[0] != count for tensor in tensors):
        return None
    kinds = [
        (str(name), str(value.dtype), tuple(value.shape[1:])) for name, value in named if isinstance(value, Tensor)
    ]
    return _digests((constants, kinds), tensors, count)


def bytes_of(tensor: Tensor, rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the memory of a tensor as so many rows of bytes.

    Args:
        tensor: The tensor.
        rows: A divisor of its number of entries.
    """
    held = tensor.detach().cpu().contiguous().reshape(rows, tensor.numel() // rows)
    return (torch.view_as_real(held).flatten(1) if held.is_complex() else held).view(torch.uint8).numpy()


def _digests(common: object, tensors: Sequence[Tensor], count: int) -> list[bytes]:
    """Return a 128-bit hash of each of ``count`` samples: of what they have in common, and of their rows."""
    rows = [bytes_of(each, len(each)).repeat(count // len(each), axis=0) for each in tensors]
    start = hashlib.blake2b(repr(common).encode(), digest_size=16)
    keys = []
    for sample in range(count):
        key = start.copy()
        for row in rows:
            key.update(row[sample])
        keys.append(key.digest())
    return keys
