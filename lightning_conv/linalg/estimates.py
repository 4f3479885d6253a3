"""``Estimate``: trace, Frobenius norm and alignment of a symmetric operator, estimated from a few products with it.

An estimate has a standard error, but it is not a bound. Where a bound is needed, compute the matrix and its spectrum.
If the operator is no larger than the allowed number of products, the products are taken with the identity; the value is
then exact up to rounding, and its standard error is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.lanczos import Matvec


@dataclass(frozen=True)
class Estimate:
    """An estimated number, which is not a bound.

    About one value in three of the estimates by random vectors lies more than one standard error away, and one in twenty more
    than two. ``estimate_lambda_max`` stores the residual of its Ritz pair in its place, see ``method``.
    """

    value: float
    standard_error: float  # estimated from the same samples, so it is uncertain if they are few
    samples: int  # number of products of the operator with a vector
    method: str


def estimate_trace(
    matvec: Matvec, size: int, *, products: int = 30, seed: int = 0, device: torch.device | str = "cpu"
) -> Estimate:
    r"""Estimate the trace by Hutch++: exactly on the range of a sketch, and by random signs on the rest.

    .. math:: \mathrm{tr}(Q^T A Q) + \frac1l \sum_{i=1}^{l} z_i^T A z_i, \qquad Q = \mathrm{orth}(A S), \; z_i = (I - Q Q^T) g_i

    The estimate is unbiased, and exact if the rank of A is at most ``products // 3``.

    Args:
        matvec: v -> A v for a symmetric A, on float64 columns (N, b).
        size: N.
        products: number of products with the operator; a third each for the sketch S, its image, and the random vectors
            g_i.
        seed: seed of the random vectors, which are drawn on the CPU.
        device: device of the columns.

    Raises:
        ValueError: ``products`` is below 6.

    Source: Meyer, Musco, Musco, Woodruff 2021, Algorithm 1. For a positive semidefinite A its error decays as 1 /
    products.

    Example:
        >>> estimate_trace(lambda v: 2 * v, 20, products=20).value
        40.0
    """
    split = _split([matvec], size, products, seed, device)
    value, error = split.sum_of(lambda x, images: x * images[0])
    return Estimate(value, error, split.products, split.method("Hutch++"))


def estimate_frobenius_norm(
    matvec: Matvec, size: int, *, products: int = 30, seed: int = 0, device: torch.device | str = "cpu"
) -> Estimate:
    r"""Estimate the Frobenius norm from |A|_F^2 = |A Q|_F^2 + E |A (I - Q Q^T) g|^2, with the sketch Q of Hutch++.

    The square is unbiased. Its root has a bias of about -standard_error^2 / (2 value).

    Args:
        matvec: v -> A v for a symmetric A, on float64 columns (N, b).
        size: N.
        products: number of products with the operator.
        seed: seed of the random vectors.
        device: device of the columns.

    Raises:
        ValueError: ``products`` is below 6.

    Source: Hutch++ (Meyer et al. 2021) applied to A^2, whose quadratic forms cost one product with A each.

    Example:
        >>> estimate_frobenius_norm(lambda v: 2 * v, 16, products=16).value
        8.0
    """
    split = _split([matvec], size, products, seed, device)
    square, error = split.sum_of(lambda _, images: images[0].square())
    value = math.sqrt(square)
    return Estimate(
        value, error / (2 * value) if value else 0.0, split.products, split.method("root of Hutch++ on A^2")
    )


def estimate_target_alignment(
    matvec: Matvec, size: int, targets: Tensor, *, products: int = 30, seed: int = 0
) -> Estimate:
    r"""Estimate the alignment <A, Y Y^T>_F / (|A|_F |Y Y^T|_F) with targets Y; only |A|_F is an estimate.

    Args:
        matvec: v -> A v for a symmetric A, on float64 columns (N, b).
        size: N.
        targets: Y, (N, k) float64, on the device of the columns.
        products: number of products with the operator for |A|_F, in addition to the k products with Y.
        seed: seed of the random vectors.

    Raises:
        ValueError: ``targets`` has the wrong shape, or ``products`` is below 6.

    Source: Cristianini, Shawe-Taylor, Elisseeff, Kandola 2001 (kernel-target alignment, not centred).

    Example:
        >>> targets = torch.ones(16, 1, dtype=torch.float64)
        >>> estimate_target_alignment(lambda v: 2 * v, 16, targets, products=16).value
        0.25
    """
    if targets.ndim != 2 or len(targets) != size or targets.numel() == 0:
        raise ValueError(
            f"targets: shape {tuple(targets.shape)}; need ({size}, k), one row for each row of the operator"
        )
    norm = estimate_frobenius_norm(matvec, size, products=products, seed=seed, device=targets.device)
    inner = float((targets * matvec(targets)).sum())
    scale = norm.value * float((targets.T @ targets).norm())
    value = inner / scale if scale else math.nan
    error = abs(value) * norm.standard_error / norm.value if scale else math.nan
    return Estimate(value, error, norm.samples + targets.shape[1], f"exact numerator over the {norm.method}")


def estimate_alignment(
    matvec: Matvec, other: Matvec, size: int, *, products: int = 30, seed: int = 0, device: torch.device | str = "cpu"
) -> Estimate:
    r"""Estimate the alignment <A, B>_F / (|A|_F |B|_F) of two operators, with the same vectors for all three terms.

    The errors of numerator and denominator cancel to first order if A and B are nearly multiples of each other.

    Args:
        matvec: v -> A v for a symmetric A, on float64 columns (N, b).
        other: v -> B v for a symmetric B.
        size: N.
        products: number of products with each of the two operators.
        seed: seed of the random vectors.
        device: device of the columns.

    Raises:
        ValueError: ``products`` is below 8.

    Source: as ``estimate_frobenius_norm``, with <A, B>_F = <A Q, B Q>_F + E (A z) . (B z). The standard error follows
    from the delta method.

    Example:
        >>> estimate_alignment(lambda v: 2 * v, lambda v: 3 * v, 16, products=16).value
        1.0
    """
    split = _split([matvec, other], size, products, seed, device)

    def inner(first: int, second: int) -> tuple[float, Tensor]:
        base, samples = split.parts_of(lambda _, images: images[first] * images[second])
        return base + mean_of(samples), samples

    (cross, of_cross), (left, of_left), (right, of_right) = inner(0, 1), inner(0, 0), inner(1, 1)
    scale = math.sqrt(left * right)
    if scale == 0:
        return Estimate(math.nan, math.nan, 2 * split.products, "an operator is zero")
    value = cross / scale
    change = of_cross / scale - value / 2 * (of_left / left + of_right / right)
    method = split.method("Hutch++ on A B, A^2 and B^2")
    return Estimate(value, standard_error_of(change), 2 * split.products, method)


@dataclass(frozen=True)
class _Split:
    """Orthonormal columns Q on which everything is exact, random vectors z orthogonal to them, and both images."""

    basis: Tensor  # Q, (N, d)
    basis_images: Sequence[Tensor]  # A Q for each operator
    rest: Tensor  # z, (N, l)
    rest_images: Sequence[Tensor]
    products: int  # with each operator

    def method(self, name: str) -> str:
        return name if self.rest.shape[1] else "products with the identity"

    def parts_of(self, term: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> tuple[float, Tensor]:
        """Return the sum of ``term(x, images of x)`` over Q, and its sum for each column of z, (l,)."""
        return float(term(self.basis, self.basis_images).sum()), term(self.rest, self.rest_images).sum(0)

    def sum_of(self, term: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> tuple[float, float]:
        """Return the estimated sum over an orthonormal basis of the whole space, and its standard error."""
        base, samples = self.parts_of(term)
        return base + mean_of(samples), standard_error_of(samples)


def _split(matvecs: Sequence[Matvec], size: int, products: int, seed: int, device: torch.device | str) -> _Split:
    least = 4 + 2 * len(matvecs)
    if products < least:
        raise ValueError(f"products: {products}; need at least {least}")
    if size <= products:
        basis = torch.eye(size, dtype=torch.float64, device=device)
        rest = basis[:, :0]
        return _Split(basis, [matvec(basis) for matvec in matvecs], rest, [rest] * len(matvecs), size)
    # Q contains each operator's image of the sketch: one part for the sketch, one per operator for Q, one for the rest.
    part = products // (2 + len(matvecs))
    generator = torch.Generator().manual_seed(seed)
    sketch = random_signs(size, part, generator, device)
    basis = torch.linalg.qr(torch.cat([matvec(sketch) for matvec in matvecs], 1))[0]
    rest = project_out(basis, random_signs(size, products - part - basis.shape[1], generator, device))
    return _Split(basis, [m(basis) for m in matvecs], rest, [m(rest) for m in matvecs], products)


def random_signs(size: int, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Return columns g of independent random signs, (size, count) in float64, with E g g^T = I."""
    return (2 * torch.randint(0, 2, (size, count), generator=generator) - 1).to(device, torch.float64)


