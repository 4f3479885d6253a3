r"""Averaged SGD in the NTK regime (Nitanda & Suzuki, ICLR 2021): what its rate is made of.

A two-layer network with symmetric initialisation, one pass over the samples, the loss 1/2 (g(x) - y)^2 + (lambda/2) |theta - theta_0|^2,
a constant step eta with 4 (6 + lambda) eta <= 1 and the plain average of the parameters over t = 0..T. With the eigenvalues of the kernel
operator decaying as i^-beta, beta > 1, and a target of smoothness r in [1/2, 1] (Theorem 1, Corollary 1):

.. math:: E |g_{avg} - g_\rho|^2 = O(T^{-2 r \beta / (2 r \beta + 1)}) \quad \text{for } \lambda = T^{-\beta / (2 r \beta + 1)},

the minimax rate. The width that the proof needs is exponential in T, so none of this says that a theorem is satisfied; what can be
measured is beta, the degrees of freedom Tr(Sigma (Sigma + lambda)^-1) of the variance term, and what averaging does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.theory.networks import SymmetricTwoLayer
from lightning_conv.theory.tools.power_law import power_law

SOURCE = "Nitanda & Suzuki 2021"

__all__ = [
    "AveragedIterate",
    "Decay",
    "SymmetricTwoLayer",
    "degrees_of_freedom",
    "largest_step",
    "progressive_bound",
    "spectrum_decay",
]


@dataclass(frozen=True)
class Decay:
    """lambda_i ~ c i^-beta, fitted to the eigenvalues of rank first to last."""

    beta: float
    standard_error: (
        float  # of beta, as if the logarithms scattered independently about the line; they do not, so it is too small
    )
    constant: float  # c
    first: int  # rank, from 1
    last: int
    r_squared: float  # of the fit in logarithms

    def rate(self, smoothness: float = 0.5) -> float:
        """The exponent 2 r beta / (2 r beta + 1) of Corollary 1, r = ``smoothness``; NaN for beta <= 1, which it does not cover."""
        product = 2 * smoothness * self.beta
        return product / (product + 1) if self.beta > 1 else math.nan

    def penalty(self, steps: int, smoothness: float = 0.5) -> float:
        """lambda = T^(-beta / (2 r beta + 1)) of Corollary 1, up to its constant."""
        return float(steps ** (-self.beta / (2 * smoothness * self.beta + 1)))


def spectrum_decay(eigenvalues: Tensor, *, first: int = 1, last: int | None = None, floor: float = 0.0) -> Decay:
    """Least-squares line through log lambda_i against log i.

    Args:
        eigenvalues: of the Gram matrix over n, in any order.
        first: rank of the largest eigenvalue that counts, from 1; the first ones rarely follow the law.
        last: rank of the smallest; None: the last one above ``floor``. Of a Gram matrix on n samples the last tenths of the spectrum
            fall faster than the operator's.
        floor: eigenvalues at or below it are rounding.

    Raises:
        ValueError: fewer than three eigenvalues are left.
    """
    ordered = eigenvalues.detach().cpu().double().sort(descending=True).values
    clear = int((ordered > max(floor, 0.0)).sum())
    last = clear if last is None else min(last, clear)
    if first < 1 or last - first < 2:
        raise ValueError(
            f"first, last: {first}, {last}; need three or more of the {clear} eigenvalues above {floor:.3g}"
        )
    rank = torch.arange(first, last + 1, dtype=torch.float64)
    kept = ordered[first - 1 : last]
    law = power_law(rank.tolist(), kept.tolist())
    y = kept.log()
    left = y - math.log(law.factor) - law.exponent * rank.log()
    total = float((y - y.mean()).square().sum())
    share = 1 - float(left @ left) / total if total > 0 else 1.0
    return Decay(-law.exponent, law.error, law.factor, first, last, share)


def degrees_of_freedom(eigenvalues: Tensor, penalty: float) -> float:
    """Tr(K (K + n lambda)^-1) = sum_i mu_i / (mu_i + lambda), mu_i the eigenvalues of K / n.

    Between 0 and n, falling in lambda, at most Tr(K / n) / lambda; under lambda_i ~ i^-beta of the order lambda^(-1/beta).

    Args:
        eigenvalues: mu_i, of the Gram matrix over n; negative ones (rounding) count as zero.
        penalty: lambda, above 0.

    Raises:
        ValueError: lambda is not positive.
    """
    if not penalty > 0:
        raise ValueError(f"penalty: {penalty}; need a positive lambda")
    values = eigenvalues.detach().double().clamp(min=0)
    return float((values / (values + penalty)).sum())


def largest_step(penalty: float) -> float:
    """eta = 1 / (4 (6 + lambda)), the largest constant step of Theorem 1 (|x| <= 1, kernel at most 12 on the diagonal)."""
    return 1 / (4 * (6 + penalty))


def progressive_bound(kernel: Tensor, targets: Tensor, step: float, penalty: float, at: Sequence[int]) -> list[float]:
    r"""What the losses of SGD on a linear model, each taken on the next sample before it is learned, add up to at most.

    With l_s(w) = 1/2 (<w, phi_s> - y_s)^2 + (lambda/2) |w|^2, w_1 = 0, w_{s+1} = w_s - eta grad l_s(w_s), and
    L = max |phi_s|^2 + lambda, for every order of the samples:

    .. math:: (1 - \eta L) \sum_{s \le t} l_s(w_s) \le \min_w \sum_{s \le t} l_s(w) + \frac{|w|^2}{2 \eta}
              = \frac{\mu}{2} \, y^T (K + \mu I)^{-1} y, \qquad \mu = \lambda t + 1 / \eta,

    since |w_{s+1} - w|^2 = |w_s - w|^2 - 2 eta <grad l_s, w_s - w> + eta^2 |grad l_s|^2, l_s is convex, and
    |grad l_s(w_s)|^2 <= 2 L l_s(w_s). [derived] Where the next sample is one more draw, the mean over t of the left side is
    in expectation the mean risk of the iterates, which by convexity is at least the risk of their average.

    Args:
        kernel: K_st = <phi_s, phi_t> in the order of the pass, (n, n).
        targets: y, (n,).
        step: eta, with eta L < 1.
        penalty: lambda.
        at: numbers t of samples.

    Returns:
        The bound of the sum up to each t.

    Raises:
        ValueError: eta L is 1 or more.

    Cost: one Cholesky factorisation of t rows each.
    """
    share = step * (float(kernel.diagonal().max()) + penalty)
    if share >= 1:
        raise ValueError(f"step: eta (max K_ii + lambda) = {share:.3g}; the bound needs it below 1")
    found = []
    for t in at:
        mu = penalty * t + 1 / step
        factor = torch.linalg.cholesky(kernel[:t, :t] + mu * torch.eye(t, dtype=kernel.dtype))
        solved = torch.linalg.solve_triangular(factor, targets[:t, None], upper=False)
        found.append(mu / 2 * float(solved.square().sum()) / (1 - share))
    return found


class AveragedIterate:
    """The plain average of parameters over the iterates that are added, in float64.

    Args:
        parameters: by name; fixes names and shapes.
    """

    def __init__(self, parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        named = dict(parameters)
        self._mean = {
            name: torch.zeros_like(value, dtype=torch.float64, requires_grad=False) for name, value in named.items()
        }
        self.count = 0

    @torch.no_grad()
    def add(self, parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Count one more iterate: mean += (theta - mean) / (t + 1)."""
        self.count += 1
        for name, value in dict(parameters).items():
            self._mean[name] += (value.detach().double() - self._mean[name]) / self.count

    @property
    def mean(self) -> dict[str, Tensor]:
        """The average, float64."""
        return dict(self._mean)
