"""``gradient_noise``: how much the gradients of single samples differ, from their inner products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.arguments import require_type

MOST = 0.9
"""Share of the squared gradient norms that ``carriers`` samples carry together."""


@dataclass(frozen=True, kw_only=True)
class GradientNoise:
    r"""How the gradients g_i of the samples' own losses scatter around their mean G.

    Attributes:
        samples: n.
        norms: |g_i|, (n,).
        variance: tr Sigma, unbiased: the sum over the weights of the variance of g_i.
        mean_square: |G|^2 of the population, unbiased; it may be negative where noise prevails.
        of_probe: |1/n sum_i g_i|^2, of these samples.
        conflict: Share of pairs of samples whose gradients point away from one another.
        carriers: Smallest number of samples with 90 % of the sum of |g_i|^2.
        independent: Effective number of samples, (sum_i |g_i|^2)^2 / sum_i |g_i|^4.
        zeros: Number of samples whose gradient is zero.
    """

    samples: int
    norms: Tensor
    variance: float
    mean_square: float
    of_probe: float
    conflict: float
    carriers: int
    independent: float
    zeros: int


@dataclass(frozen=True)
class NoiseScale:
    """The simple noise scale tr Sigma / |G|^2: the batch from which on more samples give little.

    Attributes:
        value: Its estimate; ``inf``: |G|^2 is not told from 0.
        lower: Its lower end.
        upper: Its upper end; ``inf``: none.
    """

    value: float
    lower: float
    upper: float


def gradient_noise(products: Tensor) -> GradientNoise:
    r"""Compute the noise of the gradients from their inner products.

    .. math:: \mathrm{tr}\,\Sigma = \frac{n}{n - 1} \Big( \frac1n \mathrm{tr} M - \frac1{n^2} 1^T M 1 \Big), \qquad
        |G|^2 = \frac1{n^2} 1^T M 1 - \frac1n \mathrm{tr}\,\Sigma

    Both are unbiased for samples that are drawn independently.

    Args:
        products: M, (n, n), :math:`M_{ij} = g_i \cdot g_j` of the gradients of the samples' own losses, without a factor 1/n.

    Raises:
        TypeError: M is no tensor.
        ValueError: M is not square, not finite, or has fewer than two rows.

    Source: McCandlish et al. 2018 (1812.06162), section 2.2 and Appendix A.1.
    """
    require_type("products", products, Tensor, "the inner products of the gradients, (n, n)")
    if products.ndim != 2 or products.shape[0] != products.shape[1] or len(products) < 2:
        raise ValueError(f"products: shape {tuple(products.shape)}; need (n, n) with n of at least 2")
    if not bool(torch.isfinite(products).all()):
        raise ValueError("products: not finite")
    m = products.detach().double().cpu()
    n = len(m)
    squares = m.diagonal().clamp(min=0)
    of_probe = float(m.mean())
    variance = n / (n - 1) * (float(squares.mean()) - of_probe)
    above = torch.triu(torch.ones_like(m, dtype=torch.bool), 1)
    total = float(squares.sum())
    carried = squares.sort(descending=True).values.cumsum(0)
    return GradientNoise(
        samples=n,
        norms=squares.sqrt(),
        variance=max(variance, 0.0),
        mean_square=of_probe - variance / n,
        of_probe=max(of_probe, 0.0),
        conflict=float((m[above] < 0).double().mean()),
        carriers=int((carried < MOST * total).sum()) + 1 if total else 0,
        independent=total**2 / float(squares.square().sum()) if total else 0.0,
        zeros=int((squares == 0).sum()),
    )


def noise_scale(measured: Sequence[GradientNoise], products: Tensor | None = None) -> NoiseScale:
    r"""Estimate the simple noise scale from one or several measurements, pooled.

    :math:`\mathrm{tr}\,\Sigma` and :math:`|G|^2` are averaged over the measurements before they are divided, since single values of
    the second one may be negative. The spread is that of a jackknife over the samples of the last measurement; of |G|^2 two standard
    errors are taken on each side.

    Args:
        measured: The measurements, the last one last.
        products: M of the last one, for the spread; None: no spread is given, and the interval is everything.

    Raises:
        TypeError: The measurements are no list of ``GradientNoise``.
        ValueError: There is no measurement, or M has not the size of the last one.

    Source: McCandlish et al. 2018 (1812.06162), Appendix A.1; Efron & Stein 1981 (the jackknife).
    """
    require_type("measured", measured, Sequence, "a list of what gradient_noise returns")
    for each in measured:
        require_type("measured", each, GradientNoise, "a list of what gradient_noise returns")
    if not measured:
        raise ValueError("measured: no measurement; need at least one")
    if products is not None and products.shape != (measured[-1].samples,) * 2:
        raise ValueError(
            f"products: shape {tuple(products.shape)} for the {measured[-1].samples} samples of the last measurement; need its (n, n)"
        )
    variance = sum(each.variance for each in measured) / len(measured)
    square = sum(each.mean_square for each in measured) / len(measured)
    value = variance / square if square > 0 else math.inf
    if products is None:
        return NoiseScale(value, 0.0, math.inf)
    of_variance, of_square = (
        error / math.sqrt(len(measured)) for error in _jackknife(products.detach().double().cpu())
    )
    least, most = square - 2 * of_square, square + 2 * of_square
    return NoiseScale(
        value,
        max(variance - 2 * of_variance, 0.0) / most if most > 0 else math.inf,
        (variance + 2 * of_variance) / least if least > 0 else math.inf,
    )


def _jackknife(m: Tensor) -> tuple[float, float]:
    """Return the standard errors of tr Sigma and |G|^2 from leaving out one sample at a time. Cost: n^2."""
    n = len(m)
    if n < 3:
        return math.inf, math.inf
    squares, rows, k = m.diagonal(), m.sum(1), n - 1
    probes = (m.sum() - 2 * rows + squares) / k**2
    variances = k / (k - 1) * ((squares.sum() - squares) / k - probes)
    means = probes - variances / k
    first, second = (float(((n - 1) / n * (each - each.mean()).square().sum()).sqrt()) for each in (variances, means))
    return first, second
