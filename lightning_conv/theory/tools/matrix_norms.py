"""Spectral norms of weight matrices, ranks derived from them, and distances of weights from their start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.estimates import spectral_entropy
from lightning_conv.linalg.rounding import gamma
from lightning_conv.linalg.spectral_estimates import estimate_lambda_max

SMALL = 256
"""Smaller dimension up to which the eigenvalues of A A^T are computed, usually the fastest method for such sizes."""

STEPS = 80


def spectral_norm(matrix: Tensor, *, tolerance: float = 1e-6, steps: int = STEPS, seed: int = 0) -> Bounded:
    r"""Compute |A|_2, the largest singular value, by Lanczos on A^T A.

    The result is not ``certified``, because one end of its interval, or both, are estimates:

    - For up to 256 rows or columns the norm is the root of the largest eigenvalue of A A^T (or A^T A; p <= q is the
      smaller dimension). The interval covers the rounding of the product, gamma_{q+2} |A|_F^2, and the error of LAPACK,
      8 p u |A|_F^2, which is an estimate (u is the unit roundoff).
    - For larger matrices ``lower`` is the square root of a Rayleigh quotient less its rounding error, which is a proven
      bound. ``upper`` adds the residual of the Ritz pair, which is an estimate: it fails for a start vector nearly
      orthogonal to the top singular vector. |A|_F is a proven upper bound and limits ``upper``.

    Args:
        matrix: Matrix A, (p, q).
        tolerance: Tolerance of the residual, relative to |A|_2^2.
        steps: Largest number of products with A^T A.
        seed: Seed of the start vector.

    Raises:
        ValueError: ``matrix`` is not a matrix, is empty, or has entries that are not finite.

    Cost: for up to 256 rows or columns p^2 q and about 4 p^3 / 3 flops; for larger ones 4 p q flops per step and about
    20 to 80 steps.
    """
    a = _checked(matrix)
    rows, columns = a.shape
    largest = float(a.abs().max())
    if largest == 0:
        return Bounded(0.0, 0.0, 0.0, certified=True, method="zero matrix")
    if rows < columns:
        a = a.T
    # Squares then neither overflow nor vanish.
    scaled = a / largest
    shape = float(scaled.norm())
    scaled, frobenius = scaled / shape, largest * shape
    if min(rows, columns) <= SMALL:
        square = float(torch.linalg.eigvalsh(scaled.T @ scaled)[-1])
        error = gamma(max(rows, columns) + 2, torch.float64) + 8 * min(rows, columns) * 2.0**-53
        below, above = math.sqrt(max(square - error, 0.0)), math.sqrt(square + error)
        return Bounded(
            math.sqrt(square) * frobenius, below * frobenius, above * frobenius, certified=False, method="A A^T"
        )
    estimate = estimate_lambda_max(
        lambda v: scaled.T @ (scaled @ v),
        scaled.shape[1],
        steps=min(steps, scaled.shape[1]),
        tolerance=tolerance,
        seed=seed,
        device=a.device,
    )
    rounding = 2 * gamma(rows + columns + 4, torch.float64)  # of A^T A v, with |A|_F = 1 and |v| = 1
    value = math.sqrt(max(estimate.value, 0.0)) * frobenius
    lower = math.sqrt(max(estimate.value - rounding, 0.0)) * frobenius
    upper = min(math.sqrt(estimate.value + estimate.standard_error + rounding), 1 + rounding) * frobenius
    return Bounded(value, lower, upper, certified=False, method="Lanczos; the upper end by its residual")


def largest_spectral_norm(weights: Mapping[str, Tensor]) -> float:
    """Return max_l |W_l|_2 over the layers, 0 where there are none; a vector counts with its Euclidean norm.

    Args:
        weights: W_l, or their changes, by name; a convolution's weight is the matrix (out channels) x (everything else).
    """
    sizes = [
        spectral_norm(part.flatten(1)).value if part.ndim >= 2 else float(part.double().norm())
        for part in weights.values()
    ]
    return max(sizes, default=0.0)


def stable_rank(matrix: Tensor) -> Bounded:
    """Compute |A|_F^2 / |A|_2^2, between 1 and the rank; zero for a zero matrix.

    The interval follows from that of ``spectral_norm``.

    Raises:
        ValueError: See ``spectral_norm``.
    """
    a = _checked(matrix)
    largest = a.abs().max()
    if float(largest) == 0:
        return Bounded(0.0, 0.0, 0.0, certified=True, method="zero matrix")
    # The ratio has no scale; a power of two changes no digit, and squares then neither overflow nor vanish.
    a = torch.ldexp(a, -torch.frexp(largest).exponent.clamp(min=-1000))
    square, norm = float(a.square().sum()), spectral_norm(a)
    return Bounded(
        square / norm.value**2, square / norm.upper**2, square / norm.lower**2, certified=False, method=norm.method
    )


def numerical_rank(matrix: Tensor, *, threshold: float = 1e-3) -> int:
    """Count the singular values above ``threshold`` times the largest one. Cost: all singular values.

    Raises:
        ValueError: See ``spectral_norm``; or the threshold lies outside (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: {threshold}; pass a share of the largest singular value, between 0 and 1")
    values = torch.linalg.svdvals(_checked(matrix))
    return int((values > threshold * values[0]).sum())


def effective_rank(matrix: Tensor) -> float:
    """Compute the exponential of the entropy of the singular values over their sum, between 1 and the rank.

    Unlike the rank it is continuous. It is 0 for a zero matrix.

    Raises:
        ValueError: See ``spectral_norm``.

    Source: Roy & Vetterli 2007.
    """
    values = torch.linalg.svdvals(_checked(matrix))
    return math.exp(float(spectral_entropy(values)))


@dataclass(frozen=True)
class Distance:
    """Distance of one weight matrix from its start."""

    name: str
    spectral: Bounded  # |W - W_0|_2
    frobenius: float  # |W - W_0|_F
    relative_spectral: float  # over |W_0|_2
    relative_frobenius: float  # over |W_0|_F


def distances(
    now: Mapping[str, Tensor], then: Mapping[str, Tensor], norms: Mapping[str, float] | None = None
) -> list[Distance]:
    """Compute |W - W_0| of every matrix in ``then``, in the spectral and the Frobenius norm.

    The weight of a convolution counts as the matrix (out channels) x (everything else), which is not the operator that
    it applies to an image. Vectors (biases, scales) are left out.

    Args:
        now: Weights by name, such as ``dict(model.named_parameters())``.
        then: Copies of the same weights at the start.
        norms: |W_0|_2 by name, as far as it is known.

    Raises:
        ValueError: A name is missing from ``now``, or the shapes differ.

    Cost: two spectral norms per matrix, or one if ``norms`` contains the other.
    """
    found, known = [], norms or {}
    for name, start in then.items():
        if start.ndim < 2:
            continue
        if name not in now or now[name].shape != start.shape:
            here = tuple(now[name].shape) if name in now else "nothing"
            raise ValueError(
                f"now: {here} under {name!r}, which was {tuple(start.shape)} at the start; pass the same network's weights"
            )
        before = start.detach().double().flatten(1)
        moved = now[name].detach().double().flatten(1) - before
        spectral, frobenius = spectral_norm(moved), float(moved.norm())
        size = known[name] if name in known else spectral_norm(before).value
        found.append(
            Distance(name, spectral, frobenius, _over(spectral.value, size), _over(frobenius, float(before.norm())))
        )
    return found


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else (math.inf if numerator > 0 else math.nan)


def _checked(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"matrix: shape {tuple(matrix.shape)}; need a matrix with one or more entries")
    a = matrix.detach().double()
    if not bool(torch.isfinite(a).all()):
        raise ValueError("matrix: has NaN or infinite entries")
    return a
