"""The condition for narrow heads: whether the targets lie in the range of the features, and how far they do not."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.expressivity.certificate import Cost, RankCertificate, RankVerdict, require_features
from lightning_conv.expressivity.decomposition import (
    Decomposition,
    decompose,
    decomposition_bytes,
    decomposition_seconds,
)
from lightning_conv.kernels.products.precision import gamma
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.dense import LinAlgError

REACHED = 1e-8
"""Relative residual up to which the targets count as reached: what float32 weights can express."""


def certify_alignment(
    features: Tensor, targets: Tensor, *, bias: bool = True, feature_error: float = 0.0
) -> RankCertificate:
    r"""Certify how much of the targets Y the last layer can reach: :math:`\rho = \|(I - P) Y\|_F / \|Y\|_F`.

    P projects onto the range of A = [h, 1]. For squared loss :math:`\sum_i |u_i - y_i|^2 / n` the infimum over the last layer is
    :math:`\rho^2 \|Y\|_F^2 / n`; rho = 0 is the data-architecture alignment condition (Kawaguchi, Zhang, Deng 2021), weaker than
    rank n.

    With the computed solution W, R = Y - A W and e the rounding of R, any W bounds from above and its normal equations from below:

    .. math:: \|R\|^2 - \Bigl(\frac{\|A^T R\|}{\sigma_{\min}(A)}\Bigr)^2 \le \|(I - P) Y\|^2 \le \|R\|^2,

    because (I - P) Y = (I - P) R and the norm of P R is at most \|A^T R\| / sigma_min(A) where A is proven to have full column
    rank; otherwise the lower bound is 0. Where sigma_min(A) is tiny, W is large and so is e; then the projector Q onto the computed left
    singular vectors bounds from below: of the same rank as P, and with E what the decomposition leaves of A,

    .. math:: \|(I - P) Y\| \ge \|(I - Q) Y\| - \|P - Q\| \|Y\|, \qquad \|P - Q\| = \|(I - Q) P\| \le \|E\| / \sigma_{\min}(A),

    since a unit vector of the range is A z with \|z\| <= 1 / sigma_min(A), and (I - Q) A z = (I - Q) E z.

    Args:
        features: h, (n, m_H), float64.
        targets: Y, (n, C), or (n,) numbers of classes, taken as one-hot rows.
        bias: whether the last layer has a trainable bias.
        feature_error: Frobenius norm of what rounding may have changed in h. It moves the residual of W by at most |W| times
            that, and the least residual by at most |Y| / sigma_min(A) times that.

    Returns:
        ``certified``: rho is at most 1e-8. ``refuted``: rho is proven positive. ``undecided`` otherwise.

    Raises:
        ValueError: no finite matrix of features, other numbers of targets, or targets that are all zero.

    Cost: one singular value decomposition of n x (m_H + 1).
    """
    start = time.perf_counter()
    require_features(features)
    n, width = features.shape
    y = _rows(targets, n).to(features)
    size = float(y.norm())
    if not size > 0:
        raise ValueError("targets: all zero, which every last layer reaches; nothing to certify")
    a = torch.cat([features, features.new_ones(n, 1)], 1) if bias else features

    flops, predicted = 20.0 * n * width * min(n, width), decomposition_seconds(n, width)

    def cost() -> Cost:
        return Cost(time.perf_counter() - start, flops, decomposition_bytes(n, width), predicted=predicted)

    try:
        decomposition = decompose(a)
    except LinAlgError as error:
        reason = f"the singular value decomposition did not converge ({error})"
        return RankCertificate("undecided", 0, n, width, "alignment", reason, cost(), feature_error=feature_error)
    lowest = decomposition.values - decomposition.radii - feature_error
    rank = int((lowest > 0).sum())
    weights = decomposition.solve(y)
    residual = y - a @ weights
    rounding = gamma(a.shape[1] + 3, torch.float64) * float(a.norm() * weights.norm() + y.norm())
    sums = 1 + gamma(y.numel() + 3, torch.float64)  # the rounding of a norm
    norm = float(residual.norm())
    upper = (norm + rounding + feature_error * float(weights.norm())) * sums
    lower = norm / sums - rounding
    if rank == a.shape[1] and lower > 0:
        smallest = float(lowest[-1])
        slack = gamma(n + 3, torch.float64) * float(a.norm()) * norm
        inside = (float((a.T @ residual).norm()) + slack + float(a.norm()) * rounding) / smallest
        # sigma_min is that of the least favourable features within the error.
        lower = math.sqrt(max(lower**2 - (inside * sums) ** 2, 0.0)) * (1 - 1e-12) - feature_error * size / smallest
        lower = max(
            lower, _outside(decomposition, y) - (decomposition.error + feature_error) / smallest * size * sums**2
        )
    else:
        lower = 0.0
    lower, upper = max(lower, 0.0) / sums, upper * sums  # that of |Y|
    ratio = Bounded(
        norm / size, lower / size, upper / size, feature_error == 0, "least squares and its normal equations"
    )
    verdict: RankVerdict = "certified" if ratio.upper <= REACHED else "refuted" if ratio.lower > 0 else "undecided"
    reason = (
        f"the last layer reaches the targets up to {ratio.value:.3e} of their norm (at least {ratio.lower:.3e}, at most "
        f"{ratio.upper:.3e}); the squared loss of this trunk is at least {ratio.lower**2 * size**2 / n:.3e}"
    )
    top, radius = float(decomposition.values[0]), float(decomposition.radii[0]) + feature_error
    method = "residual bound of the float64 SVD" + (" + estimated rounding inside the trunk" if feature_error else "")
    sigma_max = Bounded(top, max(top - radius, 0.0), top + radius, feature_error == 0, method)
    return RankCertificate(
        verdict, rank, n, width, "alignment", reason, cost(), None, sigma_max, feature_error, residual=ratio
    )


def _outside(decomposition: Decomposition, y: Tensor) -> float:
    """|(I - Q) Y|_F from below, Q the projector onto the range of the computed U, which is orthonormal up to ``defect``."""
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
    """Targets as rows.

    Raises:
        ValueError: there are not n of them, or they are not finite.
    """
    if len(targets) != n:
        raise ValueError(f"targets: {len(targets)} for {n} samples; need one row a sample")
    if targets.ndim == 1 and not targets.is_floating_point():
        return F.one_hot(targets.long())
    rows = targets.reshape(n, -1)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("targets: NaN or infinity; clean the data")
    return rows
