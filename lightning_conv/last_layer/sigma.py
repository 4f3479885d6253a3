"""sigma_max and sigma_min of [h, 1] with proven bounds, from a few passes over the features or the smaller Gram matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.last_layer.gram import SmallGram, small_gram
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.largest import largest_eigenvalue
from lightning_conv.linalg.eigenvalues.smallest import smallest_eigenvalue
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD, rescaled
from lightning_conv.linalg.lanczos import lanczos
from lightning_conv.linalg.rounding import gamma

STEPS = 12


def sigma_max(problem: HeadProblem, *, tolerance: float = 1e-3) -> Bounded:
    """Compute the largest singular value of [h, 1] with proven bounds.

    First ``trace_bound`` is computed on a Krylov space, which needs only passes over the features. If its interval is wider
    than ``tolerance``, the smaller Gram matrix and ``largest_eigenvalue`` follow. If that matrix does not fit into memory,
    the first bounds are returned.

    Args:
        problem: the problem with the features [h, 1].
        tolerance: required relative width of the interval.

    Features of extreme size are scaled by a power of two first, so that no square vanishes or overflows.

    Raises:
        ValueError: the features are larger than 2^200 and the bias is trained.

    Cost: at most 13 passes of 4 n D flops; with the Gram matrix 2 n D min(n, D) flops more.
    """
    problem, exponent = problem.scaled()
    return rescaled(_sigma_max(problem, tolerance), exponent)


def _sigma_max(problem: HeadProblem, tolerance: float) -> Bounded:
    found = trace_bound(problem, _krylov(problem))
    if found.upper - found.lower <= tolerance * found.value:
        return found
    try:
        gram = small_gram(problem)
    except MemoryError:
        return found
    largest = largest_eigenvalue(gram.matrix, tolerance=tolerance)
    return _gram_root(largest, gram, "largest eigenvalue of the Gram matrix: " + largest.method)


def sigma_min(problem: HeadProblem) -> Bounded:
    """Compute the smallest of the min(n, D) singular values of [h, 1] with proven bounds, from the smaller Gram matrix.

    The Gram matrix has the squared singular values, which costs half the digits: below about 1e-7 of the largest one the
    lower bound is 0. ``certify_expressivity`` uses the singular values themselves, and supports streamed features.

    Raises:
        MemoryError: the Gram matrix does not fit.
    """
    problem, exponent = problem.scaled()
    return rescaled(gram_sigma_min(small_gram(problem)), exponent)


def gram_sigma_min(gram: SmallGram) -> Bounded:
    """Compute ``sigma_min`` from an existing Gram matrix."""
    smallest = smallest_eigenvalue(gram.matrix)
    return _gram_root(smallest, gram, "smallest eigenvalue of the Gram matrix: " + smallest.method)


def _gram_root(square: Bounded, gram: SmallGram, method: str) -> Bounded:
    lower, upper = square.lower - gram.rounding, square.upper + gram.rounding
    return _root(square.value, lower, upper, square.certified, method)


def _root(value: float, lower: float, upper: float, certified: bool, method: str) -> Bounded:
    """Take square roots and round the bounds outwards."""
    low, high = math.sqrt(max(lower, 0.0)) / OUTWARD, math.sqrt(max(upper, 0.0)) * OUTWARD
    return Bounded(min(max(math.sqrt(max(value, 0.0)), low), high), low, high, certified, method)


def _krylov(problem: HeadProblem) -> Tensor:
    """Return orthonormal columns (D, k) of the Krylov space of the mean row, which is near the top vector of positive features."""
    column = problem.adjoint(torch.ones(problem.samples, 1, dtype=torch.float64, device=problem.device))
    if not float(column.norm()) > 0:
        column = problem.zeros()[:, :1] + 1
    steps = min(STEPS, problem.columns)
    return lanczos(
        lambda v: _squared(problem, v)[1], problem.columns, steps=steps, start=column, device=problem.device
    ).basis


def _squared(problem: HeadProblem, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (Z Q, Z^T Z Q) in one pass."""
    images, squares = [], torch.zeros_like(basis)
    for _, h in problem.rows():
        image = problem.times(h, basis)
        images.append(image)
        squares += problem.transposed(h, image)
    return torch.cat(images), squares


def trace_bound(problem: HeadProblem, basis: Tensor) -> Bounded:
    r"""Bound sigma_max(Z), Z = [h, 1], from any orthonormal columns Q (D, k), in one pass; the bounds are proven.

    Let G = Z^T Z, H = Q^T G Q and R = G Q - Q H. The remaining trace c = |Z|_F^2 - tr H is at least the norm of G on the
    complement of Q. For unit vectors Q x + w this gives

    .. math:: \lambda_{\max}(H) \le \lambda_{\max}(G) \le \max_{a^2 + b^2 = 1} \lambda_{\max}(H) a^2 + 2 \|R\| a b + c b^2 .

    The upper bound is the largest eigenvalue of a 2 x 2 matrix, and it is close to lambda_max(H) if that is above c.
    Rounding: with d = |Q^T Q - I|, Q is within d of orthonormal columns, and H, R and tr H err by at most
    k (4 d + 6 gamma_{n + D + 8}) |Z|_F^2.

    Args:
        problem: the problem with the features.
        basis: orthonormal columns Q, (D, k).
    """
    count = basis.shape[1]
    overlap = basis.T @ basis
    overlap.diagonal().sub_(1)
    g = gamma(problem.samples + problem.columns + 8, torch.float64)
    trace = float(problem.row_norms.square().sum()) * (1 + g)
    images, squares = _squared(problem, basis)
    inner = images.T @ images
    inner = (inner + inner.T) / 2
    error = trace * count * (4 * (float(overlap.norm()) + g) + 6 * g) * OUTWARD
    rest = (float((squares - basis @ inner).norm()) + error) * OUTWARD
    value = float(torch.linalg.eigvalsh(inner)[-1])
    error += 1e-14 * count * abs(value)  # rounding of the small eigenvalue problem
    top, complement = value + error, max(trace - float(inner.trace()) + count * error, 0.0)
    upper = (top + complement) / 2 + math.hypot((top - complement) / 2, rest)
    return _root(value, value - error, min(upper, trace), True, "Krylov space and the trace of the rest")
