"""Estimates of the largest eigenvalue and of the effective rank of a symmetric operator, by Lanczos."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.linalg.estimates import (
    Estimate,
    mean_of,
    project_out,
    random_signs,
    spectral_entropy,
    standard_error_of,
)
from lightning_conv.linalg.lanczos import Krylov, Matvec, lanczos

NOTHING = "the operator is zero or negative"
"""``Estimate.method`` where no eigenvalue is positive, so that the effective rank is 0."""


def estimate_lambda_max(
    matvec: Matvec,
    size: int,
    *,
    steps: int = 60,
    tolerance: float = 1e-8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Estimate the largest eigenvalue by Lanczos, with the residual |A y - theta y| of its Ritz pair as standard error.

    Up to rounding, an eigenvalue of A lies within the residual of the value, and the value never exceeds the largest
    eigenvalue. The residual does not prove that this eigenvalue is the largest; for a random start and enough steps it
    is, with probability one.

    Args:
        matvec: v -> A v for a symmetric A, on float64 columns (N, b).
        size: N.
        steps: largest number of products; one more is taken for the residual.
        tolerance: relative residual at which to stop.
        seed: seed of the start vector.
        device: device of the columns.

    Source: Golub & Van Loan, 4th ed., 10.1 (Lanczos), Theorem 8.1.13 (residual bound).
    """

    def converged(krylov: Krylov) -> bool:
        values, _, residuals = krylov.ritz()
        return float(residuals[-1]) <= tolerance * abs(float(values[-1]))

    krylov = lanczos(matvec, size, steps=steps, seed=seed, device=device, stop=converged)
    vector = krylov.basis @ krylov.ritz()[1][:, -1:]
    vector = vector / vector.norm()
    image = matvec(vector)
    value = float((vector * image).sum())
    residual = float((image - value * vector).norm())
    return Estimate(value, residual, krylov.basis.shape[1] + 1, "Lanczos; the residual in place of a standard error")


def estimate_effective_rank(
    matvec: Matvec, size: int, *, probes: int = 8, steps: int = 12, seed: int = 0, device: torch.device | str = "cpu"
) -> Estimate:
    r"""Estimate the effective rank exp(H) of a positive semidefinite A, with H the entropy of its eigenvalues.

    .. math:: H = -\sum_i p_i \log p_i = \frac{\mathrm{tr} f(A)}{\mathrm{tr} A} + \log \mathrm{tr} A, \quad f(x) = -x \log x,
        \; p_i = \lambda_i / \mathrm{tr} A

    Both traces use the same vectors: they are exact on half of a block Krylov space and estimated by random signs on
    the rest, with f(A) from block Gauss quadrature. The standard error consists of the spread over the signs and of the
    change by the last Lanczos step, which indicates the error of the quadrature.

    Args:
        matvec: v -> A v for a symmetric positive semidefinite A, on float64 columns (N, b).
        size: N.
        probes: number of vectors in each of the two blocks.
        steps: number of Lanczos steps for each block; 2 probes x steps products in total.
        seed: seed of the random vectors.
        device: device of the columns.

    Raises:
        ValueError: ``probes`` or ``steps`` is below 2.

    Source: Ubaru, Chen, Saad 2017 (stochastic Lanczos quadrature); Chen, Hallman 2023 (deflation by the Krylov space);
    Roy, Vetterli 2007 (the effective rank).
    """
    if probes < 2 or steps < 2:
        raise ValueError(f"probes, steps: {probes}, {steps}; need at least 2 of each")
    if size <= 2 * probes * steps:
        image = matvec(torch.eye(size, dtype=torch.float64, device=device))
        values = torch.linalg.eigvalsh((image + image.T) / 2).clamp(min=0)
        if not float(values[-1]) > 0:
            return Estimate(0.0, 0.0, size, NOTHING)
        return Estimate(float(spectral_entropy(values).exp()), 0.0, size, "all eigenvalues")
    generator = torch.Generator().manual_seed(seed)
    signs = random_signs(size, 2 * probes, generator, device)
    first = lanczos(matvec, size, steps=steps, start=signs[:, :probes])
    columns = first.basis.shape[1]
    kept = columns if first.invariant else min(columns, probes * (steps // 2))
    basis = first.basis[:, :kept]
    rest = project_out(basis, signs[:, probes:])
    second = lanczos(matvec, size, steps=steps, start=rest)
    products = columns + second.basis.shape[1]
    scale = max(float(first.ritz()[0][-1]), float(second.ritz()[0][-1]))
    if scale <= 0:
        return Estimate(0.0, 0.0, products, NOTHING)
    coordinates = second.basis.T @ rest
    entropy, error = _entropy(first, second, kept, coordinates, scale, drop=0)
    earlier = _entropy(first, second, kept, coordinates, scale, drop=1)[0]
    rank = math.exp(entropy)
    return Estimate(rank, rank * (error + abs(entropy - earlier)), products, "stochastic Lanczos quadrature, deflated")


def _entropy(
    first: Krylov, second: Krylov, kept: int, coordinates: Tensor, scale: float, *, drop: int
) -> tuple[float, float]:
    """Compute the entropy H and its standard error from the Krylov spaces without their last ``drop`` blocks."""
    base = _functions_of(first, drop, scale)
    rest = _functions_of(second, drop, scale)
    totals, samples = [], []
    for of_base, of_rest in zip(base, rest, strict=True):
        known = min(kept, len(of_base))
        start = coordinates[: len(of_rest)]
        samples.append((start * (of_rest @ start)).sum(0))
        totals.append(float(of_base.diagonal()[:known].sum()) + mean_of(samples[-1]))
    weighted, total = totals
    entropy = weighted / total + math.log(total)
    change = samples[0] / total + (1 / total - weighted / total**2) * samples[1]
    return entropy, standard_error_of(change)


def _functions_of(krylov: Krylov, drop: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return f(T) and T for f(x) = -x log x, in units of ``scale``.

    Negative Ritz values, which are rounding, count as zero.
    """
    last = 0 if krylov.invariant else drop * krylov.coupling.shape[1]
    size = len(krylov.projected) - last
    values, vectors = torch.linalg.eigh(krylov.projected[:size, :size] / scale)
    values = values.clamp(min=0)
    return (vectors * -torch.special.xlogy(values, values)) @ vectors.T, (vectors * values) @ vectors.T
