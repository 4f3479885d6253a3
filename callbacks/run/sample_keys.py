"""Samples of a batch, recognised by a hash of their bytes: ``sample_keys``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_conv.networks.evaluation import Inputs


def keys_of(inputs: Inputs) -> list[bytes] | None:
    """Return a hash of each sample that enters the network, see ``sample_keys``.

    Args:
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
    """
    if isinstance(inputs, Mapping):
        return sample_keys(((), dict(inputs)))
    return sample_keys(((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}))


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
    rows = [t.detach().cpu().contiguous().reshape(count, -1).view(torch.uint8).numpy() for t in tensors]
    start = hashlib.blake2b(repr((constants, kinds)).encode(), digest_size=16)
    keys = []
    for sample in range(count):
        key = start.copy()
        for row in rows:
            key.update(row[sample])
        keys.append(key.digest())
    return keys
