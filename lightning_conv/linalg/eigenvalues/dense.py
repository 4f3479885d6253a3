"""All eigenvalues of a dense symmetric matrix, and an a-posteriori bound on their errors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.symmetric import Symmetric
from lightning_conv.linalg.rounding import gamma

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it as exported


def eigen_decomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors by ``torch.linalg.eigh``, or on the CPU if that fails.

    The divide-and-conquer algorithm of LAPACK fails on some low-rank matrices. It does not fail after a shift of the
    diagonal, which is then subtracted from the eigenvalues.

    Raises:
        torch.linalg.LinAlgError: neither attempt converged.
    """
    return decompose(matrix)[:2]


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, str]:
    """Return ``eigen_decomposition`` and the reason why the first attempt failed, or an empty string.

    Raises:
        torch.linalg.LinAlgError: neither attempt converged.
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
    r"""Bound the distance of computed eigenvalues from those of ``matrix``, a posteriori and proven.

    With E = A - V diag(l) V^T and F = V^T V - I, the theorems of Weyl and Ostrowski give for each i, with eigenvalues
    in order,

    .. math:: |\lambda_i(A) - l_i| \le \|E\|_F + |l_i| \, \|F\|_F .

    The rounding errors of computing E and F are bounded by gamma_{N+2} sum |l_k||v_k|^2 and gamma_N sum |v_k|^2, and
    added.

    Args:
        matrix: A, (N, N).
        values: l, (N,), as computed.
        vectors: V, (N, N), with eigenvectors as columns, as computed.

    Returns:
        (a, b) such that a + b |l_i| bounds the error of l_i.

    Cost: two products of N^3 multiplications. Source: Horn & Johnson, Matrix Analysis, 2nd ed., Theorems 4.3.1 (Weyl)
    and 4.5.9 (Ostrowski).
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
    """Compute eigenvalue 0 or -1 by a full decomposition, after a faster method has failed for the given ``reason``.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge.

    Cost: about 12 N^3 flops.
    """
    values, vectors, further = decompose(a.matrix)
    absolute, relative = residual_radius(a.matrix.to(vectors.device), values, vectors)
    value = float(values[index])
    reason = "; ".join(filter(None, (reason, further)))
    return Bounded.around(value, absolute, relative, certified=True, method="residual bound", reason=reason)
