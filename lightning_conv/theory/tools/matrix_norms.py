"""Spectral norms of weight matrices, the numbers derived from them, and how far weights have moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.products.precision import gamma
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.spectral_estimates import estimate_lambda_max

SMALL = 256
"""Smaller dimension to which the eigenvalues of A A^T are computed: that is then the fastest, unless few singular values stand out."""

STEPS = 80


def spectral_norm(matrix: Tensor, *, tolerance: float = 1e-6, steps: int = STEPS, seed: int = 0) -> Bounded:
    r"""|A|_2, the largest singular value, by Lanczos on A^T A.

    ``lower`` is the square root of a Rayleigh quotient, less its rounding: a bound with a proof. ``upper`` adds the residual of
    the Ritz pair, which is an estimate: a start vector nearly orthogonal to the top singular vector would defeat it. Therefore
    never ``certified``. |A|_F bounds from above for certain and caps ``upper``. To 256 rows or columns it is the root of the largest
    eigenvalue of A A^T (or A^T A, p <= q the smaller dimension), and the interval is the rounding of the product, gamma_{q+2} |A|_F^2,
    and LAPACK's error, 8 p u |A|_F^2 (an estimate too).

    Args:
        matrix: A, (p, q).
        tolerance: of the residual, relative to |A|_2^2.
        steps: products with A^T A at most.
        seed: of the start vector.

    Raises:
        ValueError: not a matrix, empty, or not finite.

    Cost: to 256 rows or columns p^2 q and some 4 p^3 / 3 flops; beyond, 4 p q a step, some 20 to 80 steps.
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
    """|A|_F^2 / |A|_2^2, between 1 and the rank; the interval is that of ``spectral_norm``. Zero for a zero matrix.

    Raises:
        ValueError: see ``spectral_norm``.
    """
    a = _checked(matrix)
    square, norm = float(a.square().sum()), spectral_norm(a)
    if square == 0:
        return Bounded(0.0, 0.0, 0.0, certified=True, method="zero matrix")
    return Bounded(
        square / norm.value**2, square / norm.upper**2, square / norm.lower**2, certified=False, method=norm.method
    )


def numerical_rank(matrix: Tensor, *, threshold: float = 1e-3) -> int:
    """How many singular values exceed ``threshold`` times the largest. Cost: all singular values.

    Raises:
        ValueError: see ``spectral_norm``, or a threshold outside (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: {threshold}; need a share of the largest singular value between 0 and 1")
    values = torch.linalg.svdvals(_checked(matrix))
    return int((values > threshold * values[0]).sum())


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007): between 1 and the rank, continuous.

    Raises:
        ValueError: see ``spectral_norm``.
    """
    values = torch.linalg.svdvals(_checked(matrix))
    if float(values[0]) == 0:
        return 0.0
    shares = values / values.sum()
    return math.exp(float(-torch.special.xlogy(shares, shares).sum()))


@dataclass(frozen=True)
class Distance:
    """How far one weight matrix has moved from where it began."""

    name: str
    spectral: Bounded  # |W - W_0|_2
    frobenius: float  # |W - W_0|_F
    relative_spectral: float  # over |W_0|_2
    relative_frobenius: float  # over |W_0|_F


def distances(
    now: Mapping[str, Tensor], then: Mapping[str, Tensor], norms: Mapping[str, float] | None = None
) -> list[Distance]:
    """|W - W_0| of every matrix in ``then``, in the spectral and the Frobenius norm.

    A convolution's weight counts as the matrix (out channels) x (everything else), which is not the operator that it
    applies to an image. Vectors (biases, scales) are left out.

    Args:
        now: weights by name, such as ``dict(model.named_parameters())``.
        then: the same at the start, copied.
        norms: |W_0|_2 by name, where it is known.

    Raises:
        ValueError: a name is missing from ``now``, or shapes differ.

    Cost: two spectral norms a matrix, one where ``norms`` has the other.
    """
    found, known = [], norms or {}
    for name, start in then.items():
        if start.ndim < 2:
            continue
        if name not in now or now[name].shape != start.shape:
            here = tuple(now[name].shape) if name in now else "nothing"
            raise ValueError(
                f"now: {here} under {name!r}, where it was {tuple(start.shape)}; pass the same network's weights"
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
