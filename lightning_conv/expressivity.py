"""The expressivity condition, certified: ``certify_expressivity``.

After Kawaguchi & Sun 2021 (2104.05785): with last hidden features h (n x m_H), the condition is rank [h, 1] = n, the
bias column included. Features that are real-analytic in the trunk's weights satisfy it at almost every weight as soon
as they do at one, so one certified rank proves it for this architecture and these data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.kernels.precision import gamma
from lightning_conv.spectrum import Bounded, LinAlgError

RankVerdict: TypeAlias = Literal["certified", "undecided", "refuted"]

FEATURE_SAFETY = 16.0


@dataclass(frozen=True)
class RankCertificate:
    """What is proven about the rank of [h, 1] on n samples."""

    verdict: RankVerdict  # of the claim rank = n
    rank_lower: int  # the rank is at least this
    n: int
    width: int  # m_H
    sigma_min: Bounded  # n-th singular value of [h, 1] (0 where there are fewer than n)
    sigma_max: Bounded
    feature_error: float  # allowance for the rounding inside the trunk, Frobenius norm
    reason: str
    seconds: float


def certify_expressivity(
    features: Tensor,
    *,
    bias: bool = True,
    recompute: Callable[[], Tensor] | None = None,
    feature_error: float = 0.0,
    same_inputs: Callable[[int, int], bool] | None = None,
) -> RankCertificate:
    r"""Certify rank [h, 1] = n from the singular values of the features in float64.

    With computed U, s, V and E = [h, 1] - U diag(s) V^T, the exact singular values obey (Weyl; Ostrowski for the loss
    of orthogonality)

    .. math:: |\sigma_i - s_i| \le \|E\|_F + s_i (\|U^TU - I\|_F + \|V^TV - I\|_F) + \text{feature\_error},

    rounding errors of E and of the defects included. The rank is at least the number of lower bounds above zero.

    Args:
        features: h, shape (n, m_H), one row a training sample, the inputs of the last linear layer. Float64, or float32
            with ``recompute``.
        bias: whether the last layer has a trainable bias; without one the matrix is h alone.
        recompute: gives the same features from a float64 copy of the trunk; called when ``features`` are not float64,
            because a float32 rank says nothing (rounding fills every direction to about 1e-7 of the largest).
        feature_error: Frobenius norm of what rounding inside the trunk may have changed in float64 features. With
            ``recompute`` it is estimated as 16 * 2^-29 |h_32 - h_64|_F, the measured float32 error scaled by the ratio
            of the unit roundoffs, with a safety factor of 16. Zero: the certificate is about the matrix as given.
        same_inputs: tells whether samples i and j are the same input; asked for the two closest rows when rank n is not
            certified, because equal features that went through rounding prove nothing, while equal inputs do.

    Returns:
        ``certified``: rank n is proven (up to ``feature_error``). ``refuted``: it cannot be n: too narrow, or two equal
        samples, named. ``undecided``: sigma_min is not above its rounding bound; the two closest rows are named.

    Raises:
        ValueError: empty, not a matrix, NaN or infinity.
        TypeError: float32 features without ``recompute``.

    Cost: one singular value decomposition, about 20 n^2 m_H flops, memory 4 n m_H float64 numbers.

    Example:
        >>> import torch
        >>> certificate = certify_expressivity(torch.eye(4, 3, dtype=torch.float64))  # 3 features and the bias column
        >>> certificate.verdict, certificate.rank_lower
        ('certified', 4)
    """
    start = time.perf_counter()
    require_features(features)
    if features.dtype != torch.float64:
        if recompute is None:
            raise TypeError(
                f"features: {features.dtype}; a rank needs float64 features from a float64 copy of the trunk: pass recompute=, or use "
                "last_hidden_features(..., dtype=torch.float64)"
            )
        coarse, features = features, recompute()
        require_features(features)
        if features.dtype != torch.float64 or features.shape != coarse.shape:
            raise TypeError(
                f"recompute: returned {features.dtype} of shape {tuple(features.shape)}; need float64 of {tuple(coarse.shape)}"
            )
        feature_error = feature_rounding(coarse, features)
    n, width = features.shape
    augmented = torch.cat([features, features.new_ones(n, 1)], 1) if bias else features
    try:
        values, absolute, relative = _singular_values(augmented)
    except LinAlgError as error:
        nothing = Bounded(0.0, 0.0, float("inf"), certified=False, method="none")
        reason = f"the singular value decomposition did not converge ({error})"
        return RankCertificate(
            "undecided", 0, n, width, nothing, nothing, feature_error, reason, time.perf_counter() - start
        )

    radii = absolute + relative * values + feature_error
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
    return RankCertificate(
        verdict, rank, n, width, sigma_min, sigma_max, feature_error, reason, time.perf_counter() - start
    )


def feature_rounding(coarse: Tensor, features: Tensor) -> float:
    """Estimate of what rounding inside the trunk changed in float64 features, Frobenius norm: 16 * 2^-29 |h_32 - h_64|_F.

    Args:
        coarse: h as the float32 trunk gives it, (n, m_H).
        features: the same from its float64 copy.
    """
    return FEATURE_SAFETY * 2.0**-29 * float((coarse.double() - features).norm())


def too_narrow(samples: int, width: int, *, bias: bool = True) -> str | None:
    """Why ``width`` features cannot have rank n = ``samples``, and what to do; None if they can."""
    columns = width + bias
    if columns >= samples:
        return None
    name = "m_H + 1" if bias else "m_H (no trainable bias)"
    return (
        f"too narrow: {name} = {columns} < n = {samples}, so the rank cannot reach n; widen the last hidden layer to at least "
        f"{samples - bias}, or train on at most {columns} samples"
    )


def _judge(
    features: Tensor,
    rank: int,
    sigma_min: Bounded,
    feature_error: float,
    same_inputs: Callable[[int, int], bool] | None,
) -> tuple[RankVerdict, str]:
    n = len(features)
    if rank == n:
        return (
            "certified",
            f"sigma_min = {sigma_min.value:.3e} is above its rounding bound {sigma_min.value - sigma_min.lower:.1e}",
        )
    i, j, distance = closest_rows(features)
    consequence = f"so rank [h, 1] < n = {n} (at least {rank} is certified); remove duplicate samples"
    if distance == 0 and feature_error == 0:
        return "refuted", f"samples {i} and {j} have equal features, {consequence}"
    # Equal inputs may come out of the trunk a little apart: batches of other sizes round otherwise.
    if distance <= 2 * feature_error and same_inputs is not None and same_inputs(i, j):
        return "refuted", f"samples {i} and {j} are equal, {consequence}"
    bound = sigma_min.value - max(sigma_min.lower, 0.0) if sigma_min.lower > 0 else sigma_min.upper - sigma_min.value
    return "undecided", (
        f"sigma_min = {sigma_min.value:.3e} is not above its rounding bound {bound:.1e} (rank at least {rank} of {n} is certified, "
        f"rounding inside the trunk allowed for: {feature_error:.1e}); the closest features are those of samples {i} and {j}, at "
        f"distance {distance:.1e}; a sharper softplus or a wider last hidden layer raises sigma_min"
    )


def closest_rows(matrix: Tensor, block: int = 256) -> tuple[int, int, float]:
    """The two closest rows i < j and their Euclidean distance, by differences. Cost O(n^2 m), memory O(block n)."""
    best = (0, 0, float("inf"))
    for start in range(0, len(matrix), block):
        rows = matrix[start : start + block]
        distances = torch.cdist(rows, matrix[start:], compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(rows), device=matrix.device)
        distances[own[:, None] >= torch.arange(distances.shape[1], device=matrix.device)] = float("inf")
        smallest = int(distances.argmin())
        row, column = divmod(smallest, distances.shape[1])
        distance = float(distances[row, column])
        if distance < best[2]:
            best = start + row, start + column, distance
    return best


def _singular_values(matrix: Tensor) -> tuple[Tensor, float, float]:
    """Descending singular values s and (a, b) such that |sigma_i - s_i| <= a + b s_i, proven."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    count = len(values)
    residual = float((matrix - (left * values) @ right).norm())
    defects = [left.T @ left, right @ right.T]
    for defect in defects:
        defect.diagonal().sub_(1)
    squares = left.square().sum(0), right.square().sum(1)
    sizes = (squares[0] * squares[1]).sqrt()
    slack = gamma(max(matrix.shape) + 3, torch.float64)
    sums = 1 + gamma(matrix.numel() + 3, torch.float64)  # the rounding of the norms and sums themselves
    absolute = (residual + slack * float((values * sizes).sum() + matrix.norm())) * sums
    relative = sum(
        float(d.norm()) + slack * (float(s.sum()) + count**0.5) for d, s in zip(defects, squares, strict=True)
    )
    return values, absolute, relative * sums


def _bounded(value: float, radius: float, proven: bool) -> Bounded:
    method = "residual bound of the float64 SVD" + ("" if proven else " + estimated rounding inside the trunk")
    return Bounded(value, max(value - radius, 0.0), value + radius, certified=proven, method=method)


def require_features(features: Tensor) -> None:
    """Refuse what is no matrix of features.

    Raises:
        ValueError: empty, not a matrix, NaN or infinity.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features: shape {tuple(features.shape)}; need a non-empty matrix (n samples, m_H features)")
    bad = (~torch.isfinite(features)).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"features: sample {int(bad[0])} (and {len(bad) - 1} more) has NaN or infinite features; the network or its data overflow"
        )
