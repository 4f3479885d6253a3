"""sigma_max([h, 1]) with proven bounds: a few passes over the features, or the smaller Gram matrix where these do not settle it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.kernels.products.precision import gamma
from lightning_conv.last_layer.gram import SmallGram, small_gram
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.largest import largest_eigenvalue
from lightning_conv.linalg.eigenvalues.smallest import smallest_eigenvalue
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.lanczos import lanczos

STEPS = 12


def sigma_max(problem: HeadProblem, *, tolerance: float = 1e-3) -> Bounded:
    """The largest singular value of [h, 1], with proven bounds.

    First ``trace_bound`` on a Krylov space, which needs nothing but passes; where its interval is wider than
    ``tolerance``, the smaller Gram matrix and ``largest_eigenvalue``; where that does not fit into memory, what there
    is.

    Args:
        problem: gives [h, 1].
        tolerance: relative width that is asked for.

    Cost: at most 13 passes of 4 n D flops; with the Gram matrix 2 n D min(n, D) flops more.
    """
    found = trace_bound(problem, _krylov(problem))
    if found.upper - found.lower <= tolerance * found.value:
        return found
    try:
        gram = small_gram(problem)
    except MemoryError:
        return found
    largest = largest_eigenvalue(gram.matrix, tolerance=tolerance)
    return _root(largest, gram, "largest eigenvalue of the Gram matrix: " + largest.method)


def sigma_min(problem: HeadProblem) -> Bounded:
    """The smallest of the min(n, D) singular values of [h, 1], with proven bounds, by the smaller Gram matrix.

    Squares cost half the digits: below about 1e-7 of the largest the lower bound is 0. ``certify_expressivity`` gives
    it by the singular values themselves, or for features that are not held.

    Raises:
        MemoryError: the Gram matrix does not fit.
    """
    return gram_sigma_min(small_gram(problem))


def gram_sigma_min(gram: SmallGram) -> Bounded:
    """The same, of a Gram matrix that is there already."""
    smallest = smallest_eigenvalue(gram.matrix)
    return _root(smallest, gram, "smallest eigenvalue of the Gram matrix: " + smallest.method)


def _root(square: Bounded, gram: SmallGram, method: str) -> Bounded:
    low = math.sqrt(max(square.lower - gram.rounding, 0.0)) / OUTWARD
    high = math.sqrt(max(square.upper + gram.rounding, 0.0)) * OUTWARD
    return Bounded(min(max(math.sqrt(max(square.value, 0.0)), low), high), low, high, square.certified, method)


def _krylov(problem: HeadProblem) -> Tensor:
    """Orthonormal columns (D, k) of the Krylov space of the mean row, which features of one sign almost share as top vector."""
    column = problem.adjoint(torch.ones(problem.samples, 1, dtype=torch.float64, device=problem.device))
    if not float(column.norm()) > 0:
        column = problem.zeros()[:, :1] + 1
    steps = min(STEPS, problem.columns)
    return lanczos(
        lambda v: _squared(problem, v)[1], problem.columns, steps=steps, start=column, device=problem.device
    ).basis


def _squared(problem: HeadProblem, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(Z Q, Z^T Z Q) in one pass."""
    images, squares = [], torch.zeros_like(basis)
    for _, h in problem.rows():
        image = problem.times(h, basis)
        images.append(image)
        squares += problem.transposed(h, image)
    return torch.cat(images), squares


def trace_bound(problem: HeadProblem, basis: Tensor) -> Bounded:
    r"""Proven bounds of sigma_max(Z), Z = [h, 1], from any orthonormal columns Q (D, k): one pass.

    With G = Z^T Z, H = Q^T G Q, R = G Q - Q H and the trace that Q leaves, c = |Z|_F^2 - tr H, which is at least the norm of G on the
    complement, any unit vector Q x + w has

    .. math:: \lambda_{\max}(H) \le \lambda_{\max}(G) \le \max_{a^2 + b^2 = 1} \lambda_{\max}(H) a^2 + 2 \|R\| a b + c
    b^2 ,

    the largest eigenvalue of a 2 x 2 matrix: next to lambda_max(H) where that is above c. Rounding: with d = |Q^T Q -
    I|, Q is within d of orthonormal columns, and H, R and tr H err by at most k (4 d + 6 gamma_{n + D + 8}) |Z|_F^2.

    Args:
        problem: gives Z.
        basis: Q.
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
    error += 1e-14 * count * abs(value)  # of the small eigenvalue problem
    top, complement = value + error, max(trace - float(inner.trace()) + count * error, 0.0)
    upper = (top + complement) / 2 + math.hypot((top - complement) / 2, rest)
    low, high = math.sqrt(max(value - error, 0.0)) / OUTWARD, math.sqrt(min(upper, trace)) * OUTWARD
    return Bounded(
        min(max(math.sqrt(max(value, 0.0)), low), high), low, high, True, "Krylov space and the trace of the rest"
    )
