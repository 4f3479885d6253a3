"""The step is named as the cause of a rise only where ratios, rates and the way in which the loss rose agree."""

from __future__ import annotations

import math

import pytest

from lightning_conv.health.findings.of_losses import course_of_rise, findings_of_losses
from lightning_conv.health.step.course import LossCourse, StabilityCourse, StabilityReading
from lightning_conv.health.step.rise_cause import cause_of_rise


def losses(*series, begin=0):
    course = LossCourse.begin(begin, series[0])
    for step, loss in enumerate(series[1:], begin + 1):
        course = course.then(step, loss)
    return course


def ratios(*rows):
    course = None
    for step, ratio, rate in rows:
        reading = StabilityReading(step, ratio, 1.02 * ratio, rate)
        course = StabilityCourse.begin(reading) if course is None else course.then(reading)
    return course


CALM = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
LEAP = losses(*CALM, 30.0, 40.0)
GROWTH = losses(*CALM, 0.8, 1.6, 3.2, 6.4, 13.0, 26.0)
GENTLE = losses(*CALM, 0.8, 1.6, 3.2)


def test_a_value_that_is_not_finite_is_a_leap_unless_the_loss_had_blown_up():
    noise = [1.0, *[0.9, 0.3, 0.8, 0.25, 0.9] * 5]
    course = ratios((0, 0.7, 1.0), (20, 0.7, 1.0))
    broken = losses(*noise, math.nan)
    assert (broken.leap, broken.leapt) == (math.inf, len(noise))
    assert cause_of_rise(broken, course, broken).kind == "open"
    grown = losses(*noise, *(2.5**k for k in range(1, 9)), math.nan)
    assert grown.leap is None or grown.leap < 10
    assert cause_of_rise(grown, course, grown).kind == "step"


@pytest.mark.parametrize(
    ("rows", "loss", "kind"),
    [
        ([(0, 0.2, 1.0), (4, 0.2, 1.0)], LEAP, "not step"),
        ([(4, 0.2, 1.0)], LEAP, "open"),  # the curvature grows fast at the start of a run
        ([(0, 0.7, 1.0), (4, 0.2, 1.0)], LEAP, "open"),
        ([(0, 0.2, 1.0), (4, 0.2, 1.0)], GENTLE, "open"),  # it may have grown since
        ([(0, 0.2, 1.0), (4, 0.7, 1.0)], LEAP, "open"),
        ([(0, 0.2, 1.0), (4, 0.7, 1.0)], GROWTH, "step"),  # blown up step by step
        ([(0, 0.2, 1.0), (4, 0.7, 1.0)], GENTLE, "open"),
        ([(0, 0.2, 1.0), (4, 0.2, 1.0)], GROWTH, "open"),
        ([(0, 0.2, 1.0), (4, 1.3, 1.0)], GENTLE, "open"),  # runs that are well hover there
        ([(0, 0.2, 1.0), (4, 1.3, 1.0)], GROWTH, "step"),
        ([(0, 0.2, 1.0), (4, 3.1, 1.0)], GENTLE, "step"),
        ([(0, 0.2, 1.0), (4, 1.3, 1.0)], losses(*CALM, 1e4), "open"),  # no such step leaps 20,000-fold
        ([(0, 0.2, 1.0), (4, 0.2, 0.1)], LEAP, "step"),  # 2 at the rate of now, ten times that of the reading
        ([(0, 0.2, 1.0), (4, 0.2, 2.0)], LEAP, "not step"),  # the rate was lowered
        (
            [(0, 0.02, 0.1), (4, 0.02, 0.1)],
            LEAP,
            "open",
        ),  # the rate was raised tenfold: a reading of before clears no step
    ],
)
def test_the_cause_of_a_rise(rows, loss, kind):
    assert cause_of_rise(loss, ratios(*rows), loss, rate=1.0).kind == kind


def test_a_rate_that_was_raised_is_seen_in_the_reading_after_the_rise_as_well():
    course = ratios((0, 0.1, 0.5), (4, 0.1, 0.5), (9, 0.3, 10.0))
    cause = cause_of_rise(LEAP, course, LEAP)
    assert (cause.kind, cause.raised, cause.reading.lower) == ("step", 20.0, pytest.approx(2.0))
    (found,) = findings_of_losses(course, LEAP, LEAP, rate=10.0, largest_rate=10.0, safe=0.2)
    assert found.sentence.endswith(
        "2 times too long for the curvature (step 4, and the rate was raised 20-fold after it)."
    )
    assert found.advice == "Lower the learning rate: at lr 1 the ratio at step 4 would have been 0.2."


def test_without_a_rise_there_is_no_cause_and_without_readings_it_is_open():
    assert cause_of_rise(losses(1.0, 0.9), ratios((0, 5.0, 1.0)), None) is None
    assert cause_of_rise(LEAP, None, LEAP).kind == "open"
    assert cause_of_rise(LEAP, ratios((6, 0.1, 1.0)), LEAP).reading is None  # measured after the rise


def test_training_losses_are_looked_at_once_they_have_blown_up():
    well, blown = losses(1.0, 0.9), losses(1.0, 30.0)
    assert course_of_rise(well, losses(1.0, 5.0)) is well
    assert course_of_rise(well, blown) is blown
    assert course_of_rise(blown, losses(1.0, 40.0)) is blown
    broken = losses(1.0, math.nan)
    assert course_of_rise(blown, broken) is broken
    assert course_of_rise(None, None) is None
    assert findings_of_losses(None, None, None) == []
