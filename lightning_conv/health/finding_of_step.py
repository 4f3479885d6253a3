"""Findings about the length of a step: the stability ratio, a rise of the loss and its cause, the noise of the gradient.

A ratio above 1 is usual in runs that end well, so it is never more than a notice by itself. Only a loss that has risen makes it a warning,
and one that is not finite or ``BLOWN`` times its start an alert.
"""

from __future__ import annotations

import math

from lightning_conv.health.course import LossCourse, StabilityCourse, StabilityReading
from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.gradient_noise import MOST, GradientNoise, NoiseScale
from lightning_conv.health.wording import counted, figure, page_of, percent

EDGE = 1.0
"""Stability ratio up to which a step is stable on the quadratic model of the loss."""

FAR, LONG = 0.5, 2.0
"""Ratios below which the edge is far, and above which a step is far too long."""

SAFE = 0.8
"""Ratio that an advised rate would have had."""

BLOWN = 20.0
"""Loss over its start from which on the run counts as blown up."""

SERIOUS = 0.1
"""Loss over its start below which a rise is a notice only: the run has kept nearly all that it gained."""

FEW = 0.1
"""Share of the samples that is said to dominate the gradient if it carries most of it."""

CLEAR = 10.0
"""Factor between the batch and the noise scale from which on it is said."""


def finding_of_stability(
    course: StabilityCourse, loss: LossCourse | None = None, *, rate: float | None = None
) -> Finding:
    """Judge the stability ratio, together with the loss.

    Args:
        course: The ratios; their lower ends are Ritz values, their upper ends estimates.
        loss: The losses; None: not known, and nothing is said about a rise.
        rate: The learning rate, if the ratio is proportional to it and it is the same for all weights; the advice then names one.

    Returns:
        ``alert``: the loss has blown up after a step above the edge. ``warning``: it has risen after one. ``notice``: the same after
        most of the gain was kept, or a ratio above ``LONG`` with no rise. ``ok``: everything else.
    """
    cause = None if loss is None else course.before(loss)
    if loss is not None and cause is not None and cause.lower > EDGE:
        return _risen(course, loss, cause, rate)
    now = course.now
    since = "" if course.since is None else f", above 1 since step {course.since}"
    trend = f" and {course.trend}" if len(course.recent) > 1 else ""
    level: Level = "ok"
    if now.lower > LONG:
        level = "notice"
        calm = "; the loss has not risen" if loss is not None and loss.since is None else ""
        says = f"{figure(now.lower)} times its limit for the curvature{trend}{since}{calm}"
    elif now.lower > EDGE:
        says = (
            f"at the edge of stability, {figure(now.lower)} times its limit{trend}{since}, which is usual in training"
        )
    elif now.upper <= 0:
        says = "far from the edge of stability, since the loss has no curvature"
    elif now.upper < FAR:
        says = f"{figure(now.lower)} of its limit{trend}: far from the edge of stability, by a factor of {figure(1 / now.upper)}"
    else:
        says = (
            f"{figure(now.lower)} of its limit{trend} (at most about {figure(now.upper)}), near the edge of stability"
        )
    return _stability(now, level, f"The step is {says}.", "")


def _risen(course: StabilityCourse, loss: LossCourse, cause: StabilityReading, rate: float | None) -> Finding:
    blown = loss.fold == math.inf or loss.of_first >= BLOWN
    level: Level = "alert" if blown else "warning" if loss.of_first >= SERIOUS else "notice"
    factor = SAFE / cause.lower
    advice = f"Lower the learning rate by a factor of {figure(1 / factor)}"
    if rate is not None:
        when = "starts at" if cause == course.first else f"at step {cause.step} would have been"
        advice = f"Lower the learning rate: at lr {figure(rate * factor)} the ratio {when} {SAFE:g}"
    return _stability(
        cause,
        level,
        f"{_rise(loss)} while the step was {figure(cause.lower)} times too long for the curvature (step {cause.step}).",
        f"{advice}.",
    )


