"""The expressivity condition for narrow heads: whether, and up to which residual, the features reach the targets."""

from __future__ import annotations

import time
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.expressivity.certificate import RankCertificate, RankVerdict, require_error, require_features
from lightning_conv.expressivity.decomposition import Decomposition, bounded_value, decompose, decomposition_cost
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.dense import LinAlgError
from lightning_conv.linalg.rounding import (
    FEW,
    exponent_of,
    gamma,
    ldexp,
    ldexp_down,
    ldexp_up,
    product_down,
    quotient_down,
    quotient_up,
    root_down,
    rounded_down,
    sum_down,
)

REACHED = 1e-12
"""Relative residual up to which the targets count as reached, where rounding explains it."""


SOLVED = 16.0
"""Error of a least-squares solution by singular values, in units of the rounding of its residual."""


def certify_alignment(
    features: Tensor, targets: Tensor, *, bias: bool = True, feature_error: float = 0.0
) -> RankCertificate:
    r"""Certify how much of the targets Y the last layer can reach: :math:`\rho = \|(I - P) Y\|_F / \|Y\|_F`.

    P projects onto the range of A = [h, 1]. For the squared loss :math:`\sum_i |u_i - y_i|^2 / n` the infimum over the last
    layer is :math:`\rho^2 \|Y\|_F^2 / n`. The condition rho = 0 is the data-architecture alignment condition (Kawaguchi,
    Zhang, Deng 2021), which is weaker than rank n.

    Let W be the computed solution and R = Y - A W. Any W gives an upper bound, and its normal equations give a lower bound:

    .. math:: \|R\|^2 - \Bigl(\frac{\|A^T R\|}{\sigma_{\min}(A)}\Bigr)^2 \le \|(I - P) Y\|^2 \le \|R\|^2,

    because (I - P) Y = (I - P) R, and the norm of P R is at most \|A^T R\| / sigma_min(A) if A is proven to have full column
    rank. Otherwise the lower bound is 0. The rounding error e of R is included. Where sigma_min(A) is tiny, W and with it e
    are large. Then a better lower bound comes from the projector Q onto the computed left singular vectors, which has the
    same rank as P. With E the residual of the decomposition of A,

    .. math:: \|(I - P) Y\| \ge \|(I - Q) Y\| - \|P - Q\| \|Y\|, \qquad \|P - Q\| = \|(I - Q) P\| \le \|E\| / \sigma_{\min}(A),

    since a unit vector of the range is A z with \|z\| <= 1 / sigma_min(A), and (I - Q) A z = (I - Q) E z.

    Args:
        features: h, (n, m_H), float64.
        targets: Y, (n, C), or (n,) class numbers, which are taken as one-hot rows.
        bias: whether the last layer has a trainable bias.
        feature_error: Frobenius norm of the change that rounding may have made to h. It moves the residual of W by at most
            |W| times this number, and the smallest residual by at most |Y| / sigma_min(A) times this number.

    Returns:
        The certificate. ``certified``: the residual is at most 1e-8 of what a head of the bias alone leaves (large targets that
        hardly differ are no easier to reach). ``refuted``: rho is proven positive. ``undecided`` otherwise.

    Raises:
        ValueError: the features are not a finite matrix, the number of targets is not n, or all targets are zero.

    Cost: one singular value decomposition of n x (m_H + 1).
    """
    start = time.perf_counter()
    require_features(features)
    require_error(feature_error)
    n, width = features.shape
    y = _rows(targets, n).to(features)
    # The quotient has no scale: a power of two changes no digit, and squares then neither vanish nor overflow.
    unit = exponent_of(y)
    y = ldexp(y, -unit)
    size = float(y.norm())
    if not size > 0:
        raise ValueError("targets: all zero; every last layer reaches them, so there is nothing to certify")
    a = torch.cat([features, features.new_ones(n, 1)], 1) if bias else features

    try:
        decomposition = decompose(a)
    except LinAlgError as error:
        reason = f"the singular value decomposition did not converge ({error})"
        cost = decomposition_cost(n, width, start)
        return RankCertificate("undecided", 0, n, width, "alignment", reason, cost, feature_error=feature_error)
    given = feature_error
    a, feature_error = ldexp(a, -decomposition.exponent), ldexp_up(feature_error, -decomposition.exponent)
    rank = decomposition.rank(given)
    weights = decomposition.solve(y)
    residual = y - a @ weights
    sums = 1 + gamma(y.numel() + 3, torch.float64)  # the rounding of a norm
    norms = 1 + gamma(a.numel() + y.numel() + weights.numel() + 8, torch.float64)  # of the norms in the error terms
    height = float(a.norm())
    rounding = gamma(a.shape[1] + 3, torch.float64) * (height * float(weights.norm()) + size) * norms
    norm = float(residual.norm())
    upper = (norm + rounding + feature_error * float(weights.norm()) * norms) * sums
    lower = norm / sums - rounding
    # Whether the residual is what rounding makes of zero: that of the product, and of the solution, which is no exact minimiser.
    explained = norm / sums <= SOLVED * rounding + feature_error * float(weights.norm()) * norms
    if rank == a.shape[1] and lower > 0:
        values, radii = decomposition.values, decomposition.radii
        # sigma_min of the least favourable features within the error.
        smallest = sum_down(float(values[-1]), -float(radii[-1]), -feature_error)
        inside = float((a.T @ residual).norm()) + height * (gamma(n + 3, torch.float64) * norm + rounding)
        inside = quotient_up(inside * norms * sums, smallest)
        rest = root_down(max(rounded_down(Fraction(lower) ** 2 - Fraction(inside) ** 2), 0.0))
        moved = quotient_up(feature_error * size * sums * FEW, smallest)
        slanted = quotient_up((decomposition.error + feature_error) * size * sums**2 * FEW, smallest)
        lower = max(sum_down(rest, -moved), sum_down(_outside(decomposition, y), -slanted))
    else:
        lower = 0.0
    # The factors cover the rounding of |Y|, and of the few operations on the way.
    lower, upper = max(lower, 0.0) / sums / FEW, upper * sums * FEW
    method = "least squares and its normal equations"
    ratio = Bounded(norm / size, quotient_down(lower, size), quotient_up(upper, size), feature_error == 0, method)
    spread = float((y - y.mean(0)).norm()) if bias else size
    constant = spread <= gamma(n + 2, torch.float64) * size  # targets that the bias alone reaches
    reached = explained and upper <= REACHED * (size if constant else spread)
    verdict: RankVerdict = "certified" if reached else "refuted" if ratio.lower > 0 else "undecided"
    loss = ldexp_down(quotient_down(product_down(lower, lower), n), 2 * unit)
    reason = (
        f"the last layer reaches the targets up to {ratio.value:.3e} of their norm (at least {ratio.lower:.3e}, at most "
        f"{ratio.upper:.3e}); the squared loss of this trunk is at least {loss:.3e}"
    )
    sigma_max, cost = bounded_value(decomposition, 0, given), decomposition_cost(n, width, start)
    return RankCertificate(verdict, rank, n, width, "alignment", reason, cost, None, sigma_max, given, residual=ratio)


