"""``kernel_spectrum``: the eigenvalues of a ``KernelGram``, a matrix or an ``NTKOperator``, with bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from lightning_conv.arguments import require_option
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.kernels.result import KernelGram
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.ritz import ritz_bounds
from lightning_conv.linalg.rounding import product_down, product_up, root_down, root_up, sum_down, sum_up
from lightning_conv.linalg.spectrum import SEED, Method, Spectrum, matrix_spectrum

CAST = 32
"""Relative error of a product with a kernel whose passes go through a narrower type, in units of that type's roundoff."""
VANISHING, UNDERFLOW = 2.0**-900, 2.0**-960
"""Trace below which products of the Jacobian may vanish, and more than what this takes from all sums of up to 2^100
products, each of which loses at most 2^-1074."""


def kernel_spectrum(
    gram: KernelGram | NTKOperator | Tensor, *, method: Method | None = None, steps: int = 64
) -> Spectrum:
    r"""Compute the eigenvalues of a kernel in float64, with bounds on the smallest and the largest.

    What the bounds are about depends on what is passed:

    - A symmetric matrix: they are proven for that matrix, see ``matrix_spectrum``.
    - A ``KernelGram``: they are bounds of the exact kernel J J^T. With the floor f of its products and the rounding
      delta = ``jacobian_error`` |J|_F of the network's own passes, Weyl's inequality moves eigenvalues of the matrix by
      at most f and singular values of J by at most delta,

      .. math:: \Bigl( \sqrt{\max(\lambda - f, 0)} - \delta \Bigr)_+^2 \le \lambda(J J^T)
          \le \Bigl( \sqrt{\lambda + f} + \delta \Bigr)^2 .

      delta is an estimate. The bounds are ``certified`` only with ``precision="certified"``, where they are about the
      Jacobian as computed in float64, and only if the network neither casts to a narrower type nor changes its outputs with the rest of
      the batch or with chance (``KernelGram.narrow``); delta then allows for that type or change.
    - An ``NTKOperator``: the two extreme Ritz values with their residuals, see ``ritz_bounds``. ``lambda_min.upper``
      and ``lambda_max.lower`` are bounds up to the rounding of the products, for which 4 sqrt(N) eps lambda_max is
      added with eps of the operator's ``precision``. If the network casts to a narrower type (``NTKOperator.narrowing``),
      eps is 32 times the unit roundoff of that type, an estimate. Where outputs are contracted, eps is multiplied by
      ``NTKOperator.cancellation``, another estimate. The other two ends assume that the Ritz values belong
      to the extreme eigenvalues. None of them is ``certified``.

    lambda_min on m probe samples is an UPPER bound of lambda_min over any larger set that contains them (interlacing).

    Args:
        gram: a ``KernelGram``, a symmetric float64 matrix (N, N), or an ``NTKOperator``.
        method: ``"dense"``: all eigenvalues. ``"extremes"``: the smallest and the largest, at a fraction of the cost
            for large N; ``Spectrum.eigenvalues`` and ``radius`` are then None. ``"auto"``: dense up to N = 512,
            extremes above. None: dense for a matrix; an operator has the extremes only.
        steps: largest number of products with an operator. lambda_max takes about ten, lambda_min of a kernel hundreds.

    Returns:
        The eigenvalues with ``Bounded`` ends.

    Raises:
        ValueError: the matrix is not square, not symmetric, empty, not float64, or not finite; the kernel is between
            two sets of samples; the method is unknown or needs a matrix.
        TypeError: ``gram`` is none of the three.
        torch.linalg.LinAlgError: the eigensolver failed on the device and on the CPU.

    Cost: about 12 N^3 flops if dense; 2 N^3 / 3 and about 300 N^2 flops for the extremes of a matrix
    (``benchmarks/lambda_min.py`` measures both); ``steps`` + 1 products with an operator. Source: Weyl 1912
    (perturbation of eigenvalues and singular values).

    Example:
        >>> import torch
        >>> spectrum = kernel_spectrum(torch.diag(torch.tensor([1e-12, 1.0], dtype=torch.float64)))
        >>> spectrum.lambda_min.lower <= 1e-12 <= spectrum.lambda_min.upper
        True
    """
    if method is not None:
        require_option("method", method, get_args(Method))
    if isinstance(gram, NTKOperator):
        return _operator_spectrum(gram, method, steps)
    if not isinstance(gram, KernelGram | Tensor):
        raise TypeError(f"gram: got {type(gram).__name__}; need a KernelGram, a symmetric matrix or an NTKOperator")
    if isinstance(gram, Tensor):
        return matrix_spectrum(gram, method=method)
    if gram.n_samples2 is not None:
        raise ValueError(
            "gram: a kernel between two sets of samples has no eigenvalues; compute the kernel of one set (without inputs2)"
        )
    return _with_kernel_bounds(matrix_spectrum(gram.matrix, method=method), gram)


