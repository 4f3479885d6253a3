"""The guarded two-phase rule as plain torch: perturb the trunk, freeze it, and measure the gap to the global infimum.

After Kawaguchi & Sun 2021, Algorithm 1: phase 1 trains all weights w; at tau the trunk gets Gaussian noise; from then
on only the last linear layer is trained. With rank [h, 1] = n the last layer reaches every target, so its convex
problem has the global infimum of the loss, (1/n) sum_i inf_q ell_i(q), as its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Perturbation:
    """What noise was added."""

    norm: float  # |delta|_2 over all tensors
    relative: float  # |delta|_2 / |w|_2
    tensors: int


@torch.no_grad()
def perturb(parameters: Mapping[str, Tensor], scale: float, seed: int) -> Perturbation:
    """Add Gaussian noise to ``parameters`` in place: std = ``scale`` times each tensor's root mean square.

    A tensor of zeros takes the root mean square of all tensors together, so that the law has a density on the whole
    space (what the theorem's "almost surely" rests on). The noise has its own generator: the global random numbers are
    not consumed.

    Args:
        parameters: tensors by name; the order fixes which noise goes where.
        scale: relative size, above 0.
        seed: of the generator.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"noise_scale: {scale}; need a positive number, for without noise the theorem does not apply")
    generator = torch.Generator().manual_seed(seed)
    count = sum(p.numel() for p in parameters.values())
    total = sum(float(_exact(p).square().sum()) for p in parameters.values())
    overall = (total / count) ** 0.5 if count and total else 1.0
    squared = 0.0
    for parameter in parameters.values():
        before = _exact(parameter)
        rms = float(before.square().mean().sqrt()) or overall
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * (scale * rms)
        parameter.add_(noise.to(parameter.dtype).to(parameter.device))
        # What was really added, after rounding to the parameter's type.
        squared += float((_exact(parameter) - before).square().sum())
    return Perturbation(squared**0.5, (squared / total) ** 0.5 if total else float("inf"), len(parameters))


def _exact(tensor: Tensor) -> Tensor:
    """A float64 copy on the CPU: not every device has float64."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of training: no gradient is computed, and none is left for an optimizer to act on.

    A zero gradient would not do: momentum and weight decay move a parameter whose gradient is zero, but skip one
    without.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the bytes of ``tensors``: equal exactly if all of them are bit for bit equal."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
