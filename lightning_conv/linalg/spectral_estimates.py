"""Largest eigenvalue and effective rank of a symmetric operator by Lanczos, as ``Estimate``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.linalg.estimates import Estimate, mean_of, project_out, random_signs, standard_error_of
from lightning_conv.linalg.lanczos import Krylov, Matvec, lanczos


def estimate_lambda_max(
    matvec: Matvec,
    size: int,
    *,
    steps: int = 60,
    tolerance: float = 1e-8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Largest eigenvalue by Lanczos; in place of a standard error the residual |A y - theta y| of its Ritz pair.

    Within the residual of the value lies an eigenvalue of A (for certain, up to rounding), and the value never exceeds the
    largest one. That the eigenvalue so found IS the largest holds with probability one for a random start and enough
    steps, and is not proven by the residual.

    Args:
        matvec: v -> A v for a symmetric A, on float64 columns (N, b).
        size: N.
        steps: products at most, and one more for the residual.
        tolerance: stop where the residual is below this share of the value.
        seed: of the start vector.
        device: of the columns.

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
    matvec: Matvec,
    size: int,
    *,
    probes: int = 8,
    steps: int = 12,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Estimate:
    r"""exp of the entropy of the eigenvalues as a distribution, for a positive semidefinite A.

    .. math:: H = -\sum_i p_i \log p_i = \frac{\mathrm{tr} f(A)}{\mathrm{tr} A} + \log \mathrm{tr} A, \quad f(x) = -x \log x,
        \; p_i = \lambda_i / \mathrm{tr} A

    Both traces come from the same vectors: exactly on half of a block Krylov space, by random signs on the rest, with
    f(A) by block Gauss quadrature. The standard error holds the spread of the signs, and the change that the last
    Lanczos step made as an indication of the quadrature's error (of which the rule for this f is an upper end).

    Args:
        matvec: v -> A v for a symmetric positive semidefinite A, on float64 columns (N, b).
        size: N.
        probes: vectors in each of the two blocks.
        steps: Lanczos steps of each; 2 probes x steps products.
        seed: of the random vectors.
        device: of the columns.

    Raises:
        ValueError: fewer than 2 probes or 2 steps.

    Source: Ubaru, Chen, Saad 2017 (stochastic Lanczos quadrature); Chen, Hallman 2023 (deflation by the Krylov space);
    Roy, Vetterli 2007 (the effective rank).
    """
    if probes < 2 or steps < 2:
        raise ValueError(f"probes, steps: {probes}, {steps}; need at least 2 of each")
    if size <= 2 * probes * steps:
        image = matvec(torch.eye(size, dtype=torch.float64, device=device))
        values = torch.linalg.eigvalsh((image + image.T) / 2).clamp(min=0)
        share = values / values.sum()
        rank = float(torch.exp(-torch.special.xlogy(share, share).sum()))
        return Estimate(rank, 0.0, size, "all eigenvalues")
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
        return Estimate(math.nan, math.nan, products, "the operator is zero or negative")
    coordinates = second.basis.T @ rest
    entropy, error = _entropy(first, second, kept, coordinates, scale, drop=0)
    earlier = _entropy(first, second, kept, coordinates, scale, drop=1)[0]
    rank = math.exp(entropy)
    return Estimate(rank, rank * (error + abs(entropy - earlier)), products, "stochastic Lanczos quadrature, deflated")


def _entropy(
    first: Krylov, second: Krylov, kept: int, coordinates: Tensor, scale: float, *, drop: int
) -> tuple[float, float]:
    """H and its standard error, from the Krylov spaces without their last ``drop`` blocks."""
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
    """f(T) and T for f(x) = -x log x, in units of ``scale``, with negative Ritz values (rounding) as zero."""
    last = 0 if krylov.invariant else drop * krylov.coupling.shape[1]
    size = len(krylov.projected) - last
    values, vectors = torch.linalg.eigh(krylov.projected[:size, :size] / scale)
    values = values.clamp(min=0)
    return (vectors * -torch.special.xlogy(values, values)) @ vectors.T, (vectors * values) @ vectors.T
