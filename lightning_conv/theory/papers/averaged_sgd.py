r"""Averaged SGD in the NTK regime (Nitanda & Suzuki, ICLR 2021): the quantities that determine its rate.

The setting is a two-layer network g with symmetric initialisation, one pass over the samples, the loss
1/2 (g(x) - y)^2 + (lambda/2) |theta - theta_0|^2, a constant step eta with 4 (6 + lambda) eta <= 1, and the plain
average of the parameters over t = 0..T. If the eigenvalues of the kernel operator decay as i^-beta with beta > 1 and
the target has smoothness r in [1/2, 1], then (Theorem 1, Corollary 1)

.. math:: E |g_{avg} - g_\rho|^2 = O(T^{-2 r \beta / (2 r \beta + 1)}) \quad \text{for } \lambda = T^{-\beta / (2 r \beta + 1)},

which is the minimax rate. The proof needs a width exponential in T, so nothing here says that the theorem is satisfied.
What can be measured is beta, the degrees of freedom Tr(Sigma (Sigma + lambda)^-1) of the variance term (Sigma is the
covariance operator), and the effect of averaging.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.theory.networks import SymmetricTwoLayer as SymmetricTwoLayer
from lightning_conv.theory.tools.power_law import power_law

SOURCE = "Nitanda & Suzuki 2021"


@dataclass(frozen=True)
class Decay:
    """lambda_i ~ c i^-beta, fitted to the eigenvalues of ranks ``first`` to ``last``."""

    beta: float
    standard_error: float
    """Of beta, for logarithms that scatter independently about the line; they do not, so it is too small."""
    constant: float  # c
    first: int  # rank, from 1
    last: int
    r_squared: float  # of the fit in logarithms

    def rate(self, smoothness: float = 0.5) -> float:
        """Return 2 r beta / (2 r beta + 1), the exponent of Corollary 1, r = ``smoothness``; NaN for beta <= 1."""
        product = 2 * smoothness * self.beta
        return product / (product + 1) if self.beta > 1 else math.nan

    def penalty(self, steps: int, smoothness: float = 0.5) -> float:
        """Return T^(-beta / (2 r beta + 1)), T = ``steps``, r = ``smoothness``: lambda of Corollary 1 up to a constant."""
        return float(steps ** (-self.beta / (2 * smoothness * self.beta + 1)))


def spectrum_decay(eigenvalues: Tensor, *, first: int = 1, last: int | None = None, floor: float = 0.0) -> Decay:
    """Fit a least-squares line to log lambda_i against log i.

    Args:
        eigenvalues: Eigenvalues of the Gram matrix over n, in any order.
        first: Rank of the largest eigenvalue of the fit, from 1; the first few rarely follow the law.
        last: Rank of the smallest eigenvalue of the fit; None: the last one above ``floor``. The last tenths of the
            spectrum of a Gram matrix fall faster than the spectrum of the operator.
        floor: Eigenvalues at or below it are rounding error.

    Raises:
        ValueError: Fewer than three eigenvalues are left.
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
    """Compute Tr(K (K + n lambda)^-1) = sum_i mu_i / (mu_i + lambda), with mu_i the eigenvalues of K / n.

    The number lies between 0 and n, decreases with lambda and is at most Tr(K / n) / lambda. For mu_i ~ i^-beta it is
    of the order of lambda^(-1/beta).

    Args:
        eigenvalues: Eigenvalues mu_i of the Gram matrix over n; negative ones (rounding) count as zero.
        penalty: lambda, positive.

    Raises:
        ValueError: lambda is not positive.
    """
    if not penalty > 0:
        raise ValueError(f"penalty: {penalty}; need a positive lambda")
    values = eigenvalues.detach().double().clamp(min=0)
    return float((values / (values + penalty)).sum())


def largest_step(penalty: float) -> float:
    """Return eta = 1 / (4 (6 + lambda)), the largest constant step of Theorem 1 (|x| <= 1, K(x, x) <= 12)."""
    return 1 / (4 * (6 + penalty))


def progressive_bound(kernel: Tensor, targets: Tensor, step: float, penalty: float, at: Sequence[int]) -> list[float]:
    r"""Bound the sum of the losses of SGD on a linear model, each measured on the next sample before it is used.

    With l_s(w) = 1/2 (<w, phi_s> - y_s)^2 + (lambda/2) |w|^2, w_1 = 0, w_{s+1} = w_s - eta grad l_s(w_s), and
    L = max |phi_s|^2 + lambda, for every order of the samples:

    .. math:: (1 - \eta L) \sum_{s \le t} l_s(w_s) \le \min_w \sum_{s \le t} l_s(w) + \frac{|w|^2}{2 \eta}
              = \frac{\mu}{2} \, y^T (K + \mu I)^{-1} y, \qquad \mu = \lambda t + 1 / \eta,

    since |w_{s+1} - w|^2 = |w_s - w|^2 - 2 eta <grad l_s, w_s - w> + eta^2 |grad l_s|^2, l_s is convex, and |grad
    l_s(w_s)|^2 <= 2 L l_s(w_s). [derived] If every sample is a new draw, the mean of the left side over t is in
    expectation the mean risk of the iterates, which by convexity is at least the risk of their average.

    Args:
        kernel: K_st = <phi_s, phi_t> in the order of the pass, (n, n).
        targets: y, (n,).
        step: eta, with eta L < 1.
        penalty: Weight lambda of (lambda/2) |w|^2.
        at: Numbers t of samples.

    Returns:
        The bound of the sum up to each t.

    Raises:
        ValueError: eta L is 1 or more.

    Cost: one Cholesky factorisation of a t x t matrix for each t.
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
    """Arithmetic mean of parameters over the iterates that are added, in float64.

    Args:
        parameters: Parameters by name, which determine names and shapes.
    """

    def __init__(self, parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        named = dict(parameters)
        self._mean = {
            name: torch.zeros_like(value, dtype=torch.float64, requires_grad=False) for name, value in named.items()
        }
        self.count = 0

    @torch.no_grad()
    def add(self, parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Add one iterate: mean += (theta - mean) / (t + 1)."""
        self.count += 1
        for name, value in dict(parameters).items():
            self._mean[name] += (value.detach().double() - self._mean[name]) / self.count

    @property
    def mean(self) -> dict[str, Tensor]:
        """Mean by parameter name, float64."""
        return dict(self._mean)
