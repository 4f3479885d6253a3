"""Labels on the kernel's eigenvectors: how fast gradient descent fits them, and a bound on the loss on new samples.

H_inf is the limit kernel of the two-layer network of Du, Zhai, Poczos, Singh 2019 (1810.02054).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_conv.kernels.contraction import contracted_energy, error_energies
from lightning_conv.linalg.spectrum import eigen_decomposition, require_symmetric


def label_energies(kernel: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the eigenvalues, descending, and the share (v_i . y)^2 / |y|^2 of the labels along each eigenvector.

    Labels along the leading eigenvectors are fitted fast. Random labels have about the same share along every
    eigenvector.

    Args:
        kernel: H_inf, or the kernel of a network, (n, n), float64.
        labels: y, (n,).

    Returns:
        Eigenvalues and shares, each (n,), in the same order; the shares add up to 1.

    Raises:
        ValueError: The kernel is not a symmetric float64 matrix, the number of labels is not n, or all labels are zero.
    """
    require_symmetric(kernel, "kernel")
    values, vectors = eigen_decomposition(kernel)
    energies = error_energies(vectors, labels)
    total = float(energies.sum())
    if total == 0:
        raise ValueError("labels: all are zero; pass at least one label other than zero")
    return values.flip(0), energies.flip(0) / total


def predicted_residuals(kernel: Tensor, residual: Tensor, step: float, steps: Sequence[int]) -> Tensor:
    r"""Predict |y - u(k)|, the residual after k steps of gradient descent with a fixed kernel, for several k.

    .. math:: |y - u(k)| \approx \sqrt{\sum_i (1 - \eta \lambda_i)^{2k} (v_i \cdot y)^2}

    Args:
        kernel: H_inf, or G(0) over all trained parameters, (n, n), float64.
        residual: u(0) - y; or y itself, as in the theorem, where u(0) is near 0 (a small kappa).
        step: Step size eta on S = 1/2 sum (u - y)^2.
        steps: The numbers k of steps.

    Returns:
        One number for each k. It is exact for a constant kernel. The theorem's error is small for a small kappa and a
        large width.

    Raises:
        ValueError: The kernel is not a symmetric float64 matrix, or the number of residuals is not n.

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
    r"""Compute sqrt(2 y^T H_inf^{-1} y / n), the leading term of a bound on the population loss.

    The bound is for losses between 0 and 1. It serves to compare label vectors on the same inputs. Above 1 the bound is
    trivial.

    Args:
        kernel: H_inf on the training set, (n, n), float64.
        labels: y, (n,).

    Raises:
        ValueError: The kernel is not a symmetric float64 matrix or not positive definite, or the number of labels is
            not n.

    Source: Arora, Du, Hu, Li, Wang 2019 (1901.08584), Theorem 5.1.
    """
    require_symmetric(kernel, "kernel")
    values, vectors = eigen_decomposition(kernel)
    if float(values[0]) <= 0:
        raise ValueError(
            f"kernel: lambda_min = {float(values[0]):.3g}; need a positive definite kernel (no two samples parallel)"
        )
    return math.sqrt(2 * float((error_energies(vectors, labels) / values).sum()) / len(values))
