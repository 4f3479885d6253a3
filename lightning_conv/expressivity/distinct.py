"""Existence: a wide layer of an analytic activation separates distinct inputs, whatever its weights are (almost)."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import Cost, RankCertificate, RankVerdict, require_features, too_narrow
from lightning_conv.expressivity.closest import closest_rows
from lightning_conv.kernels.products.gemm import calibrated
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.reporting.progress import Report, progress_bar

SHARE = 0.5
"""Of the calibrated rate of products that the comparison of all pairs reaches."""


def certify_distinct(
    entering: Tensor,
    width: int,
    *,
    bias: bool = True,
    feature_error: float = 0.0,
    progress: bool | Report | None = None,
) -> RankCertificate:
    r"""Certify that rank [sigma(X W^T + b), 1] = n for almost every (W, b), from n distinct rows of X.

    Let sigma be real-analytic and not a polynomial, and the layer at least n - 1 units wide (n without a bias of the head).

    1. The vectors :math:`(\sigma(w \cdot x_i + b))_i` span R^n (Pinkus 1999, Theorem 5.1). For a smooth sigma: along a direction v
       with distinct :math:`\tau_i = v \cdot x_i`, a c orthogonal to all of them has
       :math:`\sigma^{(k)}(b) \sum_i c_i \tau_i^k = 0` for all b and k (differentiate in a at w = a v, a = 0), and no derivative of
       sigma is zero everywhere, so c solves a Vandermonde system: c = 0.
    2. So n of them are a basis, and the vector of ones can be completed to a basis by n - 1 of them (Steinitz): at some (W, b) the
       rank of [h, 1] is n.
    3. det([h, 1] [h, 1]^T) is a real-analytic function of (W, b), and not zero there. The zeros of such a function have measure
       zero (Mityagin 2015).

    Noise with a density added to (W, b) therefore gives rank n with probability one. The distinctness of the rows is what is
    certified here: their least distance exceeds what rounding may have moved two rows apart, sqrt(2) times ``feature_error``.

    Args:
        entering: X, what enters the wide layer: (n, d), float64, at the trunk's present weights.
        width: units of the wide layer, which is the last hidden one.
        bias: whether the head has a trainable bias.
        feature_error: Frobenius norm of what rounding before the wide layer may have changed in X.
        progress: see ``certify_expressivity``.

    Returns:
        ``certified``, ``refuted`` (too narrow, or two rows are equal and nothing was rounded: then rank n is impossible at
        these weights of the layers before), or ``undecided``. The closest two samples are named.

    Raises:
        ValueError: X is no finite float64 matrix.

    Cost: n^2 d flops at most, memory O(n d).
    """
    start = time.perf_counter()
    require_features(entering)
    n, d = entering.shape
    flops = float(n) ** 2 * d
    narrow = too_narrow(n, width, bias=bias)
    if narrow is not None:
        return RankCertificate(
            "refuted", 0, n, width, "distinct", narrow, Cost(0.0, 0.0, 0.0), feature_error=feature_error
        )
    seconds = flops / (SHARE * calibrated("cpu", entering.dtype, torch.get_num_threads())[1])
    if n == 1:
        reason = "one sample is distinct from all others"
        return RankCertificate(
            "certified", 1, n, width, "distinct", reason, Cost(0.0, 0.0, 0.0), feature_error=feature_error
        )
    with progress_bar(f"closest of {n} samples, at most about {seconds:.0f} s", seconds, progress) as report:
        found = closest_rows(entering, report=report)
    allowance = 2**0.5 * (1 + 1e-15) * feature_error
    distance = found.distance
    bounded = Bounded(
        distance.value,
        max(distance.lower - allowance, 0.0),
        distance.upper + allowance,
        feature_error == 0,
        distance.method,
    )
    who = f"samples {found.first} and {found.second}, the closest, are {distance.value:.3e} apart as they enter the wide layer"
    verdict: RankVerdict
    if bounded.lower > 0:
        verdict, rank = "certified", n
        reason = f"{who}, beyond what rounding moves ({allowance:.1e}); rank n = {n} holds at almost every weight of that layer"
    elif distance.value == 0 and feature_error == 0:
        verdict, rank = "refuted", 0
        reason = (
            f"samples {found.first} and {found.second} are equal as they enter the wide layer; remove duplicate samples"
        )
    else:
        verdict, rank = "undecided", 0
        reason = f"{who}, which is not beyond what rounding may move ({allowance:.1e})"
    cost = Cost(time.perf_counter() - start, found.compared * flops, 24.0 * n * d, predicted=seconds)
    return RankCertificate(
        verdict,
        rank,
        n,
        width,
        "distinct",
        reason,
        cost,
        feature_error=feature_error,
        distance=bounded,
    )
