"""L_H of the head in a run, and the largest step that is safe with it, as far as the certificate or the rule of the head knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_conv.callbacks.guard.head.training_loss import TrainingLoss
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.expressivity import RankCertificate
from lightning_conv.last_layer import HeadCurvature
from lightning_conv.linalg.eigenvalues.bounded import Bounded, divide
from lightning_conv.networks.head import Head


def known_curvature(
    plan: Mapping[str, Any], certificate: RankCertificate | None, head: Head, loss: TrainingLoss, data: TrainingSet
) -> Bounded | None:
    """L_H = (L_ell / n) sigma_max([h, 1])^2 of the mean loss; None where L_ell or sigma_max is not known, as for a sum over the batch.

    Args:
        plan: of the head's rule, which may have computed it.
        certificate: of the trunk; its sigma_max costs nothing.
        head: of the network.
        loss: of the training step.
        data: the training set, whose targets are read.
    """
    if (bounds := plan.get("curvature")) is not None:
        return Bounded(bounds[1], bounds[0], bounds[2], certified=True, method="head_curvature")
    if certificate is None or certificate.sigma_max is None or not head.last or loss.loss_fn is None:
        return None
    if getattr(loss.loss_fn, "reduction", "mean") != "mean":
        return None
    smoothness = loss.smoothness(data, head.module.out_features)
    return None if smoothness is None else HeadCurvature.of(certificate.sigma_max, smoothness, data.size).value


def largest_step(curvature: Bounded) -> float:
    """2 / L_H with L_H from above."""
    return divide(2.0, curvature.upper)


def beyond(rate: float | str, curvature: Bounded) -> str:
    """What to say of a learning rate of plain gradient descent that is surely above 2 / L_H; empty otherwise.

    Args:
        rate: of the head; a string where it is no plain gradient descent.
        curvature: L_H.
    """
    if isinstance(rate, str) or not curvature.lower > 0 or rate <= 2 / curvature.lower:
        return ""
    return (
        f"the learning rate {rate:.4g} of plain SGD is above 2 / L_H = {largest_step(curvature):.4g}, below which no full-batch step on "
        "the head raises the loss"
    )
