r"""Moments of a smooth activation under correlated Gaussians, by Gauss-Hermite quadrature and the Hermite expansion.

For standard normal variables (z, z') with correlation rho and the orthonormal Hermite polynomials h_k, Mehler's formula
gives E[h_k(z) h_l(z')] = rho^k if k = l, and 0 otherwise. So for u of variance a and v of variance b

.. math:: E[f(u) g(v)] = \sum_k \rho^k f_k(a) g_k(b), \qquad f_k(a) = E[f(\sqrt a z) h_k(z)].

The coefficients come from the one-dimensional q-point rule, so the (n, n) matrix of all pairs costs n^2 q operations
instead of the n^2 q^2 of the product rule. At rho = 1 the sum equals the q-point rule, because the discrete transform
is orthogonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_conv.kernels.infinite.correlation import correlations
from lightning_conv.networks.activation import Activation, derivative

ENTRIES_AT_ONCE = 2**15
"""Entries of a matrix that fit into the cache of a processor beside their correlations; q passes over more would wait
for memory."""


@lru_cache(maxsize=8)
def gauss_hermite(order: int) -> tuple[Tensor, Tensor]:
    r"""Return the q-point rule for N(0, 1): its nodes z_j, and the orthogonal matrix Q[k, j] = sqrt(w_j) h_k(z_j).

    Both come from the eigenvectors of the tridiagonal matrix of the recurrence (Golub & Welsch 1969). Row 0 is
    sqrt(w_j), since h_0 = 1, so sum_j Q[0, j] Q[k, j] f(z_j) is the quadrature of E[f(z) h_k(z)].

    Args:
        order: q, the number of nodes.

    Returns:
        Nodes (q,) and Q (q, q) in float64.
    """
    off = torch.arange(1, order, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors * torch.where(vectors[:1] < 0, -1.0, 1.0)


def gaussian_mean(function: Activation, variances: Tensor, order: int) -> Tensor:
    """Return E f(u) for u ~ N(0, a) by the q-point rule, elementwise for a in ``variances``."""
    nodes, basis = gauss_hermite(order)
    nodes, basis = nodes.to(variances.device), basis.to(variances.device)
    values: Tensor = function(variances.sqrt()[..., None] * nodes)
    return values @ basis[0].square()


@dataclass(frozen=True)
class HermiteDual:
    """The dual activation of sigma by q-point quadrature: moments of sigma and sigma' under centred Gaussians."""

    activation: Activation
    order: int  # q

    def mean(self, variances: Tensor) -> Tensor:
        """Return E sigma(u) for each variance of u."""
        return gaussian_mean(self.activation, variances, self.order)

    def moment(self, covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return E[sigma(u_i) sigma(v_j)], (n, m).

        Args:
            covariance: cov(u_i, v_j), (n, m), float64.
            rows: var(u_i), (n,).
            columns: var(v_j), (m,).
        """
        return self._moment(self.activation, covariance, rows, columns)

    def derivative_moment(self, covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return E[sigma'(u_i) sigma'(v_j)], (n, m); arguments as in ``moment``."""
        return self._moment(lambda z: derivative(self.activation, z), covariance, rows, columns)

    def _moment(self, function: Activation, covariance: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        left = self._coefficients(function, rows)
        right = left if columns is rows else self._coefficients(function, columns)
        left, right = left.T.contiguous(), right.T.contiguous()  # (q, n): strided columns take three times as long
        rho = correlations(covariance, rows, columns)
        total = torch.zeros_like(covariance)
        on_cpu = covariance.device.type == "cpu"
        count = max(1, ENTRIES_AT_ONCE // max(1, covariance.shape[1])) if on_cpu else len(covariance)
        for start in range(0, len(covariance), max(1, count)):
            rows_now = slice(start, start + count)
            part, factor, weights = total[rows_now], rho[rows_now], left[:, rows_now]
            for k in reversed(range(self.order)):  # Horner
                part.mul_(factor).addr_(weights[k], right[k])
        return total

    def _coefficients(self, function: Activation, variances: Tensor) -> Tensor:
        """Return f_k(a) for each variance a, (n, q)."""
        nodes, basis = gauss_hermite(self.order)
        nodes, basis = nodes.to(variances.device), basis.to(variances.device)
        values: Tensor = function(variances.sqrt()[:, None] * nodes)
        return (values * basis[0]) @ basis.T
