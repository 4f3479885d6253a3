"""The spectrum of a kernel with proven error bounds: ``Spectrum``, ``kernel_spectrum``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.cholesky import factor_memory
from lightning_conv.linalg.eigenvalues.dense import LinAlgError, decompose, eigen_decomposition, residual_radius
from lightning_conv.linalg.eigenvalues.largest import largest
from lightning_conv.linalg.eigenvalues.ritz import ritz_bounds
from lightning_conv.linalg.eigenvalues.smallest import smallest
from lightning_conv.linalg.eigenvalues.symmetric import checked, require_symmetric

__all__ = [
    "Bounded",
    "LinAlgError",
    "Method",
    "Spectrum",
    "eigen_decomposition",
    "kernel_spectrum",
    "require_symmetric",
    "residual_radius",
]

Method: TypeAlias = Literal["dense", "extremes", "auto"]

DENSE_UP_TO = 512
"""Size to which ``"auto"`` computes all eigenvalues: there the two outermost alone are no faster."""

TOLERANCE, SEED = 1e-6, 0


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a Gram matrix, ascending, with the bounds of the outermost two."""

    eigenvalues: Tensor | None  # float64, (N,), ascending, as computed; None: only the outermost two are known
    lambda_min: Bounded
    lambda_max: Bounded
    radius: float | None
    """Every eigenvalue of the exact kernel is within this distance of the computed one (same status as the bounds); None without
    ``eigenvalues``."""
    trace: float | None = None  # None: the sum of the eigenvalues

    @property
    def condition_number(self) -> float:
        """lambda_max / lambda_min of the values; infinite where lambda_min is not above zero."""
        return self.lambda_max.value / self.lambda_min.value if self.lambda_min.value > 0 else math.inf

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the eigenvalues as a distribution (Roy & Vetterli 2007): N if all are equal, 1 if one has all.

        Raises:
            ValueError: only the outermost two eigenvalues are known.
        """
        share = self.all_eigenvalues("effective_rank").clamp(min=0)
        share = share / share.sum()
        return float(torch.exp(-torch.special.xlogy(share, share).sum()))

    @property
    def stable_rank(self) -> float:
        """trace / lambda_max."""
        trace = float(self.all_eigenvalues("stable_rank").sum()) if self.trace is None else self.trace
        return trace / self.lambda_max.value

    def all_eigenvalues(self, purpose: str = "this") -> Tensor:
        """The eigenvalues, where all of them are known.

        Raises:
            ValueError: only the outermost two are known.
        """
        if self.eigenvalues is None:
            raise ValueError(
                f"{purpose}: needs every eigenvalue, and this spectrum has the outermost two; use kernel_spectrum(..., "
                'method="dense"), of an operator its dense() matrix'
            )
        return self.eigenvalues


def kernel_spectrum(
    gram: KernelGram | NTKOperator | Tensor, *, method: Method | None = None, steps: int = 64
) -> Spectrum:
    """Eigenvalues of a Gram matrix in float64 with bounds on the smallest and the largest.

    For a bare symmetric matrix the bounds are proven for that matrix: by ``residual_radius``, or for the outermost two
    alone by ``smallest_eigenvalue`` and ``largest_eigenvalue``. For a ``KernelGram`` they are for the kernel: the floor
    of its products is added (Weyl), zero is a lower bound because J J^T is positive semidefinite, and the rounding
    delta = jacobian_error * |J|_F inside the network's passes moves singular values by at most delta, sqrt(lambda) -+
    delta. As delta is an estimate, such bounds are ``certified`` only at ``precision="certified"``, where the statement is
    about the Jacobian as computed in float64.

    Of an ``NTKOperator`` the outermost two Ritz values are had, with their residuals: see ``ritz_bounds``. ``lambda_min.upper``
    and ``lambda_max.lower`` are bounds up to the rounding of the products, for which 4 sqrt(N) eps lambda_max is allowed with eps
    of the operator's ``precision``; the other two ends assume that the Ritz values are those of the outermost eigenvalues. Neither is
    ``certified``.

    lambda_min on m probe samples is an UPPER bound of lambda_min over a larger set that holds them (interlacing).

    Args:
        gram: a ``KernelGram``, a symmetric float64 matrix (N, N), or an ``NTKOperator``.
        method: ``"dense"``: all eigenvalues. ``"extremes"``: the outermost two, at a fraction of the cost for large N;
            ``Spectrum.eigenvalues`` and ``radius`` are then None. ``"auto"``: dense up to N = 512, extremes above. None: dense of a
            matrix; of an operator there are the extremes only.
        steps: products with an operator, at most. lambda_max takes about ten; lambda_min of a kernel hundreds.

    Raises:
        ValueError: not square, not symmetric, empty, not float64, or not finite; unknown method, or one that needs a matrix.
        TypeError: ``gram`` is none of the three.
        torch.linalg.LinAlgError: the eigensolver failed on the device and on the CPU.

    Cost: about 12 N^3 flops dense; 2 N^3 / 3 and about 300 N^2 for the extremes of a kernel (``benchmarks/lambda_min.py``
    measures both); ``steps`` + 1 products with an operator.

    Example:
        >>> import torch
        >>> spectrum = kernel_spectrum(torch.diag(torch.tensor([1e-12, 1.0], dtype=torch.float64)))
        >>> spectrum.lambda_min.lower <= 1e-12 <= spectrum.lambda_min.upper
        True
    """
    if method is not None and method not in get_args(Method):
        raise ValueError(f"method: {method!r} is not one of {', '.join(map(repr, get_args(Method)))}")
    if isinstance(gram, NTKOperator):
        return _of_an_operator(gram, method, steps)
    if not isinstance(gram, KernelGram | Tensor):
        raise TypeError(f"gram: got {type(gram).__name__}; need a KernelGram, a symmetric matrix or an NTKOperator")
    if isinstance(gram, KernelGram) and gram.n_samples2 is not None:
        raise ValueError(
            "gram: a kernel between two sets of samples has no eigenvalues; compute the one of a single set (no inputs2)"
        )
    matrix = gram.matrix if isinstance(gram, KernelGram) else gram
    if method == "extremes" or (method == "auto" and matrix.ndim == 2 and len(matrix) > DENSE_UP_TO):
        spectrum = _extremes(matrix)
    else:
        spectrum = _dense(matrix)
    return _of_the_kernel(spectrum, gram) if isinstance(gram, KernelGram) else spectrum


def _dense(matrix: Tensor) -> Spectrum:
    require_symmetric(matrix, "gram")
    values, vectors, reason = decompose(matrix)
    absolute, relative = residual_radius(matrix.to(vectors.device), values, vectors)
    radius = absolute + relative * float(values.abs().max())

    def bounded(value: float) -> Bounded:
        error = absolute + relative * abs(value)
        return Bounded(value, value - error, value + error, certified=True, method="residual bound", reason=reason)

    return Spectrum(values, bounded(float(values[0])), bounded(float(values[-1])), radius)


def _extremes(matrix: Tensor) -> Spectrum:
    a = checked(matrix, "gram")
    memory = factor_memory(a)
    lowest, highest = (a.rescaled(end(a, TOLERANCE, SEED, memory)) for end in (smallest, largest))
    return Spectrum(None, lowest, highest, radius=None, trace=float(matrix.diagonal().sum()))


def _of_an_operator(operator: NTKOperator, method: Method | None, steps: int) -> Spectrum:
    """Ritz values of J J^T, wider by the rounding of its products."""
    if method == "dense":
        raise ValueError(
            "method: 'dense' needs the matrix, and an operator has products; use kernel_spectrum(operator.dense()), or ntk_gram for "
            "bounds that are proven"
        )
    size = operator.shape[0]
    found = ritz_bounds(operator.matmul, size, steps=steps, seed=SEED, semidefinite=True, device=operator.device)
    rounding = 4 * math.sqrt(size) * torch.finfo(operator.precision).eps * found.lambda_max.upper

    def widened(end: Bounded) -> Bounded:
        return replace(
            end,
            lower=max(end.lower - rounding, 0.0),
            upper=end.upper + rounding,
            method=f"{end.method} + rounding of products",
            reason="the kernel is known by its products only",
        )

    return Spectrum(None, widened(found.lambda_min), widened(found.lambda_max), radius=None)


def _of_the_kernel(spectrum: Spectrum, gram: KernelGram) -> Spectrum:
    """Bounds of the kernel that ``gram`` approximates, from those of its matrix."""
    # Of a projected kernel: twice the standard error in the Frobenius norm, an estimate and no bound.
    error = gram.floor + 2 * gram.projection_error
    projected = " + 2 standard errors of the projection" if gram.projection_error else ""
    delta = gram.jacobian_error * math.sqrt(max(gram.trace, 0.0))

    def widened(of_matrix: Bounded) -> Bounded:
        low = max(math.sqrt(max(of_matrix.lower - error, 0.0)) - delta, 0.0) ** 2
        high = (math.sqrt(max(of_matrix.upper + error, 0.0)) + delta) ** 2
        return replace(
            of_matrix,
            value=min(max(of_matrix.value, low), high),
            lower=low,
            upper=high,
            certified=of_matrix.certified and gram.precision == "certified" and not projected,
            method=f"{of_matrix.method} + {gram.precision} floor + Jacobian rounding{projected}",
        )

    lowest, highest = widened(spectrum.lambda_min), widened(spectrum.lambda_max)
    radius = spectrum.radius
    if radius is not None:
        radius = max(radius, highest.upper - highest.value, highest.value - highest.lower)
    return replace(spectrum, lambda_min=lowest, lambda_max=highest, radius=radius, trace=gram.trace)
