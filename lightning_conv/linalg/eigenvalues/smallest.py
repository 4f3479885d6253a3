"""``smallest_eigenvalue``: shift-invert Lanczos from above, and a verified Cholesky factor from below."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_conv.checked import SEED, checked
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.cholesky import ShiftedFactor, factor_memory, rounding_level, shifted_cholesky
from lightning_conv.linalg.eigenvalues.dense import LinAlgError, dense_end
from lightning_conv.linalg.eigenvalues.symmetric import Symmetric, symmetric_matrix
from lightning_conv.linalg.lanczos import Krylov, lanczos

METHOD = "inverse Lanczos, verified Cholesky"
STEPS = 80
LEVELS_BELOW = 2.0
"""Distance of the first shift below zero, in units of the rounding level: large enough that every semidefinite matrix
has a factor, small enough to be near its spectrum."""


@checked(seed=SEED)
def smallest_eigenvalue(matrix: Tensor, *, tolerance: float = 1e-6, seed: int = 0) -> Bounded:
    r"""Compute lambda_min of a symmetric float64 matrix with proven bounds, from two Cholesky factorisations.

    The upper bound is the Rayleigh quotient of the vector that Lanczos finds with (A - t I)^{-1}, plus its rounding.
    The lower bound comes from a shift s a little below the quotient: A - s I has a Cholesky factor in floating point,
    which proves (Rump 2006)

    .. math:: \lambda_{\min}(A) \ge s - N u \operatorname{tr}(A - sI) (1 + \ldots), \qquad u = 2^{-53},

    with the constants in ``shifted_cholesky``. The interval is about max(tolerance |lambda_min|, 1.25 N u tr(A)) wide.

    The first shift t = -2 N u tr(A) lies below all eigenvalues of a semidefinite matrix. If lambda_min is not above the
    rounding level N u tr(A), the first factor is the proof, and the lower bound is about -3 N u tr(A). An indefinite
    matrix is shifted below the smallest Ritz value that Lanczos finds with A itself. If all of this fails, the result
    comes from a full decomposition with its residual bound, and ``Bounded.reason`` says why.

    Args:
        matrix: A, (N, N), float64. If it is not exactly symmetric, the bounds are those of (A + A^T) / 2.
        tolerance: relative distance of s from the Rayleigh quotient.
        seed: seed of the start vector.

    Returns:
        The eigenvalue with certified bounds.

    Raises:
        ValueError: the matrix is not square, not symmetric, empty, not float64, or not finite; ``tolerance`` is outside
            (0, 1).
        torch.linalg.LinAlgError: even the full decomposition failed, on the device and on the CPU.

    Cost: 2 N^3 / 3 flops, 4 N^2 flops for each of 20-60 Lanczos steps, and N^2 numbers beside the matrix. An indefinite
    matrix takes up to three more factorisations.

    Source: S. M. Rump, Verification of positive definiteness, BIT Numerical Mathematics 46 (2006) 433-452; Ericsson &
    Ruhe 1980 (shift-invert Lanczos).

    Example:
        >>> import torch
        >>> smallest = smallest_eigenvalue(torch.diag(torch.tensor([1e-10, 1.0, 3.0], dtype=torch.float64)))
        >>> 0 < smallest.lower <= 1e-10 <= smallest.upper
        True
    """
    require_tolerance(tolerance)
    a = symmetric_matrix(matrix)
    return a.rescaled(smallest(a, tolerance, seed))


def smallest(a: Symmetric, tolerance: float, seed: int, out: Tensor | None = None) -> Bounded:
    """Compute ``smallest_eigenvalue`` of a checked matrix; ``out`` is memory for the factors."""
    if a.norm == 0:
        return Bounded(0.0, 0.0, 0.0, True, "zero matrix")
    try:
        return _by_factors(a, tolerance, seed, factor_memory(a) if out is None else out)
    except LinAlgError as error:
        return dense_end(a, 0, f"full decomposition, because: {error}")


def require_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that is not between 0 and 1.

    Raises:
        ValueError: ``tolerance`` is outside (0, 1).
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: {tolerance}; need a relative distance between 0 and 1, such as 1e-6")


@dataclass(frozen=True)
class _Approximation:
    value: float  # Rayleigh quotient
    rounding: float  # proven bound on its rounding error
    distance: float  # estimate of value - lambda_min


def _by_factors(a: Symmetric, tolerance: float, seed: int, buffer: Tensor) -> Bounded:
    level = rounding_level(a)
    factor = shifted_cholesky(a, -LEVELS_BELOW * level, out=buffer)
    reason = "" if factor else "indefinite"
    factor = factor or _factor_below(a, level, seed, buffer)
    lower, upper, value = factor.lower, float("inf"), float("nan")
    for _ in range(4):
        found = _nearest_above(a, factor, tolerance, level, seed)
        if found.value + found.rounding < upper:
            value, upper = found.value, found.value + found.rounding
        # What the first factor does not distinguish from zero needs no further proof.
        if not reason and found.value <= LEVELS_BELOW * level:
            reason = "not above the rounding level N u tr(A): the first factor is the proof"
            break
        gap = max(tolerance * abs(found.value), level / 4, 2 * found.distance)
        closer = shifted_cholesky(a, found.value - gap, out=buffer) or shifted_cholesky(
            a, found.value - 16 * gap, out=buffer
        )
        if closer is None:
            reason = reason or "no factor close to the Rayleigh quotient"
            break
        lower = max(lower, closer.lower)
        if 2 * found.distance <= max(tolerance * abs(found.value), level):
            break
        factor = closer  # Lanczos had not converged from a distant shift, so repeat it from a near one
    # By rounding the quotient may lie below a proven lower bound, but its upper bound never does.
    return Bounded(min(max(value, lower), upper), lower, upper, certified=True, method=METHOD, reason=reason)


def _nearest_above(a: Symmetric, factor: ShiftedFactor, tolerance: float, level: float, seed: int) -> _Approximation:
    """Find the eigenvalue next to the shift t by Lanczos with (A - t I)^-1, whose top is nu = 1 / (lambda_min - t)."""

    def converged(krylov: Krylov) -> bool:
        if krylov.basis.shape[1] < 8 or krylov.basis.shape[1] % 4:
            return False
        nu, error = top_ritz_value(krylov)
        # To a hundredth of what the proof leaves open anyway.
        return nu > 0 and error / nu / (nu + error) <= 0.01 * max(tolerance * abs(factor.shift + 1 / nu), level / 4)

    krylov = lanczos(factor.solve, a.size, steps=min(STEPS, a.size), seed=seed, device=a.matrix.device, stop=converged)
    nu, error = top_ritz_value(krylov)
    if not nu > 0:
        raise LinAlgError(
            f"inverse Lanczos at shift {factor.shift:.1e} gave the eigenvalue {nu:.1e}, which is not positive"
        )
    # One inverse iteration, since A magnifies the components of large eigenvalues by lambda_max / lambda_min.
    vector = factor.solve(krylov.basis @ krylov.ritz()[1][:, -1:])[:, 0]
    value, rounding = a.rayleigh(vector / vector.norm())
    return _Approximation(value, rounding, error / nu / (nu + error))


def _factor_below(a: Symmetric, level: float, seed: int, buffer: Tensor) -> ShiftedFactor:
    """Return a factor of A - t I with t below lambda_min < 0, as near to it as plain Lanczos can tell."""
    krylov = lanczos(a.product, a.size, steps=min(STEPS // 2, a.size), seed=seed, device=a.matrix.device)
    values, _, residuals = krylov.ritz()
    gap = max(float(residuals[0]), 1e-3 * float(values[-1] - values[0]), 4 * level)
    for _ in range(4):
        factor = shifted_cholesky(a, float(values[0]) - gap, out=buffer)
        if factor:
            return factor
        gap *= 8
    factor = shifted_cholesky(a, -2 * a.norm - 4 * a.size * level, out=buffer)
    if factor is None:
        raise LinAlgError("no Cholesky factor below the spectrum")
    return factor


def top_ritz_value(krylov: Krylov) -> tuple[float, float]:
    """Return the largest Ritz value and an estimate of its distance to the eigenvalue above, min(|r|, |r|^2 / gap)."""
    values, _, residuals = krylov.ritz()
    value, residual = float(values[-1]), float(residuals[-1])
    gap = value - float(values[-2]) if len(values) > 1 else 0.0
    return value, min(residual, residual**2 / gap) if gap > 0 else residual
