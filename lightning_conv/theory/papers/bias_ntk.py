"""The bias-generalised NTK (Yang et al. 2023): sparse activation by a constant initial bias, and its limit kernel H(B)."""

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
"""Below this 1 -+ cos is taken from differences: the probability has a square root there, which would cost half the digits."""


def active_probability(threshold: float) -> float:
    """P(z >= B) = 1 - Phi(B) for z ~ N(0, 1): the share of units active on an input of norm 1 at the start.

    It is at most exp(-B^2 / 2) / 2 for B >= 0.

    Example:
        >>> active_probability(0.0)
        0.5
    """
    return float(ndtr(-threshold))


def _both_active(below_one: np.ndarray, above_minus_one: np.ndarray, threshold: float) -> np.ndarray:
    """The probability from 1 - rho and 1 + rho, which may be small and exact."""
    b = abs(threshold)
    with np.errstate(divide="ignore"):
        ratio = np.sqrt(below_one / above_minus_one)  # inf at rho = -1, where 2 T(B, inf) = Q
    p = np.clip(ndtr(-b) - 2 * owens_t(b, ratio), 0, None)
    result: np.ndarray = p if threshold >= 0 else 1 - 2 * ndtr(threshold) + p
    return result


def bias_ntk(inputs: Tensor, threshold: float, *, trained_bias: bool = True) -> Tensor:
    r"""H(B)_ij = (x_i . x_j + 1) P(w . x_i >= B, w . x_j >= B), w ~ N(0, I): limit of the NTK of ``BiasedTwoLayer``, (n, n), float64.

    The limit is that of an infinite width, in the convention of the loss (1/2) sum (u - y)^2. "+ 1" is the bias's own part
    (the first version of the paper trains it). The diagonal is 2 (1 - Phi(B)): the kernel is about as much
    smaller than the dense one as the activation is sparser, and so is the speed at a given step size; at a step size of its own
    it is not.

    Args:
        inputs: (n, d), rows of norm 1.
        threshold: B.
        trained_bias: False: without the "+ 1".

    Raises:
        ValueError: not a matrix, or a row whose norm is not 1 (to 1e-6).

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
    r"""The share of active units at the start against its expectation 1 - Phi(B).

    The share is a mean over m units of independent numbers in [0, 1] with mean p = 1 - Phi(B), hence of variance p (1 - p) at most,
    whatever the inputs of norm 1 are. So (Bernstein) the two differ by more than

    .. math:: t = \frac{1}{m} \Bigl(\frac{\ell}{3} + \sqrt{\frac{\ell^2}{9} + 2 m p (1 - p) \ell}\Bigr), \qquad
        \ell = \ln \frac{2}{\text{failure}},

    with probability ``failure`` at most over w_r ~ N(0, I) and b_r = B.

    Args:
        active_fraction: mean over the units and one or several inputs.
        threshold: B.
        width: m.
        failure: probability with which weights drawn as the paper's are refuted.

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
    """The measured share of active units against exp(-B^2 / 2), the paper's bound of 1 - Phi(B).

    At the start the expectation 1 - Phi(B) is at most half of it, so there is room for a factor of two of drift. The
    paper's statement for the whole of training is O(exp(-B^2 / 2)) per input, its constant unspecified.

    Args:
        active_fraction: mean over the units, of one input or several, ``LayerPattern.active_fraction``.
        threshold: B >= 0.
        when: words for the reader, such as "at step 100".

    Raises:
        ValueError: B is negative: nothing is sparse then.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold: {threshold}; activation is sparse for B >= 0 only")
    asks = "share of active units <= exp(-B^2/2)" + (f", {when}" if when else "")
    return at_most("active_fraction", SOURCE, asks, active_fraction, math.exp(-(threshold**2) / 2))
