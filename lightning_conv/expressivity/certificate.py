"""``RankCertificate``, the result of every certification method, and the checks that all methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.linalg.eigenvalues.bounded import Bounded

RankVerdict: TypeAlias = Literal["certified", "undecided", "refuted"]
RankMethod: TypeAlias = Literal["singular", "distinct", "alignment"]


@dataclass(frozen=True)
class Cost:
    """Cost of a certificate."""

    seconds: float
    flops: float
    bytes: float  # planned maximum of memory
    disk_bytes: float = 0.0
    predicted: float = 0.0  # seconds, as predicted before the computation


@dataclass(frozen=True)
class RankCertificate:
    """Proven facts about the rank of [h, 1] on n samples, h being the last hidden features."""

    verdict: RankVerdict
    """Of the claim rank = n; for "distinct" of this claim for almost every weight of the wide layer; for "alignment" of the claim
    that the features reach the targets."""
    rank_lower: int
    """Lower bound of the rank: at these weights; with "distinct" for almost every weight of the wide layer."""
    n: int
    width: int  # m_H
    method: RankMethod
    reason: str
    cost: Cost
    sigma_min: Bounded | None = None
    """N-th singular value of [h, 1], 0 if there are fewer than n; None: not computed."""
    sigma_max: Bounded | None = None
    feature_error: float = 0.0  # allowance for the rounding inside the trunk, Frobenius norm
    distance: Bounded | None = None  # "distinct": distance of the closest two samples
    residual: Bounded | None = None  # "alignment": |(I - P) Y| / |Y|


def too_narrow(samples: int, width: int, *, bias: bool = True) -> str | None:
    """Explain why ``width`` features cannot have rank n = ``samples``, with a hint; return None if they can."""
    columns = width + bias
    if columns >= samples:
        return None
    name = "m_H + 1" if bias else "m_H (no trainable bias)"
    return (
        f"too narrow: {name} = {columns} < n = {samples}, so the rank cannot reach n; widen the last hidden layer to at least "
        f"{samples - bias}, or train on at most {columns} samples"
    )


def require_features(features: Tensor, first: int = 0) -> None:
    """Check that ``features`` is a non-empty finite matrix.

    Args:
        features: one row per sample.
        first: number of the first sample, for the message.

    Raises:
        ValueError: it is empty, not a matrix, or has NaN or infinite entries.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features: shape {tuple(features.shape)}; need a non-empty matrix (n samples, m_H features)")
    if bool(torch.isfinite(features.sum())):
        return
    bad = (~torch.isfinite(features)).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"features: sample {first + int(bad[0])} (and {len(bad) - 1} more) has NaN or infinite features; the network or its data "
            "overflow"
        )
