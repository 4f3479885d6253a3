"""``cause_of_rise``: whether a rise of the loss is the step's doing, as far as that can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lightning_conv.health.step.course import BLOWN, LossCourse, StabilityCourse, StabilityReading

Kind: TypeAlias = Literal["step", "not step", "open"]

BEYOND, FAR_BEYOND = 1.1, 3.0
"""Stability ratios from which on a step counts as the cause of a rise to ``BLOWN`` times the start, and of any rise."""

FAR = 0.5
"""Stability ratio below which the edge is far."""

MUCH = 2.0
"""Factor by which the rate was raised since a reading from which on the reading clears no step."""

GRADUAL = 10.0
"""Largest leap of a loss that has blown up step by step: after a step that was not far from the edge, that is the step's doing."""

CALM = 2
"""Readings in a row below ``FAR`` after which a step is not the cause of a leap: the curvature grows fast at the start."""

REACH = 100.0
"""Largest leap of the loss in one step, over the square of the stability ratio, that is put down to the step."""


@dataclass(frozen=True)
class RiseCause:
    """What is known of the cause of a rise.

    Attributes:
        kind: ``"step"``: the steps before it were too long. ``"not step"``: they were far from that, and the loss leapt. ``"open"``:
            neither can be said.
        reading: The last stability ratio before it, for the rate that was in force at the rise; None: none is known.
        raised: Factor by which the rate was raised since that reading.
        leap: ``LossCourse.leap`` of the training losses, if it belongs to this rise.
    """

    kind: Kind
    reading: StabilityReading | None
    raised: float = 1.0
    leap: float | None = None


def cause_of_rise(
    loss: LossCourse, ratios: StabilityCourse | None, training: LossCourse | None = None, *, rate: float | None = None
) -> RiseCause | None:
    r"""Judge the cause of a rise by the stability ratios before it and by how the training loss rose.

    On a quadratic a step of ratio r multiplies the loss by at most :math:`(h - 1)^2`, where h is r times the limit of the optimizer's rule
    (2 for plain descent, 3.8 for a momentum of 0.9). A leap of more than ``REACH`` r^2 in one step is not put down to it.

    Args:
        loss: The losses in which the rise was found.
        ratios: The stability ratios; None: not known.
        training: The training losses of every step; None: not known.
        rate: The largest learning rate of the optimizer now; None: not known.

    Returns:
        The cause; None: the loss has not risen.
    """
    if loss.since is None:
        return None
    before = None if ratios is None else ratios.before(loss)
    if ratios is None or before is None:
        return RiseCause("open", None)
    leap = None
    if training is not None and training.leapt is not None and before.step < training.leapt <= loss.step:
        leap = training.leap
    later = [each.rate for each in ratios.readings if each.step > before.step][:1]
    rates = [each for each in (*later, rate) if each is not None]
    cause, raised = _at_rate(before, rates)
    blown = loss.fold == math.inf or loss.of_first >= BLOWN
    if cause.lower > (BEYOND if blown else FAR_BEYOND):
        far = leap is not None and leap > REACH * cause.lower**2
        return RiseCause("open" if far else "step", cause, raised, leap)
    if training is not None and blown and cause.upper > FAR and (leap is None or leap <= GRADUAL):
        return RiseCause("step", cause, raised, leap)
    calm = [_at_rate(each, rates)[0].upper for each in ratios.readings if each.step <= before.step][-CALM:]
    quiet = len(calm) == CALM and max(calm) < FAR and raised < MUCH
    return RiseCause("not step" if quiet and leap is not None else "open", cause, raised, leap)


def _at_rate(reading: StabilityReading, rates: list[float]) -> tuple[StabilityReading, float]:
    """Return a reading for the largest of the later rates, and by how much that was raised."""
    if not reading.rate or not rates:
        return reading, 1.0
    factor = max(max(rates) / reading.rate, 1.0)
    if not math.isfinite(factor):
        return reading, 1.0
    return replace(reading, lower=reading.lower * factor, upper=reading.upper * factor), factor
