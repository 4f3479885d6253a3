"""Rounding inside the trunk: what it may do to features in float64, and whether rank n is beyond that of the run's own type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.trunk_rows import TrunkRows
from lightning_conv.expressivity import RankCertificate
from lightning_conv.expressivity.singular import certify_held, feature_rounding, narrow_rounding

STRIP = 4096  # samples that are read at a time
# The rounding of a row depends on its place in a batch and on the size of that, so another evaluation errs by other amounts, of the same
# size; the Frobenius norm is several times the spectral norm that counts.
PLACES = 2.0
# Relative residual up to which targets count as reached in float32: its square, in the loss, is one unit of rounding, and no output is off
# by half of the distance between two classes for up to 500,000 samples.
REACHED = 2.0**-11.5

CURE = "train with Trainer(precision='64-true')"


def allowance(coarse: Tensor, exact: Tensor, rows: TrunkRows) -> float:
    """Return the estimated effect of rounding inside the trunk on ``exact``, which was read from ``rows``.

    Args:
        coarse: The same features in float32.
        exact: Features in float64.
        rows: Where they were read, which saw whether something was cast to a narrower type.
    """
    if rows.narrowing is None:
        return feature_rounding(coarse, exact)
    return narrow_rounding(coarse, exact, rows.narrowing.unit)


def roundings(view: GuardView, rows: TrunkRows) -> tuple[float, float]:
    r"""Return ``allowance`` on all rows, and :math:`\|h_{32} - h\|_F`. All ranks call it together.

    Args:
        view: The run.
        rows: The features in float64.

    Cost: a pass in float32 and one in float64, strip by strip.
    """
    data, errors, apart = view.data, [0.0], [0.0]
    coarse = TrunkRows.of(data, view.network, view.head, torch.float32)
    for start in range(0, rows.samples, STRIP):
        exact, rounded = rows.rows(start, start + STRIP), coarse.rows(start, start + STRIP)
        errors.append(allowance(rounded, exact, rows))
        apart.append(float((rounded.double() - exact).norm()))
    return math.hypot(*errors), math.hypot(*apart)


def reached_in_the_run(
    found: RankCertificate, apart: float, again: Callable[[float], RankCertificate]
) -> RankCertificate:
    r"""Return a certificate of alignment, ``undecided`` if what it says of features in float64 is not shown for the run's in float32.

    Args:
        found: Certificate of the features in float64.
        apart: :math:`\|h_{32} - h\|_F`.
        again: Function that makes the certificate anew for an error of the features of this Frobenius norm.
    """
    if found.rank_lower < found.n and found.verdict != "certified":
        return found
    rough = again(PLACES * apart)
    residual = math.inf if rough.residual is None else rough.residual.upper
    found = replace(found, rank_lower=min(found.rank_lower, rough.rank_lower))
    if found.residual is None or residual <= REACHED:
        return found
    said = (
        f"of features as they are rounded in float32, in which the run computes, the last layer is only shown to reach the targets up to "
        f"{residual:.2g} of their norm; {CURE}"
    )
    wider = replace(found.residual, upper=max(found.residual.upper, residual))
    verdict = "undecided" if found.verdict == "certified" else found.verdict
    return replace(found, verdict=verdict, residual=wider, reason=f"{said}; in float64: {found.reason}")


def beyond_rounding(
    found: RankCertificate, apart: float, coarse: Tensor | None = None, *, bias: bool = True
) -> RankCertificate:
    r"""Return the certificate with what rounding in float32, in which the run computes the features, leaves of rank n.

    By Weyl's inequality :math:`\sigma_n([h_{32}, 1]) \ge \sigma_n([h, 1]) - \|h_{32} - h\|_F`; twice the difference that was
    measured counts as the most that another evaluation may differ by. Where sigma_min is within it, rank n is asked of the features in
    float32, as exact numbers, and ``rounding`` says that it holds for these; otherwise the certificate is ``undecided``.

    Args:
        found: Certificate of the features in float64.
        apart: :math:`\|h_{32} - h\|_F`.
        coarse: The features in float32; None: they are too many.
        bias: Whether the head trains a bias.
    """
    sigma, rounding = found.sigma_min, PLACES * apart
    if found.verdict != "certified" or sigma is None or found.rank_lower < found.n or sigma.lower > rounding:
        return found
    said = f"sigma_min >= {sigma.lower:.3g} is within the rounding of the features in float32, in which the run computes ({rounding:.2g})"
    if coarse is not None:
        rank = certify_held(coarse.double(), bias=bias).rank_lower
        if rank == found.n:
            return replace(found, rounding=rounding)
        said = f"{said}, and rank {rank} of {found.n} is certified for these"
    return replace(found, verdict="undecided", reason=f"{said}; {CURE}; in float64: {found.reason}")


def within_rounding(found: RankCertificate | None, *, varies: bool) -> str:
    """Return why rank n is not that of the features of every step; empty if it is.

    Args:
        found: Certificate of the switch.
        varies: Whether the features of a sample, in the run's precision, may be others in another step.
    """
    if found is None or not found.rounding or not varies or found.sigma_min is None:
        return ""
    return (
        f"sigma_min >= {found.sigma_min.lower:.3g} is within the rounding of the features in float32 ({found.rounding:.2g}), which "
        f"depends on a sample's place in its batch, so rank n is not shown to be that of every step; {CURE}"
    )
