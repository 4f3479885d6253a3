"""Digests of weights and of batches, by which a checkpoint knows whether it is continued with the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_conv.networks.inputs import Inputs, input_tensors


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]], before: str = "") -> str:
    """Return the SHA-256 of tensors with their names, shapes and types, and of the digest of what came before.

    Args:
        tensors: names and tensors.
        before: the digest so far.
    """
    digest = hashlib.sha256(before.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_weights(model: nn.Module) -> str:
    """Return the digest of all parameters and buffers of a model."""
    return digest_of_tensors([*model.named_parameters(), *model.named_buffers()])


def digest_of_batch(inputs: Inputs, targets: Tensor | None, before: str) -> str:
    """Return the digest of all batches up to this one."""
    tensors = [*input_tensors(inputs), *([] if targets is None else [targets])]
    return digest_of_tensors(((str(number), each) for number, each in enumerate(tensors)), before)
