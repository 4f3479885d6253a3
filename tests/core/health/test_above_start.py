"""A loss that is not below its start for long is a warning, whatever its cause; one that dips below it is none."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_conv.health.findings.of_losses import findings_of_losses
from lightning_conv.health.step.above_start import COUNT, SHARE, STEPS, AboveStart, finding_of_above_start
from lightning_conv.health.step.course import LossCourse, StabilityCourse, StabilityReading


def above(*losses, every=10, begin=0):
    course = AboveStart.begin(begin, losses[0])
    for number, loss in enumerate(losses[1:], 1):
        course = course.then(begin + every * number, loss)
    return course


@pytest.mark.parametrize(
    ("losses", "every", "lasts"),
    [
        ([1.0, 3.0, 2.0, 1.5, 1.2, 1.1], 10, True),
        ([1.0, 3.0, 2.0, 1.5, 1.2], 10, False),  # four measurements
        ([1.0, 3.0, 2.0, 1.5, 1.2, 0.9], 10, False),
        ([1.0, 3.0, 2.0, 1.5, 1.2, 1.1, 0.9, 1.1], 10, False),  # it was below since
        ([1.0, 3.0, 2.0, 1.5, 1.2, 1.1], 5, False),  # 20 steps
        ([1.0, *[0.5] * 10, *[1.5] * 5], 10, False),  # 40 of 150 steps
        ([1.0, *[0.5] * 10, *[1.5] * 12], 10, True),
        ([1.0, *[math.nan] * 5], 10, True),
        ([-1.0, *[2.0] * 9], 10, False),  # of a loss that may be negative nothing is said
        ([0.0, *[2.0] * 9], 10, False),
        ([math.nan, *[2.0] * 9], 10, False),
    ],
)
def test_it_lasts_over_measurements_and_steps_and_a_share_of_the_run(losses, every, lasts):
    course = above(*losses, every=every)
    assert course.lasts is lasts
    assert (finding_of_above_start(course, None) is not None) is lasts


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60), st.integers(1, 30))
def test_it_is_what_a_slow_look_at_all_losses_says(losses, every):
    course = above(*losses, every=every)
    now = len(losses) - 1
    below = [number for number, loss in enumerate(losses) if number == 0 or loss < losses[0]][-1]
    count, span = now - below, every * (now - below - 1)
    assert course.lasts is (count >= COUNT and span >= STEPS and span >= SHARE * every * now)


def test_it_is_said_with_its_numbers_and_since_when():
    found = finding_of_above_start(above(2.0, 6.0, 5.0, 4.0, 3.0, 2.5), None)
    assert found.sentence == (
        "The loss of the probe is 1.25 times what it was at the start, and in the last 5 measurements, since step 10, it was never below "
        "its start."
    )
    assert (found.level, found.value, found.limit, found.step, found.advice) == ("warning", 1.25, 1.0, 10, "")
    broken = finding_of_above_start(above(2.0, *[math.nan] * 5), None)
    assert broken.sentence.startswith("The loss of the probe is not finite, and in the last 5 measurements")


def test_a_rise_with_an_open_cause_becomes_a_warning_and_a_step_that_is_named_stays():
    losses = [1.0, 30.0, 6.0, 5.0, 4.0, 4.0]
    probe = LossCourse.begin(0, losses[0])
    for number, loss in enumerate(losses[1:], 1):
        probe = probe.then(10 * number, loss)
    late = StabilityCourse.begin(StabilityReading(10, 0.3, 0.31))
    (_, plain), (_, found) = (findings_of_losses(late, probe, None, above=each) for each in (None, above(*losses)))
    assert (plain.level, found.level) == ("notice", "warning")
    assert found.sentence.startswith(plain.sentence)
    assert "since step 10, it was never below its start" in found.sentence
    early = StabilityCourse.begin(StabilityReading(0, 5.0, 5.1))
    (stability,) = findings_of_losses(early, probe, None, above=above(*losses))
    assert stability.level == "warning"
    assert "never below its start" not in stability.sentence


def test_a_step_that_is_not_later_is_refused():
    with pytest.raises(ValueError, match="need one after 10"):
        above(1.0, 2.0).then(10, 3.0)
