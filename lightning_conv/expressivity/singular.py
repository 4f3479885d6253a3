"""Rank certificates from the singular values of features that fit into memory."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import Cost, RankCertificate, RankVerdict, require_features, too_narrow
from lightning_conv.expressivity.closest import closest_rows
from lightning_conv.expressivity.decomposition import decompose, decomposition_bytes, decomposition_seconds
from lightning_conv.expressivity.equal import Pair, SameInputs
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.dense import LinAlgError

FEATURE_SAFETY = 16.0


def certify_held(
    features: Tensor,
    *,
    bias: bool = True,
    feature_error: float = 0.0,
    same_inputs: SameInputs | None = None,
) -> RankCertificate:
    r"""Certify rank [h, 1] = n from the singular values of float64 features.

    Each lies within the radius of ``decompose`` and ``feature_error`` of the computed one (Weyl). The rank is at least the number of
    lower bounds above zero.

    Args:
        features: h, (n, m_H), float64.
        bias: see ``certify_expressivity``.
        feature_error: see ``certify_expressivity``.
        same_inputs: see ``certify_expressivity``.

    Raises:
        ValueError: empty, not a matrix, NaN or infinity.

    Cost: one singular value decomposition, about 20 n^2 m_H flops; memory see ``decomposition_bytes``.
    """
    start = time.perf_counter()
    require_features(features)
    n, width = features.shape
    augmented = torch.cat([features, features.new_ones(n, 1)], 1) if bias else features

    flops, predicted = 20.0 * n * width * min(n, width), decomposition_seconds(n, width)

    def cost() -> Cost:
        return Cost(time.perf_counter() - start, flops, decomposition_bytes(n, width), predicted=predicted)

    try:
        decomposition = decompose(augmented)
    except LinAlgError as error:
        nothing = Bounded(0.0, 0.0, float("inf"), certified=False, method="none")
        reason = f"the singular value decomposition did not converge ({error})"
        return RankCertificate("undecided", 0, n, width, "singular", reason, cost(), nothing, nothing, feature_error)
    values, radii = decomposition.values, decomposition.radii + feature_error
    rank = int((values - radii > 0).sum())
    proven = feature_error == 0
    sigma_max = _bounded(float(values[0]), float(radii[0]), proven)
    # Weyl holds for the n-th singular value of a matrix with fewer columns too, where it is exactly zero.
    narrow = too_narrow(n, width, bias=bias)
    sigma_min = _bounded(0.0, 0.0, True) if narrow else _bounded(float(values[n - 1]), float(radii[n - 1]), proven)
    if narrow:
        verdict: RankVerdict = "refuted"
        reason = f"{narrow} (rank at least {rank} is certified)"
    else:
        verdict, reason = _judge(features, rank, sigma_min, feature_error, same_inputs)
    return RankCertificate(verdict, rank, n, width, "singular", reason, cost(), sigma_min, sigma_max, feature_error)


def feature_rounding(coarse: Tensor, features: Tensor) -> float:
    """Estimate of what rounding inside the trunk changed in float64 features, Frobenius norm: 16 * 2^-29 |h_32 - h_64|_F.

    Args:
        coarse: h as the float32 trunk gives it, (n, m_H).
        features: the same from its float64 copy.
    """
    return FEATURE_SAFETY * 2.0**-29 * float((coarse.double() - features).norm())


def _judge(
    features: Tensor,
    rank: int,
    sigma_min: Bounded,
    feature_error: float,
    same_inputs: SameInputs | None,
) -> tuple[RankVerdict, str]:
    n = len(features)
    if rank == n:
        return (
            "certified",
            f"sigma_min = {sigma_min.value:.3e} is above its rounding bound {sigma_min.value - sigma_min.lower:.1e}",
        )
    closest = closest_rows(features)
    pair = Pair(closest.first, closest.second, closest.distance.value)
    if (equal := pair.refutes(feature_error, same_inputs)) is not None:
        return "refuted", f"{equal}, so rank [h, 1] < n = {n} (at least {rank} is certified); remove duplicate samples"
    bound = sigma_min.value - max(sigma_min.lower, 0.0) if sigma_min.lower > 0 else sigma_min.upper - sigma_min.value
    return "undecided", (
        f"sigma_min = {sigma_min.value:.3e} is not above its rounding bound {bound:.1e} (rank at least {rank} of {n} is certified, "
        f"rounding inside the trunk allowed for: {feature_error:.1e}); the closest features are those of samples {pair.first} and "
        f"{pair.second}, at distance {pair.distance:.1e}; a sharper softplus or a wider last hidden layer raises sigma_min"
    )


def _bounded(value: float, radius: float, proven: bool) -> Bounded:
    method = "residual bound of the float64 SVD" + ("" if proven else " + estimated rounding inside the trunk")
    return Bounded(value, max(value - radius, 0.0), value + radius, certified=proven, method=method)