def _operator_spectrum(operator: NTKOperator, method: Method | None, steps: int) -> Spectrum:
    """Return the Ritz bounds of J J^T, widened by the rounding of its products."""
    if method == "dense":
        raise ValueError(
            "method: 'dense' needs the matrix, and an operator has only products; use kernel_spectrum(operator.dense()), or "
            "ntk_gram for proven bounds"
        )
    size = operator.shape[0]
    found = ritz_bounds(operator.matmul, size, steps=steps, seed=SEED, semidefinite=True, device=operator.device)
    narrowing = operator.narrowing
    eps = torch.finfo(operator.precision).eps if narrowing is None else CAST * narrowing.unit
    cast = "" if narrowing is None else f", and {narrowing}"
    rounding = 4 * math.sqrt(size) * eps * operator.cancellation * found.lambda_max.upper

    def widened(end: Bounded) -> Bounded:
        return replace(
            end,
            lower=max(end.lower - rounding, 0.0),
            upper=end.upper + rounding,
            method=f"{end.method} + rounding of products",
            reason=f"the kernel is known only by its products{cast}",
        )

    return Spectrum(None, widened(found.lambda_min), widened(found.lambda_max), radius=None)


def _with_kernel_bounds(spectrum: Spectrum, gram: KernelGram) -> Spectrum:
    """Turn the bounds of the matrix into bounds of the exact kernel that ``gram`` approximates."""
    # For a projected kernel twice the standard error in the Frobenius norm: an estimate, not a bound.
    error = sum_up(gram.floor, 2 * gram.projection_error, UNDERFLOW if gram.trace < VANISHING else 0.0)
    projected = " + 2 standard errors of the projection" if gram.projection_error else ""
    narrow = f" + not certified, since {gram.narrow}" if gram.narrow else ""
    delta = product_up(gram.jacobian_error, root_up(max(gram.trace, 0.0)))
    if math.isnan(delta) or math.isnan(error):  # the passes overflow, so nothing is known about their rounding
        delta, error = math.inf, 0.0

    def widened(of_matrix: Bounded) -> Bounded:
        low = max(sum_down(root_down(max(sum_down(of_matrix.lower, -error), 0.0)), -delta), 0.0)
        high = sum_up(root_up(max(sum_up(of_matrix.upper, error), 0.0)), delta)
        low, high = product_down(low, low), product_up(high, high)
        return replace(
            of_matrix,
            value=min(max(of_matrix.value, low), high),
            lower=low,
            upper=high,
            certified=of_matrix.certified and gram.precision == "certified" and not projected and not gram.narrow,
            method=f"{of_matrix.method} + {gram.precision} floor + Jacobian rounding{projected}{narrow}",
        )

    lowest, highest = widened(spectrum.lambda_min), widened(spectrum.lambda_max)
    radius = spectrum.radius
    if radius is not None:
        radius = max(radius, highest.upper - highest.value, highest.value - highest.lower)
    return replace(spectrum, lambda_min=lowest, lambda_max=highest, radius=radius, trace=gram.trace)
