"""L_H of the head in a run, and the largest step that is safe with it, as far as the certificate or the rule of the head knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.expressivity import RankCertificate
from lightning_conv.last_layer import HeadCurvature
from lightning_conv.linalg.eigenvalues.bounded import Bounded, divide


def known_curvature(plan: Mapping[str, Any], certificate: RankCertificate | None, view: GuardView) -> Bounded | None:
    """Return L_H = (L_ell / n) sigma_max([h, 1])^2 of the mean loss; None where L_ell or sigma_max is not known.

    Args:
        plan: Memory of the head's rule, which may have computed it.
        certificate: Certificate of the trunk, whose sigma_max costs nothing.
        view: The run, whose targets are read.
    """
    if (bounds := plan.get("curvature")) is not None:
        return Bounded(bounds[1], bounds[0], bounds[2], certified=True, method="head_curvature")
    loss = view.loss
    if certificate is None or certificate.sigma_max is None or not view.head.last or loss.loss_fn is None:
        return None
    smoothness = loss.smoothness() if loss.kind.averaged else None
    return None if smoothness is None else HeadCurvature.of(certificate.sigma_max, smoothness, view.data.size).value


def largest_step(curvature: Bounded) -> float:
    """Return 2 / L_H with L_H from above.

    Args:
        curvature: L_H.
    """
    return divide(2.0, curvature.upper)


def beyond(rate: float | None, curvature: Bounded) -> str:
    """Return what to say of a learning rate of plain gradient descent that is surely above 2 / L_H; empty otherwise.

    Args:
        rate: Learning rate of the head; None where its steps are not plain gradient descent.
        curvature: L_H.
    """
    if rate is None or not curvature.lower > 0 or rate <= 2 / curvature.lower:
        return ""
    return (
        f"the learning rate {rate:.4g} of plain SGD is above 2 / L_H = {largest_step(curvature):.4g}, below which no full-batch step on "
        "the head raises the loss"
    )
