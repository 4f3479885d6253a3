"""Rank certificates from the singular values of features that fit into memory."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import (
    RankCertificate,
    RankVerdict,
    require_error,
    require_features,
    too_narrow,
)
from lightning_conv.expressivity.closest import closest_rows
from lightning_conv.expressivity.decomposition import METHOD, bounded_value, decompose, decomposition_cost
from lightning_conv.expressivity.equal import Pair, SameInputs
from lightning_conv.expressivity.practical import impractical
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.dense import LinAlgError
from lightning_conv.linalg.rounding import exponent_of, frobenius, ldexp, ldexp_up

FEATURE_SAFETY = 16.0
LOST = 0.1  # part of a row or column of the features that float32 may lose before it says nothing of float64


def certify_held(
    features: Tensor, *, bias: bool = True, feature_error: float = 0.0, same_inputs: SameInputs | None = None
) -> RankCertificate:
    r"""Certify rank [h, 1] = n from the singular values of float64 features.

    Each exact value differs from the computed one by at most the radius of ``decompose`` plus ``feature_error`` (Weyl). The
    rank is at least the number of lower bounds above zero.

    Args:
        features: h, (n, m_H), float64.
        bias: see ``certify_expressivity``.
        feature_error: see ``certify_expressivity``.
        same_inputs: see ``certify_expressivity``.

    Raises:
        ValueError: the features are empty, not a matrix or not finite, or ``feature_error`` is negative or NaN.

    Cost: one singular value decomposition, about 20 n^2 m_H flops; memory ``decomposition_bytes``.
    """
    start = time.perf_counter()
    require_features(features)
    require_error(feature_error)
    n, width = features.shape
    augmented = torch.cat([features, features.new_ones(n, 1)], 1) if bias else features
    try:
        decomposition = decompose(augmented)
    except LinAlgError as error:
        nothing = Bounded(0.0, 0.0, float("inf"), certified=False, method="none")
        reason = f"the singular value decomposition did not converge ({error})"
        cost = decomposition_cost(n, width, start)
        return RankCertificate("undecided", 0, n, width, "singular", reason, cost, nothing, nothing, feature_error)
    rank = decomposition.rank(feature_error)
    sigma_max = bounded_value(decomposition, 0, feature_error)
    verdict: RankVerdict
    present = False
    if narrow := too_narrow(n, width, bias=bias):
        # The n-th singular value of a matrix with fewer columns is exactly zero.
        sigma_min = Bounded(0.0, 0.0, 0.0, True, METHOD)
        verdict, reason = "refuted", f"{narrow} (rank at least {rank} is certified)"
    else:
        sigma_min = bounded_value(decomposition, n - 1, feature_error)
        verdict, reason, present = _judge(features, rank, sigma_min, feature_error, same_inputs)
        if verdict == "certified":
            reason += impractical(sigma_max.value, sigma_min.value)
    cost = decomposition_cost(n, width, start)
    return RankCertificate(
        verdict,
        rank,
        n,
        width,
        "singular",
        reason,
        cost,
        sigma_min,
        sigma_max,
        feature_error,
        at_these_weights=present,
    )


def feature_rounding(coarse: Tensor, features: Tensor) -> float:
    r"""Estimate the change that rounding inside the trunk made to float64 features: 16 * 2^-29 |h_32 - h_64|_F.

    The error in float32 may be scaled to that in float64 as long as it is small. Where float32 loses a row of h, or what differs in a
    column, by more than a tenth (a cancellation: (z + c) - c with a large c), it says nothing of float64, and what was lost counts as
    unknown.

    Args:
        coarse: h as the float32 trunk computes it, (n, m_H).
        features: h from its float64 copy, (n, m_H).

    Returns:
        The estimate of the Frobenius norm.
    """
    exponent = exponent_of(features)  # squares must not vanish or overflow
    h, moved = ldexp(features, -exponent), ldexp(coarse.double() - features, -exponent)
    varying = h - h.mean(0)
    rows = moved.norm(dim=1) > LOST * h.norm(dim=1)
    columns = (moved - moved.mean(0)).norm(dim=0) > LOST * varying.norm(dim=0)
    lost = math.hypot(float(h[rows].norm()), float(varying[:, columns].norm()))
    return ldexp_up(FEATURE_SAFETY * 2.0**-29 * frobenius(moved) + lost, exponent)


def narrow_rounding(coarse: Tensor, features: Tensor, unit: float) -> float:
    """Estimate the same where the float64 copy casts to a narrower type inside: 16 u (2^24 |h_32 - h_64|_F + |h_64|_F).

    The measured error is scaled to the unit roundoff u of that type. Since both evaluations cast alike and may differ too little, the
    rounding of the features themselves is added.

    Args:
        coarse: see ``feature_rounding``.
        features: see ``feature_rounding``.
        unit: u, ``Narrowing.unit``.

    Returns:
        The estimate of the Frobenius norm.
    """
    return FEATURE_SAFETY * unit * (2.0**24 * float((coarse.double() - features).norm()) + float(features.norm()))


def _judge(
    features: Tensor, rank: int, sigma_min: Bounded, feature_error: float, same_inputs: SameInputs | None
) -> tuple[RankVerdict, str, bool]:
    """Return the verdict, its reason, and whether a refutation is about the present weights only."""
    n = len(features)
    if rank == n:
        return (
            "certified",
            f"sigma_min = {sigma_min.value:.3e} is above its rounding bound {sigma_min.value - sigma_min.lower:.1e}",
            False,
        )
    if n == 1:
        return "undecided", f"sigma_min = {sigma_min.value:.3e} is not above its rounding bound", False
    closest = closest_rows(features)
    pair = Pair(closest.first, closest.second, closest.distance.value)
    if (found := pair.refutes(feature_error, same_inputs)) is not None:
        return "refuted", found.reason(f"rank [h, 1] < n = {n} (at least {rank} is certified)"), found.at_these_weights
    bound = sigma_min.value - max(sigma_min.lower, 0.0) if sigma_min.lower > 0 else sigma_min.upper - sigma_min.value
    return (
        "undecided",
        (
            f"sigma_min = {sigma_min.value:.3e} is not above its rounding bound {bound:.1e} (rank at least {rank} of {n} is certified, "
            f"rounding inside the trunk allowed for: {feature_error:.1e}); the closest features are those of samples {pair.first} and "
            f"{pair.second}, at distance {pair.distance:.1e}; a sharper softplus or a wider last hidden layer raises sigma_min"
        ),
        False,
    )
