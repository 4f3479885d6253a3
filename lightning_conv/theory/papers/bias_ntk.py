"""The bias-generalised NTK (Yang et al. 2023): sparse activation through a constant initial bias, and H(B)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from scipy.special import ndtr, owens_t
from torch import Tensor

from lightning_conv.theory.criterion import Criterion, at_most

SOURCE = "Yang, Jiang, Zhang, Liang, Wang 2023 (2301.00327)"
NEAR = 1e-3
"""Below this value 1 -+ cos is computed from differences: a square root there would cost half the digits."""


def active_probability(threshold: float) -> float:
    """Compute P(z >= B) = 1 - Phi(B), z ~ N(0, 1): the share of units active on an input of norm 1 at the start.

    Phi is the standard normal distribution function. The probability is at most exp(-B^2 / 2) / 2 for B >= 0.

    Example:
        >>> active_probability(0.0)
        0.5
    """
    return float(ndtr(-threshold))


def _both_active(below_one: np.ndarray, above_minus_one: np.ndarray, threshold: float) -> np.ndarray:
    r"""Compute P(u >= B, v >= B) for standard normal u, v with E[uv] = rho, entry by entry.

    Equal thresholds leave a single Owen's T function: with Q = 1 - Phi(B),

    .. math:: P = Q - 2\, T\Bigl(B, \sqrt{\tfrac{1 - \rho}{1 + \rho}}\Bigr) \; (B \ge 0), \qquad
        P_B = 1 - 2 \Phi(B) + P_{-B} \; (B < 0).

    The absolute error is about 1e-16. Where P is far below Q (rho < 0, large B), the relative error grows accordingly.

    Args:
        below_one: 1 - rho, which may be small and exact.
        above_minus_one: 1 + rho, in the same way.
        threshold: Threshold B of the two normal variables.

    Source: Owen 1956, equation (2.1) at h = k; scipy.special.owens_t.
    """
    b = abs(threshold)
    with np.errstate(divide="ignore"):
        ratio = np.sqrt(below_one / above_minus_one)  # inf at rho = -1, where 2 T(B, inf) = Q
    p = np.clip(ndtr(-b) - 2 * owens_t(b, ratio), 0, None)
    result: np.ndarray = p if threshold >= 0 else 1 - 2 * ndtr(threshold) + p
    return result


def bias_ntk(inputs: Tensor, threshold: float, *, trained_bias: bool = True) -> Tensor:
    r"""Compute the infinite-width limit of the NTK of ``BiasedTwoLayer``, H(B), (n, n), float64.

    .. math:: H(B)_{ij} = (x_i \cdot x_j + 1) \, P(w \cdot x_i \ge B, \; w \cdot x_j \ge B), \qquad w \sim N(0, I)

    The convention is that of the loss (1/2) sum (u - y)^2. The "+ 1" comes from the bias (the first version of the
    paper trains it). The diagonal is 2 (1 - Phi(B)), so the kernel is smaller than that of the dense network (B = 0) by
    about the share of active units. At a given step size training is slower by the same factor; a larger step makes up
    for it.

    Args:
        inputs: Samples, (n, d), rows of norm 1.
        threshold: Initial bias B of every unit.
        trained_bias: Whether the bias is trained; if not, the "+ 1" is left out.

    Raises:
        ValueError: ``inputs`` is not a matrix, or the norm of a row is not 1 (to 1e-6).

    Cost: n^2 d flops and n^2 values of Owen's T.

    Example:
        >>> bias_ntk(torch.eye(2, dtype=torch.float64), 0.0)
        tensor([[1.0000, 0.2500],
                [0.2500, 1.0000]], dtype=torch.float64)
    """
    if inputs.ndim != 2 or not len(inputs):
        raise ValueError(f"inputs: shape {tuple(inputs.shape)}; need (n, d)")
    x = inputs.detach().double()
    norms = torch.linalg.vector_norm(x, dim=1)
    if not bool((norms - 1).abs().max() <= 1e-6):
        raise ValueError(
            f"inputs: rows of norm {float(norms.min()):.6g} to {float(norms.max()):.6g}; scale each to norm 1"
        )
    x = x / norms[:, None]
    cosine = (x @ x.T).clamp(-1, 1)
    below_one, above_minus_one = 1 - cosine, 1 + cosine
    for near, sign in ((below_one, 1.0), (above_minus_one, -1.0)):
        rows, columns = (near < NEAR).nonzero(as_tuple=True)
        for start in range(0, len(rows), 65_536):
            i, j = rows[start : start + 65_536], columns[start : start + 65_536]
            near[i, j] = (x[i] - sign * x[j]).square().sum(1) / 2
    probability = torch.from_numpy(_both_active(below_one.numpy(), above_minus_one.numpy(), threshold))
    kernel = (cosine + float(trained_bias)) * probability
    kernel.diagonal().copy_(torch.full((len(x),), (1 + float(trained_bias)) * active_probability(threshold)))
    symmetric: Tensor = (kernel + kernel.T) / 2
    return symmetric


def starts_sparse(active_fraction: float, threshold: float, width: int, *, failure: float = 1e-6) -> Criterion:
    r"""Judge the share of active units at the start against its expectation 1 - Phi(B).

    For any inputs of norm 1, the share is a mean over m units of independent numbers in [0, 1] with mean p = 1 -
    Phi(B), whose variance is therefore at most p (1 - p). By Bernstein's inequality the share and p differ by more than

    .. math:: t = \frac{1}{m} \Bigl(\frac{\ell}{3} + \sqrt{\frac{\ell^2}{9} + 2 m p (1 - p) \ell}\Bigr), \qquad
        \ell = \ln \frac{2}{\text{failure}},

    with probability ``failure`` at most over w_r ~ N(0, I) and b_r = B.

    Args:
        active_fraction: Share of active units, the mean over the units for one or several inputs.
        threshold: Initial bias B of every unit.
        width: Number m of units.
        failure: Probability with which weights that are drawn as in the paper are refuted.

    Example:
        >>> starts_sparse(0.48, 0.0, 2000).verdict
        'consistent'
    """
    p, log_term = active_probability(threshold), math.log(2 / failure)
    allowed = (log_term / 3 + math.sqrt(log_term**2 / 9 + 2 * width * p * (1 - p) * log_term)) / width
    asks = f"|share of active units - (1 - Phi(B))| <= t at the start, t exceeded with probability {failure:g} at most"
    found = at_most("active_fraction_start", SOURCE, asks, abs(active_fraction - p), allowed)
    return replace(found, reason=f"{found.reason}; the share is {active_fraction:.4g}, 1 - Phi(B) = {p:.4g}")


def stays_sparse(active_fraction: float, threshold: float, *, when: str = "") -> Criterion:
    """Judge the measured share of active units against exp(-B^2 / 2), the paper's bound of 1 - Phi(B).

    At the start the expectation 1 - Phi(B) is at most half of the bound, which leaves room for a factor of two during
    training. The paper's statement about all of training is O(exp(-B^2 / 2)) per input, with an unspecified constant.

    Args:
        active_fraction: Share of active units, the mean over the units for one input or several
            (``LayerPattern.active_fraction``).
        threshold: Initial bias B of every unit, 0 or more.
        when: Words for the reader, such as "at step 100".

    Raises:
        ValueError: B is negative, and the activation not sparse.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold: {threshold}; activation is sparse for B >= 0 only")
    asks = "share of active units <= exp(-B^2/2)" + (f", {when}" if when else "")
    return at_most("active_fraction", SOURCE, asks, active_fraction, math.exp(-(threshold**2) / 2))