def finding_of_rise(
    loss: LossCourse, course: StabilityCourse | None = None, *, statistical: bool = False
) -> Finding | None:
    """Judge a rise of the loss that the step does not explain; None: it has not risen, or the step does explain it.

    Args:
        loss: The losses.
        course: The stability ratios; None: not known.
        statistical: Whether the ratio is that of a part of the data, as with mini-batches: the finding is then a notice at most.

    Returns:
        ``warning``: the loss has risen to at least its start after steps far from the edge. ``notice``: any other rise.
    """
    if loss.since is None:
        return None
    cause = None if course is None else course.before(loss)
    if cause is not None and cause.lower > EDGE:
        return None
    level: Level = "notice"
    if cause is not None and cause.upper < FAR:
        level = "warning" if loss.of_first >= 1 and not statistical else "notice"
        says = (
            f"while the step was only {figure(cause.lower)} of its limit, so the step is not too long for the curvature"
        )
        advice = "Look at the data, the labels and the numbers of the batches before that step."
    elif cause is not None:
        says = f"while the step was between {figure(cause.lower)} and about {figure(cause.upper)} of its limit, so the cause is open"
        advice = ""
    else:
        says, advice = "and the stability ratio before it is not known, so the cause is open", ""
    return Finding(
        name="loss_rise",
        level=level,
        sentence=f"{_rise(loss)} {says}.",
        value=loss.fold,
        lower=loss.fold,
        upper=loss.fold,
        step=loss.since,
        advice=advice,
        page=page_of("loss_rise"),
    )


def finding_of_noise(
    noise: GradientNoise, scale: NoiseScale, *, batch: int, training_samples: int | None = None, step: int | None = None
) -> Finding:
    """Judge the noise of the gradient against the batch.

    Args:
        noise: Of the samples of the probe.
        scale: The simple noise scale with its ends.
        batch: Samples in a step, of all devices and accumulated batches together.
        training_samples: Samples of the training set; None: not known. A batch of all of them has no noise of sampling.
        step: Step of the measurement.

    Returns:
        A ``notice`` if the batch is clear of the noise scale by ``CLEAR``, if few samples carry the gradient, or if all gradients are
        zero; otherwise ``ok``. That the mean gradient is not told from the noise is usual where the samples are fitted.

    Raises:
        ValueError: ``batch`` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch: {batch}; need at least 1")
    level: Level = "notice"
    about = _scale_in_words(scale)
    advice = ""
    if noise.zeros == noise.samples:
        says = f"The gradients of all {noise.samples} samples are zero, so nothing is trained by them"
    elif training_samples is not None and batch >= training_samples:
        level, says = "ok", "Every step sees all training samples, so its gradient has no noise of sampling"
    elif scale.lower == math.inf:
        level, says = "ok", f"The mean gradient is not told from the noise of the {noise.samples} samples of the probe"
    elif batch * CLEAR < scale.lower:
        says = f"The batch of {batch:,} is far below the noise scale of {about}: steps are mostly noise"
        advice = "If steps are cheap to enlarge, a larger batch saves steps."
    elif batch > CLEAR * scale.upper:
        says = f"The batch of {batch:,} is far above the noise scale of {about}: more samples per step add little"
        advice = "A smaller batch saves computation."
    elif 0 < noise.carriers <= FEW * noise.samples:
        says = f"{counted(noise.carriers, 'sample')} of {noise.samples} carry {percent(MOST)} of the squared gradient norms"
        says = says.replace("1 sample of", "One sample of").replace(
            " carry", " carries" if noise.carriers == 1 else " carry"
        )
        advice = "Look at these samples and their labels."
    else:
        where = "below" if batch < scale.lower else "above" if batch > scale.upper else "in the range of"
        level, says = "ok", f"The batch of {batch:,} is {where} the noise scale of {about}"
    return Finding(
        name="gradient_noise",
        level=level,
        sentence=f"{says}.",
        value=scale.value if scale.lower <= scale.value <= scale.upper else math.nan,
        lower=scale.lower,
        upper=scale.upper,
        limit=float(batch),
        step=step,
        advice=advice,
        page=page_of("gradient_noise"),
    )


def _scale_in_words(scale: NoiseScale) -> str:
    if not math.isfinite(scale.upper):
        return f"at least {figure(scale.lower)}"
    return f"about {figure(scale.value)} ({figure(scale.lower)} to {figure(scale.upper)})"


def _rise(loss: LossCourse) -> str:
    if not math.isfinite(loss.now):
        return f"The loss rose from step {loss.since} on and is not finite"
    return f"The loss rose {figure(loss.fold)}-fold by step {loss.step} (above {figure(loss.smallest)} since step {loss.since})"


def _stability(reading: StabilityReading, level: Level, sentence: str, advice: str) -> Finding:
    return Finding(
        name="stability",
        level=level,
        sentence=sentence,
        value=reading.lower,
        lower=reading.lower,
        upper=reading.upper,
        limit=EDGE,
        step=reading.step,
        advice=advice,
        page=page_of("stability"),
    )
