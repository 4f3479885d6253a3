"""The switch of the two-phase rule in plain torch: perturb the trunk, freeze it, and verify that it stays frozen.

After Kawaguchi & Sun 2021, Algorithm 1. Phase 1 trains all weights w. At step tau Gaussian noise is added to the trunk.
From then on only the last linear layer is trained. With rank [h, 1] = n the last layer reaches every target, so the
infimum of its convex problem is the global infimum of the loss, (1/n) sum_i inf_q ell_i(q).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.linalg.rounding import exponent_of, frobenius, ldexp

NEGLIGIBLE = 2.0**-24
"""Share of the root mean square of all tensors up to which a tensor counts as zero: the unit roundoff of float32."""


@dataclass(frozen=True)
class Perturbation:
    """Size of the noise that was added."""

    norm: float  # |delta|_2 over all tensors
    relative: float  # |delta|_2 / |w|_2
    tensors: int


@torch.no_grad()
def perturb(parameters: Mapping[str, Tensor], scale: float, seed: int) -> Perturbation:
    """Add Gaussian noise to ``parameters`` in place, with std = ``scale`` times the root mean square of each tensor.

    A tensor of zeros, or one whose root mean square is below ``NEGLIGIBLE`` times that of all tensors together, takes the
    latter (1 if all are zero). So the distribution has a density on the whole space, which the theorem's "almost surely"
    relies on, and noise on a tensor that is nearly zero does not vanish beside the others. The noise has its own generator
    and does not consume global random numbers.

    Args:
        parameters: tensors by name; their order determines the noise that each one gets.
        scale: relative size, above 0.
        seed: seed of the generator.

    Raises:
        ValueError: ``scale`` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"noise_scale: {scale}; need a positive number, because the theorem requires noise")
    generator = torch.Generator().manual_seed(seed)
    count = sum(p.numel() for p in parameters.values())
    sizes = {name: _rms(_exact(p)) for name, p in parameters.items()}
    total = math.hypot(*(sizes[name] * p.numel() ** 0.5 for name, p in parameters.items()))
    overall = total / count**0.5 if total else 1.0
    moved = 0.0
    for name, parameter in parameters.items():
        before = _exact(parameter)
        rms = overall if sizes[name] <= NEGLIGIBLE * overall else sizes[name]
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * (scale * rms)
        parameter.add_(noise.to(parameter.dtype).to(parameter.device))
        # The change after rounding to the parameter's type.
        moved = math.hypot(moved, frobenius(_exact(parameter) - before))
    return Perturbation(moved, moved / total if total else float("inf"), len(parameters))


def _rms(values: Tensor) -> float:
    """Compute the root mean square without squares that vanish or overflow."""
    exponent = exponent_of(values)
    root = float(ldexp(values, -exponent).square().mean().sqrt()) if values.numel() else 0.0
    return math.ldexp(root, exponent)


def _exact(tensor: Tensor) -> Tensor:
    """Return a float64 copy on the CPU, since not every device has float64."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Exclude parameters from training: no gradient is computed, and none is left for an optimizer to use.

    A zero gradient would not suffice. Momentum and weight decay move a parameter whose gradient is zero, but skip one
    that has no gradient.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of the names and bytes of ``tensors``, which is equal only if all bits are equal."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
