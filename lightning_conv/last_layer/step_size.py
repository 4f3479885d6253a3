"""Step sizes of phase 2: the largest one that is proven for gradient descent, and a schedule for mini-batches."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch

from lightning_conv.arguments import require_number
from lightning_conv.checked import checked, real, whole
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.last_layer.sigma import sigma_max
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.rounding import exponent_of, ldexp, ldexp_up, product_up, quotient_up
from lightning_conv.losses.facts import curvature

TINY = 2.0**-1000
"""Size from which on a product of float64 numbers has its full relative precision."""


@dataclass(frozen=True)
class HeadCurvature:
    r"""Lipschitz constant L_H of the gradient of :math:`L = \frac1n \sum_i \ell_i` with respect to the head, and allowed steps."""

    value: Bounded  # L_H = (L_ell / n) sigma_max([h, 1])^2
    sigma_max: Bounded
    smoothness: float  # L_ell

    @property
    def step(self) -> float:
        """1 / L_H with the proven upper bound of L_H, the largest step for which ``gradient_descent_bound`` is proven."""
        return 1 / (self.value.upper * OUTWARD) if self.value.upper > 0 else math.inf

    @property
    def largest_step(self) -> float:
        """2 / L_H with the same bound; below it no step of gradient descent raises L (Nesterov 2004, section 1.2.3)."""
        return 2 * self.step

    @classmethod
    def of(cls, sigma_max: Bounded, smoothness: float, samples: int) -> HeadCurvature:
        """Compute L_H from the largest singular value of [h, 1].

        Args:
            sigma_max: largest singular value of [h, 1].
            smoothness: Lipschitz constant L_ell of the gradient of every sample's loss by its outputs.
            samples: number n of samples.
        """
        low, value, high = (
            curvature(smoothness, sigma, samples) for sigma in (sigma_max.lower, sigma_max.value, sigma_max.upper)
        )
        method = f"(L_ell / n) sigma_max^2; {sigma_max.method}"
        # A square that underflows is rounded outwards; everywhere else the factor covers the rounding.
        upper = high * OUTWARD if high > TINY else math.nextafter(high * OUTWARD, math.inf)
        lower = min(low / OUTWARD, sys.float_info.max) if low > TINY else 0.0
        return cls(Bounded(value, lower, upper, sigma_max.certified, method), sigma_max, smoothness)


@checked(tolerance=real(above=0))
def head_curvature(problem: HeadProblem, *, tolerance: float = 1e-3) -> HeadCurvature:
    r"""Compute L_H = (L_ell / n) sigma_max([h, 1])^2 with proven bounds.

    The gradient of L is :math:`\frac1n [h,1]^T G(W)` with rows :math:`\nabla\ell_i(W^T [h_i, 1])`, so
    :math:`\|\nabla L(W) - \nabla L(V)\|_F \le \frac1n \sigma_{\max} L_\ell \sigma_{\max} \|W - V\|_F`.

    Args:
        problem: the problem of the head.
        tolerance: required relative width of sigma_max, see ``sigma_max``.

    Raises:
        ValueError: L_ell of the loss is not known.

    Cost: as ``sigma_max``, a dozen passes.

    Source: Kawaguchi & Sun 2021, Theorem 2 (the constant); L is the mean over samples.
    """
    smoothness = _smoothness(problem)
    return HeadCurvature.of(sigma_max(problem, tolerance=tolerance), smoothness, problem.samples)


@checked(batch_size=whole(1))
def batch_curvature(problem: HeadProblem, batch_size: int, curvature: HeadCurvature | None = None) -> float:
    r"""Bound the curvature of every mini-batch's mean loss, :math:`\sup_B \frac{L_\ell}{b} \sigma_{\max}([h_B, 1])^2`.

    The bound is the smaller of two. One is :math:`L_\ell` times the mean of the b largest :math:`|[h_i, 1]|^2` (Frobenius
    norm), which is sharp for b = 1. The other is :math:`\frac nb L_H`, because a subset of rows has no larger sigma_max; it
    is sharp for b = n. The samples have the weights that they have in L. Torch divides class weights by those of the batch,
    which is a different loss.

    Args:
        problem: the problem of the head.
        batch_size: b. Smaller batches, such as the last one, have larger curvature, so pass the smallest size.
        curvature: ``head_curvature``; None: the first bound only.

    Raises:
        ValueError: b is not in 1, ..., n, or L_ell of the loss is not known.
    """
    if not 1 <= batch_size <= problem.samples:
        raise ValueError(f"batch_size: {batch_size}; need 1 to n = {problem.samples}")
    norms = torch.topk(problem.row_norms, batch_size).values
    exponent = exponent_of(norms)  # squares of the scaled norms neither vanish nor overflow
    largest = ldexp_up(float(ldexp(norms, -exponent).square().mean()) * OUTWARD, 2 * exponent)
    bound = product_up(_smoothness(problem), largest)
    if curvature is None:
        return bound
    return min(bound, product_up(curvature.value.upper, quotient_up(problem.samples, batch_size)))


@checked()
def gradient_bound(problem: HeadProblem) -> float:
    r"""Compute G with :math:`|\nabla L_B(W)|_F \le G` for every mini-batch B and every W, for (binary) cross-entropies.

    The gradient :math:`|\nabla_u \ell_i|` is at most :math:`\sqrt2` times the sample's weight for cross-entropy (p - q of two
    distributions), and at most 1 / sqrt(C) for the mean of C binary ones. So :math:`G = \max_i |\nabla\ell_i||[h_i, 1]|`.
    With :math:`E|g|^2 \le G^2` it is an argument of ``sgd_bound``.

    Raises:
        ValueError: the gradient of the loss is not bounded (squared losses), or no bound is known.
    """
    losses, every = problem.losses, slice(0, problem.samples)
    if losses.kind == "cross-entropy":
        steepest = 2**0.5 * losses.weights(every)
    elif losses.kind == "binary":
        steepest = torch.full_like(problem.row_norms, math.sqrt(1 / losses.outputs if losses.mean else losses.outputs))
    else:
        raise ValueError(
            "loss_fn: no bound of its gradient is known; pass G of the run to sgd_bound, or use sgd_interpolation_bound"
        )
    return float((steepest * problem.row_norms).max()) * OUTWARD


def _smoothness(problem: HeadProblem) -> float:
    if problem.smoothness is None:
        raise ValueError(
            "smoothness: no Lipschitz constant of the loss's gradient is known (L1Loss has none), so no step size is proven; "
            "pass smoothness=L_ell"
        )
    return problem.smoothness


@dataclass(frozen=True)
class PowerSchedule:
    r"""Mini-batch steps :math:`\eta_k = \eta_0 / (1 + k / k_0)^p`, k = 0, 1, ..., of infinite sum and finite sum of squares.

    For :math:`1/2 < p \le 1` they satisfy the conditions of Robbins & Monro 1951.

    Args:
        first: eta_0; at most 1 / ``batch_curvature``, so that no step overshoots on its own batch.
        decay: k_0, the number of steps after which the decay sets in.
        power: exponent p of the decay.

    Raises:
        ValueError: the step or the decay is not positive, or the power is outside (1/2, 1].

    Example:
        >>> schedule = PowerSchedule(0.1, decay=100, power=0.75)
        >>> schedule(0), round(schedule(100), 4)
        (0.1, 0.0595)
    """

    first: float
    decay: float = 1000.0
    power: float = 0.75

    def __post_init__(self) -> None:
        require_number("first", self.first, above=0)
        require_number("decay", self.decay, above=0)
        require_number("power", self.power)
        if not 0.5 < self.power <= 1:
            raise ValueError(f"power: {self.power}; need one in (1/2, 1]: sum eta_k = inf and sum eta_k^2 < inf")

    def __call__(self, k: int) -> float:
        """Return the step eta_k."""
        return float(self.first / (1 + k / self.decay) ** self.power)

    def steps(self, count: int) -> torch.Tensor:
        """Return eta_0, ..., eta_{count - 1} in float64."""
        return self.first / (1 + torch.arange(count, dtype=torch.float64) / self.decay) ** self.power
