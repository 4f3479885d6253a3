"""``RankCertificate``, the result of every certification method, and the checks that all methods share."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
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
    rows_here: int = 0  # "distinct": number of rows whose rank was looked at at these weights
    rank_here: int = 0  # lower bound of their rank
    narrow: str | None = None
    """Where the features were not computed in float64; empty: nowhere; None: the computation was not watched."""
    rounding: float = 0.0
    """Where sigma_min is within it, the rounding of the features in float32, in which the run computes them, in the Frobenius norm: rank n
    then holds for the features in float64 and for one evaluation in float32, not for every one. 0: it is beyond, or not asked for."""
    at_these_weights: bool = False
    """Whether a refutation is about the present weights only: the features of two samples coincide, but it was not shown
    that the samples do. Other weights may then give rank n. If False, ``refuted`` is true whatever the weights."""


def watched(certificate: RankCertificate, narrow: str | None, *, allowed_for: bool = True) -> RankCertificate:
    """Return the certificate with what a ``NarrowWatch`` saw while its features were computed.

    If the network casts to a narrower type, nothing about the features is proven, since the allowance for that type is an estimate:
    the verdict is ``undecided``, the certified rank is 0, and the bounds are not certified. What does not depend on the numbers,
    that the layer is too narrow or that two samples are equal, remains ``refuted``.

    Args:
        certificate: certificate of the features, with ``feature_error`` for the narrow type.
        narrow: what was seen: the place; empty: no cast; None: not watched.
        allowed_for: whether ``feature_error`` allows for the narrow type; if not, the bounds are void.
    """
    if not narrow:
        return replace(certificate, narrow=narrow)
    certificate = replace(
        certificate,
        narrow=narrow,
        rank_lower=0,
        sigma_min=_estimated(certificate.sigma_min, allowed_for),
        sigma_max=_estimated(certificate.sigma_max, allowed_for),
        distance=_estimated(certificate.distance, allowed_for),
        residual=_estimated(certificate.residual, allowed_for),
    )
    if certificate.verdict == "refuted" and certificate.method != "alignment":
        reason = re.sub(r" \([^()]* is certified\)", "", certificate.reason)
        return replace(certificate, reason=f"{reason}; no rank is certified, because {narrow}")
    allowance = f" (allowed for: {certificate.feature_error:.1e}, an estimate)" if allowed_for else ""
    reason = (
        f"{narrow}, so the features are rounded in that type{allowance} and nothing is certified; remove the cast, or let the network "
        "compute in the type of its input"
    )
    return replace(certificate, verdict="undecided", reason=reason)


def _estimated(bounded: Bounded | None, allowed_for: bool) -> Bounded | None:
    if (
        bounded is None or bounded.lower == bounded.upper
    ):  # a fact about the shape, such as the value 0 for fewer columns than rows
        return bounded
    if not allowed_for:
        bounded = replace(bounded, lower=0.0, upper=float("inf"))
    return replace(bounded, certified=False)


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


def require_error(feature_error: float) -> None:
    """Check that ``feature_error`` is a norm.

    Raises:
        ValueError: it is negative or NaN.
    """
    if not feature_error >= 0:
        raise ValueError(f"feature_error: {feature_error}; need a Frobenius norm, 0 or more")


def require_features(features: Tensor, first: int = 0, name: str = "features") -> None:
    """Check that ``features`` is a non-empty finite matrix.

    Args:
        features: one row per sample.
        first: number of the first sample, for the message.
        name: name of the argument, for the message.

    Raises:
        ValueError: it is empty, not a matrix, or has NaN or infinite entries.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(
            f"{name}: shape {tuple(features.shape)}; need a non-empty matrix (n samples, one row for each)"
        )
    if bool(torch.isfinite(features.sum())):
        return
    bad = (~torch.isfinite(features)).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{name}: sample {first + int(bad[0])} (and {len(bad) - 1} more) has NaN or infinite features; the network or its data "
            "overflow"
        )
