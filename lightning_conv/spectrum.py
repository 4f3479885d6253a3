"""Eigenvalues of symmetric matrices with proven error bounds: ``Bounded``, ``Spectrum``, ``kernel_spectrum``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.precision import gamma

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it as exported


@dataclass(frozen=True)
class Bounded:
    """A number with an interval that holds the true one. ``certified``: the interval has a proof; otherwise it rests on an estimate."""

    value: float
    lower: float
    upper: float
    certified: bool
    method: str

    @property
    def resolved(self) -> bool:
        """Whether the value stands well above its error: the interval is at most a tenth of the value to either side."""
        return self.value > 0 and max(self.value - self.lower, self.upper - self.value) <= 0.1 * self.value


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues of a Gram matrix, ascending, with the bounds of the outermost two."""

    eigenvalues: Tensor  # float64, (N,), ascending, as computed
    lambda_min: Bounded
    lambda_max: Bounded
    radius: float
    """Every eigenvalue of the exact kernel is within this distance of the computed one (same status as the bounds)."""

    @property
    def condition_number(self) -> float:
        """lambda_max / lambda_min of the values; infinite where lambda_min is not above zero."""
        return self.lambda_max.value / self.lambda_min.value if self.lambda_min.value > 0 else math.inf

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the eigenvalues as a distribution (Roy & Vetterli 2007): N if all are equal, 1 if one has all."""
        share = self.eigenvalues.clamp(min=0)
        share = share / share.sum()
        return float(torch.exp(-torch.special.xlogy(share, share).sum()))

    @property
    def stable_rank(self) -> float:
        """trace / lambda_max."""
        return float(self.eigenvalues.sum()) / self.lambda_max.value


def eigen_decomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` in float64, on the CPU where the device cannot or fails.

    LAPACK's divide and conquer fails on some low-rank matrices; a relative shift of the diagonal does not, and is taken
    back.

    Raises:
        torch.linalg.LinAlgError: nothing converged.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except LinAlgError:
        shift = float(matrix.diagonal().abs().max())
        shifted = matrix.cpu() + shift * torch.eye(len(matrix), dtype=matrix.dtype)
        values, vectors = torch.linalg.eigh(shifted)
        values = values - shift
    return values, vectors


def residual_radius(matrix: Tensor, values: Tensor, vectors: Tensor) -> tuple[float, float]:
    r"""Proven distance of computed eigenvalues from those of ``matrix``, a posteriori.

    With E = A - V diag(l) V^T and F = V^T V - I, Weyl's and Ostrowski's theorems give for every i, eigenvalues in
    order,

    .. math:: |\lambda_i(A) - l_i| \le \|E\|_F + |l_i| \, \|F\|_F .

    The rounding errors of computing E and F themselves are bounded by gamma_{N+2} sum |l_k||v_k|^2 and gamma_N sum
    |v_k|^2 and added.

    Returns:
        (a, b) such that a + b |l_i| bounds the error of l_i. Cost: two N^3 products.
    """
    size = len(values)
    residual = float((matrix - (vectors * values) @ vectors.T).norm())
    skewness = vectors.T @ vectors
    skewness.diagonal().sub_(1)
    defect = float(skewness.norm())
    norms = vectors.square().sum(0)
    slack = gamma(size + 3, torch.float64)
    sums = 1 + gamma(matrix.numel() + 3, torch.float64)  # the rounding of the norms and sums themselves
    absolute = (residual + slack * float((values.abs() * norms).sum() + matrix.norm())) * sums
    relative = (defect + slack * float(norms.sum() + 1)) * sums
    return absolute, relative


def kernel_spectrum(gram: KernelGram | Tensor) -> Spectrum:
    """Eigenvalues of a Gram matrix in float64 with bounds on the smallest and the largest.

    For a bare symmetric matrix the bounds are proven for that matrix (``residual_radius``). For a ``KernelGram`` they
    are for the kernel: the floor of its products is added (Weyl), zero is a lower bound because J J^T is positive
    semidefinite, and the rounding delta = jacobian_error * |J|_F inside the network's passes moves singular values by
    at most delta, sqrt(lambda) -+ delta. As delta is an estimate, such bounds are ``certified`` only at
    ``precision="certified"``, where the statement is about the Jacobian as computed in float64.

    lambda_min on m probe samples is an UPPER bound of lambda_min over a larger set that holds them (interlacing).

    Args:
        gram: a ``KernelGram``, or a symmetric float64 matrix (N, N).

    Raises:
        ValueError: not square, not symmetric, empty, not float64, or not finite.
        torch.linalg.LinAlgError: the eigensolver failed on the device and on the CPU.

    Cost: about 12 N^3 flops. At N = 2,000 about half a second on two cores.

    Example:
        >>> import torch
        >>> spectrum = kernel_spectrum(torch.diag(torch.tensor([1e-12, 1.0], dtype=torch.float64)))
        >>> spectrum.lambda_min.lower <= 1e-12 <= spectrum.lambda_min.upper
        True
    """
    matrix = gram.matrix if isinstance(gram, KernelGram) else gram
    require_symmetric(matrix)
    values, vectors = eigen_decomposition(matrix)
    absolute, relative = residual_radius(matrix.to(vectors.device), values, vectors)
    radius = absolute + relative * float(values.abs().max())

    def bounded(value: float) -> Bounded:
        error = absolute + relative * abs(value)
        if not isinstance(gram, KernelGram):
            return Bounded(value, value - error, value + error, certified=True, method="residual bound")
        error += gram.floor
        delta = gram.jacobian_error * math.sqrt(max(gram.trace, 0.0))
        low = max(math.sqrt(max(value - error, 0.0)) - delta, 0.0) ** 2
        high = (math.sqrt(max(value + error, 0.0)) + delta) ** 2
        certified = gram.precision == "certified"
        method = f"residual bound + {gram.precision} floor + Jacobian rounding"
        return Bounded(min(max(value, low), high), low, high, certified, method)

    lowest, highest = bounded(float(values[0])), bounded(float(values[-1]))
    radius = max(radius, highest.upper - highest.value, highest.value - highest.lower)
    return Spectrum(values, lowest, highest, radius)


def require_symmetric(matrix: Tensor, name: str = "gram") -> None:
    """Refuse what is no Gram matrix, by the ``name`` of the argument that brought it.

    Raises:
        ValueError: not square, not symmetric, empty, not float64, or not finite.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(matrix.shape)}; need a non-empty square matrix")
    if matrix.dtype != torch.float64:
        raise ValueError(
            f"{name}: {matrix.dtype}; need float64. Converting a float32 Gram matrix afterwards does not bring back its small "
            "eigenvalues: compute it by ntk_gram, which sums in float64"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name}: holds NaN or infinity; the network or its samples do")
    skew = float((matrix - matrix.T).abs().max())
    if skew > 1e-12 * float(matrix.abs().max()):
        raise ValueError(
            f"{name}: not symmetric (largest |G - G^T| is {skew:.1e}); pass (G + G.T) / 2 if that is meant"
        )
