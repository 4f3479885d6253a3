"""A finding about a frozen trunk: how small the loss can become while the last layer alone is trained."""

from __future__ import annotations

import math

from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.findings.of_fit import MATTERS
from lightning_conv.health.fit.head_floor import HeadFloor
from lightning_conv.health.wording import figure, percent


def finding_of_head(floor: HeadFloor, *, loss: float, step: int | None = None) -> Finding:
    """Judge the least loss that the last layer can reach on the features of a frozen trunk.

    A trunk is frozen on purpose, and a run that ends well ends at this loss: so this is never more than a notice.

    Args:
        floor: The least loss, on the probe.
        loss: The present loss on the same features.
        step: Step of the loss.

    Returns:
        ``notice``: the least loss is at least ``MATTERS`` of the present one. ``ok``: it is less.
    """
    level: Level = "ok"
    advice = ""
    if floor.lower > 0 and floor.lower >= MATTERS * loss:
        level = "notice"
        far = f" (proven for weights of a norm of at most {figure(floor.radius)})"
        whatever = "" if math.isinf(floor.radius) else far
        rest = percent(min(floor.lower / loss, 1.0))
        says = (
            "Only the last layer is trained: with the layers before it as they are, no last layer has a loss below "
            f"{figure(floor.lower)} on the probe{whatever}; the present one is {figure(loss)}, and {rest} of it cannot "
            "go away"
        )
        advice = "Train layers before the last one as well, if this loss is too large."
    else:
        says = (
            f"Only the last layer is trained: it can bring the loss on the probe, which is {figure(loss)}, to {figure(floor.upper)} or "
            "below with the layers before it as they are"
        )
    return Finding(
        name="frozen_trunk",
        level=level,
        sentence=f"{says}.",
        value=floor.lower,
        lower=floor.lower,
        upper=floor.upper,
        limit=loss,
        step=step,
        advice=advice,
    )
