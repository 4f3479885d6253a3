"""Rank n at almost every weight: a wide layer with a real-analytic activation separates distinct inputs."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import (
    Cost,
    RankCertificate,
    RankVerdict,
    require_error,
    require_features,
    too_narrow,
)
from lightning_conv.expressivity.closest import closest_rows
from lightning_conv.expressivity.equal import Pair, SameInputs
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import product_up, sum_down, sum_up
from lightning_conv.machine.gemm import calibrated
from lightning_conv.reporting.progress import Report, progress_bar

SHARE = 0.5
"""Share of the calibrated rate of matrix products that the comparison of all pairs reaches."""


def certify_distinct(
    entering: Tensor,
    width: int,
    *,
    bias: bool = True,
    feature_error: float = 0.0,
    same_inputs: SameInputs | None = None,
    progress: bool | Report | None = None,
) -> RankCertificate:
    r"""Certify that rank [sigma(X W^T + b), 1] = n for almost every (W, b), from n distinct rows of X.

    Let sigma be real-analytic and not a polynomial, and let the layer be at least n - 1 units wide (n if the head has no
    bias).

    1. The vectors :math:`(\sigma(w \cdot x_i + b))_i` span R^n (Pinkus 1999, Theorem 5.1). For a smooth sigma: along a direction v
       with distinct :math:`\tau_i = v \cdot x_i`, a c orthogonal to all of them has
       :math:`\sigma^{(k)}(b) \sum_i c_i \tau_i^k = 0` for all b and k (differentiate in a at w = a v, a = 0), and no derivative of
       sigma is zero everywhere, so c solves a Vandermonde system: c = 0.
    2. So n of them are a basis, and the vector of ones can be completed to a basis by n - 1 of them (Steinitz): at some (W, b) the
       rank of [h, 1] is n.
    3. det([h, 1] [h, 1]^T) is a real-analytic function of (W, b), and not zero there. The zeros of such a function have measure
       zero (Mityagin 2015).

    Noise with a density that is added to (W, b) therefore gives rank n with probability one. What is certified here is that
    the rows are distinct: their smallest distance exceeds sqrt(2) times ``feature_error``, the largest change that rounding
    may have made to the distance of two rows.

    Args:
        entering: X, the inputs of the wide layer at the trunk's current weights, (n, d), float64.
        width: number of units of the wide layer, which is the last hidden one.
        bias: whether the head has a trainable bias.
        feature_error: Frobenius norm of the change that rounding before the wide layer may have made to X.
        same_inputs: see ``certify_expressivity``.
        progress: see ``certify_expressivity``.

    Returns:
        The certificate, which names the closest two samples. ``refuted``: the layer is too narrow, two samples are equal, or
        two rows are equal without any rounding, which makes rank n impossible at these weights of the previous layers
        (``at_these_weights``).

    Raises:
        ValueError: X is not a finite float64 matrix, or ``feature_error`` is negative or NaN.

    Cost: n^2 d flops at most, memory O(n d).
    """
    start = time.perf_counter()
    require_features(entering, name="entering")
    require_error(feature_error)
    n, d = entering.shape
    flops = float(n) ** 2 * d
    certificate = partial(RankCertificate, n=n, width=width, method="distinct", feature_error=feature_error)
    narrow = too_narrow(n, width, bias=bias)
    if narrow is not None:
        return certificate("refuted", 0, reason=narrow, cost=Cost(0.0, 0.0, 0.0))
    seconds = flops / (SHARE * calibrated("cpu", entering.dtype, torch.get_num_threads())[1])
    if n == 1:
        reason = "one sample is distinct from all others"
        return certificate("certified", 1, reason=reason, cost=Cost(0.0, 0.0, 0.0))
    with progress_bar(f"closest of {n} samples, at most about {seconds:.0f} s", seconds, progress) as report:
        found = closest_rows(entering, report=report)
    allowance = product_up(2**0.5, 1 + 1e-15, feature_error)
    distance = found.distance
    lower, upper = max(sum_down(distance.lower, -allowance), 0.0), sum_up(distance.upper, allowance)
    bounded = Bounded(distance.value, lower, upper, feature_error == 0, distance.method)
    who = f"samples {found.first} and {found.second}, the closest, are {distance.value:.3e} apart at the input of the wide layer"
    verdict: RankVerdict
    present = False
    if bounded.lower > 0:
        verdict, rank = "certified", n
        reason = (
            f"{who}, beyond what rounding may move ({allowance:.1e}); rank n = {n} at almost every weight of that layer"
        )
    elif (equal := Pair(found.first, found.second, distance.value).refutes(feature_error, same_inputs)) is not None:
        verdict, rank, present = "refuted", 0, equal.at_these_weights
        reason = equal.reason("the wide layer cannot separate them at its input")
    else:
        verdict, rank = "undecided", 0
        reason = f"{who}, which is not beyond what rounding may move ({allowance:.1e})"
    cost = Cost(time.perf_counter() - start, found.compared * flops, 24.0 * n * d, predicted=seconds)
    return certificate(verdict, rank, reason=reason, cost=cost, distance=bounded, at_these_weights=present)
