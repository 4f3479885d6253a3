"""``ritz_bounds``: the extreme eigenvalues of an operator that is known only by its products, from Lanczos."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.checked import SEED, checked, whole
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.symmetric import SAFE_EXPONENT, rescaled
from lightning_conv.linalg.lanczos import Matvec, lanczos
from lightning_conv.linalg.rounding import exponent_of, ldexp

METHOD = "Lanczos residual"
ASYMMETRY = 1e-3
"""Relative asymmetry above which an operator counts as not symmetric; that of float32 products is far smaller."""


@dataclass(frozen=True)
class RitzBounds:
    """Ritz values of an operator, and what they say about its smallest and largest eigenvalue."""

    lambda_min: Bounded
    lambda_max: Bounded
    values: Tensor  # all Ritz values, (k,), ascending
    residuals: Tensor  # (k,): within this distance of each there is an eigenvalue
    invariant: bool
    """Whether the Krylov space is invariant up to rounding. The Ritz values are then all eigenvalues to whose
    eigenvectors the start is not orthogonal."""


@checked(size=whole(1), steps=whole(1), block=whole(1), seed=SEED)
def ritz_bounds(
    matvec: Matvec,
    size: int,
    *,
    steps: int = 64,
    block: int = 1,
    seed: int = 0,
    start: Tensor | None = None,
    semidefinite: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> RitzBounds:
    r"""Compute Ritz values of a symmetric operator, which bound lambda_min from above and lambda_max from below.

    For a Ritz pair (theta, y), |y| = 1, with residual r = A y - theta y, it is proven in exact arithmetic that

    - lambda_min <= theta <= lambda_max (Courant-Fischer), for every theta: ``lambda_min.upper`` is the smallest Ritz
      value, ``lambda_max.lower`` the largest;
    - some eigenvalue lies in [theta - |r|, theta + |r|] (Parlett 1998, Theorem 4.5.1). It need not be the smallest or
      the largest one, so ``lambda_min.lower`` = theta - |r| and ``lambda_max.upper`` = theta + |r| are only estimates.
      They fail if the start vector is nearly orthogonal to the eigenvector.

    The residuals of the two ends are recomputed by one more product. The rounding of the operator is not known here, so
    an allowance of 4 sqrt(N) eps max|A q| is added on each side, and neither interval is ``certified``.
    ``smallest_eigenvalue`` certifies, but needs the matrix.

    Args:
        matvec: v -> A v for a symmetric A, on columns (N, b).
        size: N.
        steps: largest number of products. A well separated lambda_max takes about ten, lambda_min of a kernel, near
            which many eigenvalues lie, hundreds.
        block: number b of start vectors, which find an eigenvalue up to b times and cost b columns per step.
        seed: seed of the start.
        start: see ``lanczos``.
        semidefinite: whether A is known to be positive semidefinite, as J J^T is; lower ends are then at least zero.
        dtype: see ``lanczos``.
        device: see ``lanczos``.

    Raises:
        ValueError: A is not symmetric; ``lanczos`` lists further causes.

    Cost: ``steps`` + 1 products with A, 4 N k^2 flops and N k numbers for k <= block steps Ritz values.

    Example:
        >>> import torch
        >>> diagonal = torch.arange(1.0, 101.0, dtype=torch.float64)[:, None]
        >>> found = ritz_bounds(lambda v: diagonal * v, 100, steps=50)
        >>> found.lambda_min.lower <= 1 <= found.lambda_min.upper
        True
        >>> found.lambda_max.lower <= 100 <= found.lambda_max.upper
        True
    """
    exponent: int | None = None  # of the operator, from its first product: squares then neither vanish nor overflow

    def scaled(columns: Tensor) -> Tensor:
        nonlocal exponent
        images = matvec(columns)
        if exponent is None:
            found = exponent_of(images)
            exponent = found if abs(found) > SAFE_EXPONENT * (dtype == torch.float64) + 30 else 0
        return ldexp(images, -exponent) if exponent else images

    krylov = lanczos(scaled, size, steps=steps, start=start, block=block, seed=seed, dtype=dtype, device=device)
    if krylov.asymmetry > ASYMMETRY:
        raise ValueError(
            f"matvec: not symmetric (<x, A y> and <y, A x> differ by {krylov.asymmetry:.1e} of the largest product); Lanczos needs A = A^T"
        )
    values, coordinates, residuals = krylov.ritz()
    ends = krylov.basis @ coordinates[:, [0, -1]]
    ends = ends / ends.norm(dim=0)
    images = scaled(ends)
    thetas = (ends * images).sum(0)
    distances = (images - ends * thetas).norm(dim=0)
    allowance = 4 * size**0.5 * torch.finfo(values.dtype).eps * float(images.norm(dim=0).max())
    floor = 0.0 if semidefinite else -float("inf")
    (low, high), (below, above) = thetas.tolist(), distances.tolist()
    exponent = exponent or 0
    return RitzBounds(
        lambda_min=rescaled(_bounded(low, low - below - allowance, low + allowance, floor), exponent),
        lambda_max=rescaled(_bounded(high, high - allowance, high + above + allowance, floor), exponent),
        values=ldexp(values, exponent),
        residuals=ldexp(residuals, exponent),
        invariant=krylov.invariant,
    )


def _bounded(value: float, lower: float, upper: float, floor: float) -> Bounded:
    return Bounded(max(value, floor), max(lower, floor), max(upper, floor), certified=False, method=METHOD)