def _outside(decomposition: Decomposition, y: Tensor) -> float:
    """Bound |(I - Q) Y|_F from below, Q the projector onto the range of the computed U, orthonormal up to ``defect``."""
    left, defect = decomposition.left, decomposition.defect
    if not defect < 0.5:
        return 0.0
    size, inside = float(y.norm()), left.T @ y
    outside = y - left @ inside
    # Both products, and the difference; |U|_F^2 is about the number of columns.
    products = 2 * gamma(max(left.shape) + 3, torch.float64) * float(left.norm()) ** 2 * 2 + 2.0**-52
    # |U U^T - Q| = |U (I - (U^T U)^-1) U^T| <= |U|^2 defect / (1 - defect).
    slant = (1 + defect) * defect / (1 - defect)
    sums = 1 + gamma(y.numel() + 3, torch.float64)
    return float(outside.norm()) / sums - (products + slant) * size * sums


def _rows(targets: Tensor, n: int) -> Tensor:
    """Return the targets as rows, one-hot for class numbers.

    Raises:
        ValueError: there are not n targets, or they are not finite.
    """
    if len(targets) != n:
        raise ValueError(f"targets: {len(targets)} for {n} samples; need one row per sample")
    if targets.ndim == 1 and not targets.is_floating_point():
        return F.one_hot(targets.long())
    rows = targets.reshape(n, -1)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("targets: NaN or infinity; clean the data")
    return rows
