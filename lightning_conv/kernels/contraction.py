r"""Gradient descent in the eigenbasis of the kernel: step sizes, their limit, and the predicted decay of the error.

Notation: r = u - y on N = n C numbers (n samples, C outputs), S = 1/2 |r|^2, G = J J^T the full kernel (N, N). One step
of size eta_S on S changes the error of a linearised model by r <- (I - eta_S G) r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_conv.arguments import require_option
from lightning_conv.checked import checked, real
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.rounding import exponent_of, ldexp, product_up, quotient_down, sum_up
from lightning_conv.linalg.spectrum import Spectrum

SquaredLoss: TypeAlias = Literal["mean", "sum", "half_sum"]

ENTRIES_AT_ONCE = 2**20
"""Largest number of (step size, eigenvalue) pairs that are in memory together."""


def step_in_sum_of_squares(step: float, *, loss: SquaredLoss, numbers: int) -> float:
    """Convert a step size on the run's loss to the one on S = 1/2 sum |u - y|^2 that moves the weights equally.

    A loss k S has k times the gradient, so eta_S = k eta. k is 2/N for ``torch.nn.MSELoss()`` over N numbers, 2 for
    ``MSELoss(reduction="sum")``, and 1 for S itself. The conversion is exact for gradient descent without momentum,
    weight decay or clipping.

    Args:
        step: the learning rate eta.
        loss: ``"mean"``: (1/N) sum (u - y)^2. ``"sum"``: sum (u - y)^2. ``"half_sum"``: S.
        numbers: N, the number of samples times outputs.

    Raises:
        ValueError: ``loss`` is none of the three, or ``numbers`` is below 1.

    Example:
        >>> step_in_sum_of_squares(0.5, loss="mean", numbers=10)
        0.1
    """
    require_option("loss", loss, get_args(SquaredLoss))
    if numbers < 1:
        raise ValueError(f"numbers: {numbers}; need samples times outputs, 1 or more")
    return step * {"mean": 2 / numbers, "sum": 2.0, "half_sum": 1.0}[loss]


@checked(step=real(least=0), lambda_max=real(least=0))
def step_size_ratio(step: float, lambda_max: float) -> float:
    """Return eta_S lambda_max(G) / 2, below 1 if and only if gradient descent on the linearised model is stable.

    Each step multiplies the component of the error along eigenvector v_i by 1 - eta_S lambda_i, so it shrinks if and
    only if 0 < eta_S < 2 / lambda_i. Beyond the linearised model this is the empirical edge of stability, not a
    theorem.

    Args:
        step: eta_S, the step size on S = 1/2 sum |u - y|^2 (see ``step_in_sum_of_squares``).
        lambda_max: largest eigenvalue of the full kernel.
    """
    return step * lambda_max / 2


def full_lambda_max(gram: KernelGram, spectrum: Spectrum) -> tuple[float, float]:
    r"""Return an interval that contains lambda_max of the full kernel G (n C x n C), from any kind of kernel.

    - One output, or ``"full"``: the bounds of the spectrum itself.
    - ``"trace"``, T = sum_c G_cc: lambda_max(T) / C <= lambda_max(G) <= min(C lambda_max(T), trace T). On the left,
      lambda_max(T) <= sum_c lambda_max(G_cc) and each is at most lambda_max(G); on the right, G <= C diag(G_11, ...,
      G_CC) for a positive semidefinite G, and each G_cc <= T. Both ends are attained (by C equal blocks; by a J that is
      one vector with e_c in block c).
    - ``"sum"``, (1^T x I) G (1 x I): lambda_max / C from below, and no bound from above.
    - ``"projected"``, an estimate of the trace kernel, and ``"cotangents"``, of unknown norm: no bounds, (0, inf).

    Args:
        gram: the kernel on one set of samples.
        spectrum: its ``kernel_spectrum``.

    Returns:
        (lower, upper), with allowance for the rounding errors that ``spectrum`` allows for.
    """
    classes, largest = gram.n_outputs, spectrum.lambda_max
    if is_full(gram):
        return largest.lower, largest.upper
    if gram.outputs == "trace":
        # |J|_F^2 of the exact Jacobian: the products err by at most the floor, and J by the relative jacobian_error.
        grown = sum_up(1.0, gram.jacobian_error)
        whole = product_up(sum_up(gram.trace, gram.floor), grown, grown)
        return quotient_down(largest.lower, classes), min(product_up(classes, largest.upper), whole)
    return (quotient_down(largest.lower, classes), math.inf) if gram.outputs == "sum" else (0.0, math.inf)


def is_full(gram: KernelGram) -> bool:
    """Return whether the matrix is the full kernel G with row i C + c, as all kinds of ``outputs`` are for one output.

    The kernel of ``cotangents`` never is: each row is multiplied by a factor of its own.
    """
    return gram.outputs == "full" or (gram.n_outputs == 1 and gram.outputs != "cotangents")


def error_energies(eigenvectors: Tensor, residual: Tensor) -> Tensor:
    """Return <v_i, r>^2 for each eigenvector, shape (N,); these energies add up to |r|^2.

    Args:
        eigenvectors: (N, N), with orthonormal columns v_i.
        residual: r = u - y, N numbers in the order of the kernel (row i C + c).

    Raises:
        ValueError: the sizes differ.
    """
    if residual.numel() != eigenvectors.shape[0]:
        raise ValueError(
            f"residual: {residual.numel()} numbers for a kernel of {eigenvectors.shape[0]} rows; need one per sample and output"
        )
    residual = residual.detach().flatten().to(eigenvectors.device, eigenvectors.dtype)
    return (eigenvectors.T @ residual).square()


def contracted_energies(eigenvalues: Tensor, energies: Tensor, steps: Mapping[float, int]) -> Tensor:
    r"""Predict the energies that gradient descent with a fixed kernel leaves along each eigenvector.

    .. math:: \langle v_i, r_k \rangle^2 = \langle v_i, r_0 \rangle^2 \prod_j (1 - \eta_j \lambda_i)^2

    Args:
        eigenvalues: lambda_i of G, (N,).
        energies: <v_i, r_0>^2, (N,).
        steps: number of steps that were taken with each step size eta_j on S; their order does not matter.

    Returns:
        (N,), float64: the remaining energies, which may be passed in again for further steps.

    Cost: O(N) per distinct step size. Products are computed as sums of logarithms, so that they neither under- nor
    overflow.
    """
    values = eigenvalues.detach().double()
    logs = torch.zeros_like(values)
    sizes = torch.tensor(list(steps.keys()), dtype=torch.float64, device=values.device)
    counts = torch.tensor(list(steps.values()), dtype=torch.float64, device=values.device)
    width = max(1, ENTRIES_AT_ONCE // max(1, len(values)))
    for start in range(0, len(sizes), width):
        size, count = sizes[start : start + width], counts[start : start + width]
        shrink = size[:, None] * values
        # log1p keeps the slow directions, where 1 - eta lambda rounds to 1.
        exponent = torch.where(shrink < 0.5, torch.log1p(-shrink.clamp(max=0.5)), (1 - shrink).abs().log())
        logs += (count[:, None] * exponent).sum(0)
    # Where the energy is zero it stays zero, while 0 * inf would be NaN.
    factors = torch.where(energies > 0, 2 * logs, 0.0).exp()
    return energies.double() * factors


def contracted_energy(eigenvalues: Tensor, energies: Tensor, steps: Mapping[float, int]) -> float:
    """Predict the squared error |r_k|^2 after gradient descent with a fixed kernel; see ``contracted_energies``."""
    return float(contracted_energies(eigenvalues, energies, steps).sum())


@checked()
def predicted_contraction(
    eigenvalues: Tensor, eigenvectors: Tensor, residual: Tensor, steps: Mapping[float, int]
) -> float:
    r"""Predict the factor |r_k|^2 / |r_0|^2 by which gradient descent with a fixed kernel shrinks the squared error.

    .. math:: \frac{|r_k|^2}{|r_0|^2} = \sum_i \frac{\langle v_i, r_0 \rangle^2}{|r_0|^2} \prod_j (1 - \eta_j \lambda_i)^2

    The prediction is exact for a linear model, or a constant kernel, under full-batch gradient descent on the samples
    of G. For a real network it is valid as long as its kernel changes little. For mini-batches, or if the samples are a
    part of the training set, it is an estimate.

    Args:
        eigenvalues: lambda_i of the full kernel G, (N,).
        eigenvectors: orthonormal eigenvectors v_i of G as columns, (N, N).
        residual: r_0 = u - y, N numbers in the order of the kernel (row i C + c).
        steps: number of steps with each step size eta_j on S = 1/2 |r|^2 (see ``step_in_sum_of_squares``).

    Raises:
        ValueError: the sizes differ, or the residual is zero, NaN or infinite.

    Cost: one product of (N, N) with (N,), and O(N) per distinct step size. Source: Arora et al. 2019 (1901.08584),
    Theorem 4.1, where the label vector stands for r_0 at a small initialisation; Du et al. 2019 (1811.03804), section
    4.

    Example:
        >>> import torch
        >>> kernel = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
        >>> values, vectors = torch.linalg.eigh(kernel)
        >>> predicted_contraction(values, vectors, torch.tensor([1.0, 1.0]), {0.25: 1})  # ((3/4)^2 + 0) / 2
        0.28125
    """
    if not bool(torch.isfinite(residual).all()):
        raise ValueError("residual: contains NaN or infinity; check the outputs and the targets")
    if not bool(residual.any()):
        raise ValueError("residual: is zero, so there is no error to contract")
    # The factor has no scale; squares of a residual of about 1 neither vanish nor overflow.
    residual = residual.detach().double()
    energies = error_energies(eigenvectors, ldexp(residual, -exponent_of(residual)))
    before = float(energies.sum())
    return contracted_energy(eigenvalues, energies, steps) / before
