"""Samples recognised by a hash of their bytes: ``batch_keys`` of a batch, ``sample_keys`` of what a module is called on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_conv.networks.evaluation import Inputs, input_tensors


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch, in whatever containers they are.

    Args:
        batch: A batch as the training step gets it.
    """
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def batch_keys(batch: Any, inputs: Inputs) -> list[bytes] | None:
    """Return a hash of each sample of a batch: of all that the training step gets of it, targets included.

    Args:
        batch: A batch as the training step gets it.
        inputs: What of it enters the network; its first dimension counts the samples. A tensor of the batch that has fewer rows, a divisor
            of their number, has each row for several samples in turn; any other tensor counts for all samples.

    Returns:
        None where a tensor has a gradient or no memory of its own (sparse, nested).
    """
    entering = list(input_tensors(inputs))
    others = [each for each in tensors_of(batch) if all(each is not one for one in entering)]
    if any(t.requires_grad or t.layout != torch.strided for t in (*entering, *others)):
        return None
    count = len(entering[0])
    if count == 0 or any(len(each) != count for each in entering):
        return None
    rows = [*entering, *(t for t in others if t.ndim > 0 and 0 < len(t) <= count and count % len(t) == 0)]
    constants = [_bytes(t, 1)[0].tobytes() for t in others if t.ndim == 0 or not len(t) or count % len(t)]
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


def _bytes(tensor: Tensor, rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the memory of a tensor as so many rows of bytes."""
    held = tensor.detach().cpu().contiguous().reshape(rows, tensor.numel() // rows)
    return (torch.view_as_real(held).flatten(1) if held.is_complex() else held).view(torch.uint8).numpy()


def _digests(common: object, tensors: Sequence[Tensor], count: int) -> list[bytes]:
    """Return a 128-bit hash of each of ``count`` samples: of what they have in common, and of their rows."""
    rows = [_bytes(each, len(each)).repeat(count // len(each), axis=0) for each in tensors]
    start = hashlib.blake2b(repr(common).encode(), digest_size=16)
    keys = []
    for sample in range(count):
        key = start.copy()
        for row in rows:
            key.update(row[sample])
        keys.append(key.digest())
    return keys
