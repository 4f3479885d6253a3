"""``findings_of_losses``: what the losses of a run say, with the stability ratios beside them."""

from __future__ import annotations

import math

from lightning_conv.health.finding import LEVELS, Finding
from lightning_conv.health.findings.of_step import SAFE_MOMENTUM, finding_of_rise, finding_of_stability
from lightning_conv.health.step.above_start import AboveStart, finding_of_above_start
from lightning_conv.health.step.course import BLOWN, LossCourse, StabilityCourse
from lightning_conv.health.step.progress import WINDOW, Progress
from lightning_conv.health.step.rise_cause import cause_of_rise
from lightning_conv.health.wording import figure


def course_of_rise(probe: LossCourse | None, training: LossCourse | None) -> LossCourse | None:
    """Return the losses in which a rise is looked for: those of the probe, or of training where they have blown up since.

    Args:
        probe: The losses of the probe; None: not known.
        training: Those of the training step; None: none was seen.
    """
    if training is None or not (training.fold == math.inf or training.of_first >= BLOWN):
        return probe
    known = probe is not None and probe.since is not None and training.fold < math.inf
    return probe if known else training


def findings_of_losses(
    ratios: StabilityCourse | None,
    probe: LossCourse | None,
    training: LossCourse | None,
    *,
    rate: float | None = None,
    largest_rate: float | None = None,
    safe: float = SAFE_MOMENTUM,
    statistical: bool = False,
    above: AboveStart | None = None,
) -> list[Finding]:
    """Judge the stability ratio and a rise of the loss together.

    Args:
        ratios: The stability ratios; None: none is known, and nothing is said of them.
        probe: The losses of the probe; None: not known.
        training: Those of the training step; None: none was seen.
        rate: As in ``finding_of_stability``.
        largest_rate: Largest learning rate of the optimizer now; None: not known.
        safe: As in ``finding_of_stability``.
        statistical: As in ``finding_of_rise``.
        above: Since when the loss of the probe has not been below its start; None: not known, or nothing is to be said of it.
    """
    course = course_of_rise(probe, training)
    cause = None if course is None else cause_of_rise(course, ratios, training, rate=largest_rate)
    found = [] if ratios is None else [finding_of_stability(ratios, course, rate=rate, safe=safe, cause=cause)]
    rise = None if course is None else finding_of_rise(course, ratios, statistical=statistical, cause=cause)
    if above is not None and not any(each.severity >= LEVELS.index("warning") for each in found):
        rise = finding_of_above_start(above, rise) or rise
    return found if rise is None else [*found, rise]


def finding_of_progress(progress: Progress) -> Finding | None:
    """Say that the training loss has not fallen; None: it has.

    Args:
        progress: The losses at both ends.

    Returns:
        A ``notice``: there are losses that need not fall, such as those of adversarial networks.
    """
    if progress.has_fallen:
        return None
    return Finding.exact(
        name="progress",
        level="notice",
        sentence=f"The training loss has not fallen: it was {figure(progress.start)} at the start and is {figure(progress.now)} now, and "
        f"the last {WINDOW} batches scatter by {figure(progress.scatter)}.",
        value=progress.now,
        limit=progress.start,
        step=progress.step,
        advice="Look at the learning rate, which may be far too small or too large, and at whether the inputs tell the targets.",
    )