def project_out(basis: Tensor, vectors: Tensor) -> Tensor:
    """Return (I - Q Q^T) V for orthonormal columns Q."""
    return vectors - basis @ (basis.T @ vectors)


def spectral_entropy(weights: Tensor) -> Tensor:
    """Compute H = -sum_i p_i log p_i of p_i = w_i / sum w, a scalar; exp(H) is the effective rank.

    It is -inf if all weights are zero, so that the effective rank is 0 then.

    Args:
        weights: w, eigenvalues or singular values, zero or more, (N,).

    Source: Roy & Vetterli 2007, Definition 1.
    """
    # The shares have no scale: divided by the largest weight, no sum overflows and no weight that counts vanishes.
    largest = weights.max()
    if float(largest) == 0:
        return torch.full_like(largest, -math.inf)
    weights = weights / largest
    shares = weights / weights.sum()
    terms: Tensor = torch.special.xlogy(shares, shares)
    return -terms.sum()


def mean_of(samples: Tensor) -> float:
    """Return the mean, or zero if there are no samples."""
    return float(samples.mean()) if len(samples) else 0.0


def standard_error_of(samples: Tensor) -> float:
    """Return the standard error of the mean of two or more samples, or zero if there are none."""
    return float(samples.std()) / math.sqrt(len(samples)) if len(samples) else 0.0
