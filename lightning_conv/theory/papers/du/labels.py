"""What the kernel's eigenvectors say about labels: how fast gradient descent fits them, and what fitting them is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_conv.kernels.contraction import contracted_energy, error_energies
from lightning_conv.linalg.spectrum import eigen_decomposition, require_symmetric


def label_energies(kernel: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's eigenvalues, descending, and the share (v_i . y)^2 / |y|^2 of the labels along each eigenvector.

    Labels that lie on the leading eigenvectors are fitted fast; random ones lie on all alike.

    Args:
        kernel: H_inf, or a network's own, (n, n), float64.
        labels: y, (n,).

    Raises:
        ValueError: not a symmetric float64 matrix, or another number of labels, or labels that are all zero.
    """
    require_symmetric(kernel, "kernel")
    values, vectors = eigen_decomposition(kernel)
    energies = error_energies(vectors, labels)
    total = float(energies.sum())
    if total == 0:
        raise ValueError("labels: are all zero")
    return values.flip(0), energies.flip(0) / total


def predicted_residuals(kernel: Tensor, residual: Tensor, step: float, steps: Sequence[int]) -> Tensor:
    r"""|y - u(k)| that gradient descent leaves at a fixed kernel, for several k.

    .. math:: |y - u(k)| \approx \sqrt{\sum_i (1 - \eta \lambda_i)^{2k} (v_i \cdot y)^2}

    Args:
        kernel: H_inf, or G(0) over all trained parameters, (n, n), float64.
        residual: y itself, as in the theorem, for a start with u(0) near 0 (a small kappa); or u(0) - y.
        step: eta on S.
        steps: the numbers k.

    Returns:
        One number for each k. Exact at a constant kernel; the theorem's error is a small epsilon at small kappa and large
        width.

    Raises:
        ValueError: not a symmetric float64 matrix, or another number of residuals.

    Source: Arora, Du, Hu, Li, Wang 2019 (1901.08584), Theorem 4.1.

    Example:
        >>> predicted_residuals(torch.eye(1, dtype=torch.float64), torch.ones(1), 0.5, [0, 1, 2])
        tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    require_symmetric(kernel, "kernel")
    values, vectors = eigen_decomposition(kernel)
    energies = error_energies(vectors, residual)
    left = [contracted_energy(values, energies, {step: k} if k else {}) for k in steps]
    return torch.tensor(left, dtype=torch.float64).sqrt()


def generalisation_measure(kernel: Tensor, labels: Tensor) -> float:
    r"""sqrt(2 y^T H_inf^{-1} y / n): the leading term of the bound on the population loss, for losses between 0 and 1.

    Compares label vectors on the same inputs; above 1 the bound says nothing.

    Args:
        kernel: H_inf on the training set, (n, n), float64.
        labels: y, (n,).

    Raises:
        ValueError: not a symmetric float64 matrix, another number of labels, or an eigenvalue that is not positive.

    Source: Arora, Du, Hu, Li, Wang 2019 (1901.08584), Theorem 5.1.
    """
    require_symmetric(kernel, "kernel")
    values, vectors = eigen_decomposition(kernel)
    if float(values[0]) <= 0:
        raise ValueError(
            f"kernel: lambda_min = {float(values[0]):.3g}; need a positive definite kernel (no two samples parallel)"
        )
    return math.sqrt(2 * float((error_energies(vectors, labels) / values).sum()) / len(values))
