"""All eigenvalues of a dense matrix and an a-posteriori bound on their errors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.symmetric import Symmetric
from lightning_conv.linalg.rounding import gamma

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it as exported


def eigen_decomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` in float64, on the CPU where the device cannot or fails.

    LAPACK's divide and conquer fails on some low-rank matrices; a relative shift of the diagonal does not, and is taken
    back.

    Raises:
        torch.linalg.LinAlgError: nothing converged.
    """
    return decompose(matrix)[:2]


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, str]:
    """``eigen_decomposition`` and, if the first try failed, the reason.

    Raises:
        torch.linalg.LinAlgError: nothing converged.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except LinAlgError as error:
        shift = float(matrix.diagonal().abs().max())
        shifted = matrix.cpu() + shift * torch.eye(len(matrix), dtype=matrix.dtype)
        values, vectors = torch.linalg.eigh(shifted)
        return values - shift, vectors, f"on the CPU with a shifted diagonal, because: {error}"
    return values, vectors, ""


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


def dense_end(a: Symmetric, index: int, reason: str) -> Bounded:
    """Eigenvalue 0 or -1 by a full decomposition: what remains when a faster way fails, for the ``reason`` given.

    Raises:
        torch.linalg.LinAlgError: nothing converged.

    Cost: about 12 N^3 flops.
    """
    values, vectors, further = decompose(a.matrix)
    absolute, relative = residual_radius(a.matrix.to(vectors.device), values, vectors)
    value = float(values[index])
    error = absolute + relative * abs(value)
    return Bounded(
        value, value - error, value + error, True, "residual bound", "; ".join(filter(None, (reason, further)))
    )
