"""A finding about the length of an update whose optimizer has no known rule: it rests on the loss along the update.

The loss along one update is no limit of stability: with momentum, or with the noise of mini-batches, an update raises the loss of the probe
at times in runs that end well. So the finding is a notice at most.
"""

from __future__ import annotations

import math

from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.findings.of_step import EDGE, LONG
from lightning_conv.health.step.course import StabilityCourse, StabilityReading
from lightning_conv.health.step.critical_sharpness import CriticalFactor
from lightning_conv.health.step.rise_cause import FAR
from lightning_conv.health.wording import figure, page_of


def reading_of(found: CriticalFactor, step: int) -> StabilityReading:
    """Return the length of an update over the critical one, 1 / c, with the ends of what is known.

    Args:
        found: The critical factor c.
        step: Step of the measurement.
    """
    lower = 1 / found.upper if math.isfinite(found.upper) else 0.0
    return StabilityReading(step, lower, 1 / found.lower if found.lower else math.inf)


def finding_of_update(course: StabilityCourse, *, optimizer: str, own: bool = False) -> Finding:
    """Judge the length of the updates of an optimizer without a known rule.

    Args:
        course: 1 / c of the critical factors so far (``reading_of``).
        optimizer: Name of the optimizer's class.
        own: Whether the updates are steps that the run has made, with the gradients of their own batches, and not those that the optimizer
            would make of the gradient of the probe.

    Returns:
        ``notice``: the update is more than ``LONG`` times the critical one. ``ok``: everything else. The value is 1 / c.
    """
    now = course.now
    known = now.lower if math.isinf(now.upper) or not now.lower else math.sqrt(now.lower * now.upper)
    critical = "the length from which on it raises the loss of the probe"
    trend = f" and {course.trend}" if len(course.recent) > 1 else ""
    since = "" if course.since is None else f", above 1 since step {course.since}"
    level: Level = "ok"
    if math.isinf(now.upper):
        level = "notice"
        says = f"raises the loss of the probe, even shortened to 1/{figure(now.lower)} of its length{since}, as momentum does at times"
    elif now.lower > LONG:
        level = "notice"
        says = f"is {figure(known)} times {critical}{trend}{since}"
    elif now.lower > EDGE:
        says = f"is {figure(known)} times {critical}{trend}{since}, which is usual in training"
    elif not now.lower:
        says = f"does not raise the loss of the probe, even at {figure(1 / now.upper)} times its length"
    else:
        far = f": far from it, by a factor of {figure(1 / known)}" if now.upper < FAR else ""
        says = f"is {figure(known)} times {critical}{trend}{far}"
    subject, alone = "The update", "its update alone"
    if own:
        subject, alone = f"The step after step {now.step}", "this step alone, which has the gradient of its own batch"
    return Finding(
        name="stability",
        level=level,
        sentence=f"{subject} {says}; no limit of stability is known for {optimizer}, so this rests on the loss along {alone}.",
        value=known,
        lower=now.lower,
        upper=now.upper,
        limit=EDGE,
        step=now.step,
        page=page_of("critical_sharpness"),
    )
