"""Findings about what a network can reach: the loss that equal inputs force, and that a narrow last layer forces."""

from __future__ import annotations

import math

from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.fit.loss_floor import LossFloor
from lightning_conv.health.wording import counted, figure, listed, percent

MATTERS = 0.1
"""Share of the present loss from which on a forced loss is a warning."""

COLLAPSED = 0.5
"""Share of the rank that the shape of the features allows, below which they count as collapsed."""


def finding_of_floor(
    floor: LossFloor,
    *,
    loss: float | None = None,
    of: str = "the probe",
    what: str = "targets",
    step: int | None = None,
) -> Finding:
    """Judge the loss that equal inputs with unequal targets force.

    Args:
        floor: The floor; its conflicts are numbered as the samples of ``of``.
        loss: The present loss on the same samples; None: not known.
        of: Which samples, in words.
        what: What differs: ``"labels"`` or ``"targets"``.
        step: Step of the loss.

    Returns:
        ``warning``: the forced loss is at least ``MATTERS`` of the present one. ``notice``: it is less, or the loss is not known.
        ``ok``: there is no conflict.
    """
    level: Level = "ok"
    advice = ""
    if floor.conflicts:
        level = "notice" if loss is None or floor.forced < MATTERS * loss else "warning"
        first, number = floor.conflicts[0], len(floor.conflicts)
        pairs = all(len(each) == 2 for each in floor.conflicts)
        them = counted(number, f"such {'pair' if pairs else 'group'}")
        share = (
            ""
            if not loss or not math.isfinite(loss)
            else f", {percent(min(floor.value / loss, 1.0))} of what it is now"
        )
        says = (
            f"Samples {listed(first)} of {of} are equal and have different {what}; {them} {'keeps' if number == 1 else 'keep'} "
            f"the loss on {of} at {figure(floor.value)} or above{share}"
        )
        advice = f"Check the {what} of these samples; no network of these inputs has a smaller loss."
    else:
        says = f"No equal inputs with different {what} were found in {of}"
    return Finding.exact(
        name="loss_floor",
        level=level,
        sentence=f"{says}.",
        value=floor.value,
        limit=math.nan if loss is None else loss,
        step=step,
        advice=advice,
    )


def finding_of_width(
    width: int,
    samples: int,
    outputs: int,
    *,
    bias: bool = True,
    floor: float | None = None,
    loss: float | None = None,
    step: int | None = None,
) -> Finding:
    """Judge the number of features before the last layer.

    Args:
        width: Features of the last layer.
        samples: Samples that are to be fitted.
        outputs: Outputs of each, C.
        bias: Whether the last layer has a bias.
        floor: ``width_floor`` on the same samples; None: not known for this loss.
        loss: The present loss on them; None: not known.
        step: Step of the loss.

    Returns:
        ``warning``: the floor is at least ``MATTERS`` of the present loss. ``notice``: it is less, or there are fewer columns than
        outputs. ``ok``: the width forces nothing. Fewer columns than samples are usual, and no more than ``ok``.
    """
    columns = width + bias
    units, of_probe = counted(width, "feature"), f"the {counted(samples, 'sample')} of the probe"
    level: Level = "ok"
    advice = ""
    if floor is not None and floor > 0:
        level = "notice" if loss is None or floor < MATTERS * loss else "warning"
        share = "" if not loss or not math.isfinite(loss) else f", {percent(min(floor / loss, 1.0))} of what it is now"
        says = (
            f"The last layer has {units} for {counted(samples, 'sample')} with {counted(outputs, 'output')}; whatever the weights are, "
            f"this keeps the squared loss on them at {figure(floor)} or above{share}"
        )
        advice = f"Widen the last hidden layer to at least {min(samples, outputs)} features."
    elif columns < min(samples, outputs):
        level = "notice"
        says = (
            f"The last layer has {units} for {counted(outputs, 'output')}, so the outputs of all samples lie in a space of "
            f"{counted(columns, 'dimension')}"
        )
    elif columns < samples:
        says = f"The last layer has {units} for {of_probe}: it alone cannot fit every choice of targets; only layers before it could"
    else:
        says = f"The last layer has {units} for {of_probe}, enough to fit any targets of them if they are independent"
    value = math.nan if floor is None else floor
    return Finding(
        name="width",
        level=level,
        sentence=f"{says}.",
        value=value,
        lower=value,
        upper=math.inf if floor is not None else math.nan,
        limit=math.nan if loss is None else loss,
        step=step,
        advice=advice,
    )


def finding_of_rank(
    lower: int, upper: int, *, columns: int, samples: int, best: float | None = None, step: int | None = None
) -> Finding:
    """Judge the rank of the last features.

    Args:
        lower: Rank that is proven at least.
        upper: Rank at most; the number of columns or samples if nothing better is known.
        columns: Features with the column of ones of the bias.
        samples: Samples of the probe.
        best: Least loss that the last layer alone can reach on these features; None: not known.
        step: Step of the measurement.

    Returns:
        ``notice``: at most ``COLLAPSED`` of the rank that the shape allows is there. ``ok``: more, or it is not known.

    Raises:
        ValueError: Not 0 <= lower <= upper <= min(columns, samples).
    """
    full = min(columns, samples)
    if not 0 <= lower <= upper <= full:
        raise ValueError(f"lower, upper: {lower}, {upper}; need 0 <= lower <= upper <= {full}")
    level: Level = "ok"
    if upper <= COLLAPSED * full and upper < full:
        level = "notice"
        says = f"The last features have a rank of at most {upper} where {full} is possible: many units say the same"
    elif lower == samples:
        says = (
            f"The last features of all {samples} samples are independent, so the last layer alone can fit any targets"
        )
    elif upper < samples:
        says = f"The last features have a rank of at most {upper} for {samples} samples, so they do not fit every choice of targets"
    else:
        says = f"The rank of the last features is at least {lower} of {samples}; whether it is full is undecided"
    if best is not None and best > 0:
        says += f"; with these features frozen the loss is {figure(best)} or above"
    return Finding(
        name="rank",
        level=level,
        sentence=f"{says}.",
        value=float(lower),
        lower=float(lower),
        upper=float(upper),
        limit=float(samples),
        step=step,
    )
