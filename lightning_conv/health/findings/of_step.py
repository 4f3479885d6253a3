"""Findings about the length of a step: the stability ratio, a rise of the loss and its cause, the noise of the gradient.

A ratio above 1 is usual in runs that end well, so it is never more than a notice by itself. Only a loss that has risen makes it a warning,
and one that is not finite or ``BLOWN`` times its start an alert.
"""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_conv.arguments import require_whole
from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.kernel.gradient_noise import MOST, GradientNoise, NoiseScale
from lightning_conv.health.step.course import BLOWN, LossCourse, StabilityCourse, StabilityReading
from lightning_conv.health.step.rise_cause import BEYOND, FAR, RiseCause, cause_of_rise
from lightning_conv.health.wording import counted, figure, percent

EDGE = 1.0
"""Stability ratio up to which a step is stable on the quadratic model of the loss."""

LONG = 2.0
"""Ratio above which a step is far too long."""

SAFE, SAFE_MOMENTUM = 0.2, 0.05
"""Ratio that an advised rate would have had, without and with momentum: the curvature grows afterwards (docs/health.md)."""

SERIOUS = 0.1
"""Loss over its start below which a rise is a notice only: the run has kept nearly all that it gained."""

FEW = 0.1
"""Share of the samples that is said to dominate the gradient if it carries most of it."""

FEWER = 8
"""Times that the probe's samples are more than a step's from which on it is said whose curvature the ratio is."""

CLEAR = 10.0
"""Factor between the batch and the noise scale from which on it is said."""


def finding_of_stability(
    course: StabilityCourse,
    loss: LossCourse | None = None,
    *,
    rate: float | None = None,
    safe: float = SAFE_MOMENTUM,
    cause: RiseCause | None = None,
) -> Finding:
    """Judge the stability ratio, together with the loss.

    Args:
        course: The ratios; their lower ends are Ritz values, their upper ends estimates.
        loss: The losses; None: not known, and nothing is said about a rise.
        rate: The learning rate, if the ratio is proportional to it and it is the same for all weights; the advice then names one.
        safe: Ratio that an advised rate is to have.
        cause: Of the rise; None: it is judged by the ratios alone.

    Returns:
        ``alert``: the loss has blown up after a step that was too long. ``warning``: it has risen after one. ``notice``: the same
        after most of the gain was kept, or a ratio above ``LONG`` with no rise. ``ok``: everything else.
    """
    if loss is not None:
        cause = cause_of_rise(loss, course) if cause is None else cause
        if cause is not None and cause.kind == "step" and cause.reading is not None:
            return _risen(course, loss, cause, cause.reading, rate, safe)
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


def of_small_batches(finding: Finding, samples: int, batch: int) -> Finding:
    """Add to a stability ratio that it is the probe's, where a step takes far fewer samples; any other finding is returned as it is.

    A batch of few samples has a curvature of its own, which is larger than that of the mean in some of them; nothing is known of it.

    Args:
        finding: The finding.
        samples: Samples of the probe.
        batch: Samples of an optimizer step.
    """
    if finding.name != "stability" or samples < FEWER * batch:
        return finding
    each = "single samples" if batch == 1 else f"batches of {batch}"
    return replace(
        finding,
        sentence=f"{finding.sentence} That is of {samples} samples together, not of {each}, whose curvature may be larger.",
    )


def _risen(
    course: StabilityCourse,
    loss: LossCourse,
    cause: RiseCause,
    reading: StabilityReading,
    rate: float | None,
    safe: float,
) -> Finding:
    blown = loss.fold == math.inf or loss.of_first >= BLOWN
    level: Level = "alert" if blown else "warning" if loss.of_first >= SERIOUS else "notice"
    factor = safe / reading.lower
    advice = f"Lower the learning rate by a factor of {figure(1 / factor)}"
    if rate is not None:
        when = "starts at" if reading.step == course.first.step else f"at step {reading.step} would have been"
        then = rate if reading.rate is None else reading.rate * cause.raised
        advice = f"Lower the learning rate: at lr {figure(then * factor)} the ratio {when} {safe:g}"
    how = f"while the step was {figure(reading.lower)} times too long for the curvature"
    if reading.lower <= BEYOND:
        how = f"without a leap, from a step of {figure(reading.lower)} of its limit on: the curvature has grown beyond it since"
    raised = f", and the rate was raised {figure(cause.raised)}-fold after it" if cause.raised > 1 else ""
    return _stability(
        reading,
        level,
        f"{_rise(loss)} {how} (step {reading.step}{raised}).",
        f"{advice}.",
    )


def finding_of_rise(
    loss: LossCourse,
    course: StabilityCourse | None = None,
    *,
    statistical: bool = False,
    cause: RiseCause | None = None,
) -> Finding | None:
    """Judge a rise of the loss that the step does not explain; None: it has not risen, or the step does explain it.

    Args:
        loss: The losses.
        course: The stability ratios; None: not known.
        statistical: Whether the ratio is that of a part of the data, as with mini-batches: the finding is then a notice at most.
        cause: Of the rise; None: it is judged by the ratios alone.

    Returns:
        ``warning``: the loss has leapt to at least its start after steps far from the edge. ``notice``: any other rise.
    """
    cause = cause_of_rise(loss, course) if cause is None else cause
    if cause is None or cause.kind == "step":
        return None
    level: Level = "notice"
    advice = ""
    if cause.kind == "not step":
        level = "warning" if loss.of_first >= 1 and not statistical else "notice"
        advice = "Look at the data, the labels and the numbers of the batches before that step."
    return Finding.exact(
        name="loss_rise",
        level=level,
        sentence=f"{_rise(loss)} {_besides(cause)}.",
        value=loss.fold,
        step=loss.since,
        advice=advice,
    )


def _besides(cause: RiseCause) -> str:
    """Return what is known of the cause of a rise, in words."""
    if cause.reading is None:
        return "and the stability ratio before it is not known, so the cause is open"
    lower, upper = cause.reading.lower, cause.reading.upper
    size = f"{figure(lower)} of its limit"
    leap = (
        f"the loss leapt {'' if cause.leap == math.inf else f'{figure(cause.leap)}-fold '}in one step"
        if cause.leap
        else ""
    )
    if cause.kind == "not step":
        return f"while the step was only {size}, and {leap}, so the step is not too long for the curvature"
    if lower > EDGE:
        but = f"but {leap}" if leap else "as in many runs that are well"
        return f"while the step was {figure(lower)} times its limit, {but}, so the cause is open"
    if upper < FAR:
        return (
            f"while the step was {size} at step {cause.reading.step}, the last reading before it, so the cause is open"
        )
    return f"while the step was between {figure(lower)} and about {figure(upper)} of its limit, so the cause is open"


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
        TypeError: ``batch`` is no whole number.
        ValueError: ``batch`` is below 1.
    """
    require_whole("batch", batch, least=1)
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
    )


def _scale_in_words(scale: NoiseScale) -> str:
    if not math.isfinite(scale.upper):
        return f"at least {figure(scale.lower)}"
    return f"about {figure(scale.value)} ({figure(scale.lower)} to {figure(scale.upper)})"


def _rise(loss: LossCourse) -> str:
    if not math.isfinite(loss.now):
        return f"The loss rose from step {loss.since} on and is not finite"
    return f"The loss rose {figure(loss.fold)}-fold by step {loss.step} (its least was {figure(loss.smallest)}, at step {loss.at})"


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
    )
