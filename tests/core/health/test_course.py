"""The course of a run remembers what the whole series would tell."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_conv.health.step.course import RECENT, RISEN, LossCourse, StabilityCourse, StabilityReading


def losses(series):
    course = LossCourse.begin(0, series[0])
    for step, loss in enumerate(series[1:], 1):
        course = course.then(step, loss)
    return course


def ratios(series, every=1, spread=0.0):
    readings = [StabilityReading(every * step, each, each * (1 + spread)) for step, each in enumerate(series)]
    course = StabilityCourse.begin(readings[0])
    for reading in readings[1:]:
        course = course.then(reading)
    return course


@given(st.lists(st.one_of(st.floats(1e-3, 1e3), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=30))
def test_it_is_what_the_whole_series_says(series):
    course = losses(series)
    finite = [each for each in series if math.isfinite(each)]
    assert math.isfinite(course.smallest) == bool(finite)
    if not finite:
        assert course.since == 0
        return
    assert course.smallest == min(finite)
    assert course.at == series.index(min(finite))
    since = None
    for step in range(len(series) - 1, -1, -1):
        before = [each for each in series[: step + 1] if math.isfinite(each)]
        if math.isfinite(series[step]) and series[step] < RISEN * min(before):
            break
        since = step
    assert course.since == since
    assert course.fold == (series[-1] / min(finite) if math.isfinite(series[-1]) else math.inf)


def test_a_loss_that_is_not_positive_has_no_fold():
    course = losses([1.0, -1.0, 5.0])
    assert math.isnan(course.fold)
    assert course.since is None
    assert course.of_first == 5.0


def test_since_when_the_ratio_is_above_one():
    assert ratios([0.5, 1.1, 0.9, 1.2, 1.3]).since == 3
    assert ratios([1.5, 1.1]).since == 0
    assert ratios([1.5, 1.0]).since is None


def test_the_trend_is_clear_of_the_intervals():
    assert ratios([0.1, 0.2, 0.3, 0.4, 0.5]).trend == "rising"
    assert ratios([0.5, 0.4, 0.3]).trend == "falling"
    assert ratios([0.5, 0.52, 0.53], spread=0.1).trend == "steady"
    assert ratios([0.5]).trend == "steady"


def test_the_reading_that_may_explain_a_rise():
    course = ratios([0.5, 0.7, 1.4, 0.2, 9.0], every=4)  # at 0, 4, 8, 12, 16
    rise = losses([5, 4, 3, 2, 1, 1.1, 1.2, 1.5, 2, 2.5, 3.5, 4, 5])  # smallest at 4, risen since 10
    assert (rise.at, rise.since) == (4, 10)
    assert course.before(rise).step == 8
    assert course.before(losses([1.0, 0.9])) is None
    assert ratios([2.0]).before(losses([1.0, 30.0])).step == 0
    assert ratios([2.0, 9.0]).before(losses([1.0, 30.0])).step == 0  # at 1 are the weights after the rise
    assert ratios([0.1 * k for k in range(40)]).before(losses([1.0, 30.0])).step == 0  # the first one is kept


def test_a_leap_exceeds_all_losses_of_the_window():
    calm = [1.0, 1.2, 0.9] * 8
    assert losses(calm).leap is None
    leapt = losses([*calm, 6.0, 7.0, 50.0])
    assert (leapt.leap, leapt.leapt, leapt.since) == (6.0 / 1.2, len(calm), len(calm))
    gradual = losses([*calm, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert gradual.leap is None
    assert gradual.since is not None
    assert losses([*calm, math.nan]).leap == math.inf
    assert losses([*calm, 6.0, 0.5]).leap is None  # a new smallest loss ends the rise
    assert losses([*calm, 0.2, *[1.1] * 20, 6.0, 1.0]).leap is None  # and so does a loss that is back
    assert losses([*calm, 0.2, *[1.1] * 20, 6.0, 5.0]).leap == 6.0 / 1.1


def test_the_window_goes_on_from_one_look_to_the_next():
    values = [1.0, 3.0, *[1.1] * 10, 8.0]  # the 3 is still among the losses before the 8
    at_once = LossCourse.begin(0, values[0]).through(values, len(values) - 1)
    assert at_once == losses(values)
    assert at_once.leap is not None
    assert at_once.leapt == 1


def test_readings_are_bounded_but_for_the_first():
    course = ratios([0.01 * (number + 1) for number in range(100)])
    assert len(course.recent) == RECENT
    assert course.first.step == 0
    assert course.now.step == 99
    assert all(later.step > earlier.step for earlier, later in pairwise(course.recent))


def test_resumed_is_uninterrupted():
    series = [0.5, 0.9, 1.2, 1.3, 1.4]
    half = StabilityCourse.from_state(json.loads(json.dumps(ratios(series[:3]).state_dict())))
    for step in (3, 4):
        half = half.then(StabilityReading(step, series[step], series[step]))
    assert half == ratios(series)


def test_time_does_not_go_back():
    with pytest.raises(ValueError, match="after 1"):
        losses([1.0, 2.0]).then(1, 1.0)
    with pytest.raises(ValueError, match="after 1"):
        ratios([1.0, 2.0]).then(StabilityReading(1, 1.0, 1.0))
    with pytest.raises(ValueError, match="lower <= upper"):
        StabilityReading(0, 2.0, 1.0)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_many_losses_at_once_give_the_course_of_one_after_the_other(seed, batches):
    generator = random.Random(seed)
    losses = [generator.choice([0.1, 0.5, 1.0, 2.0, 4.0, math.nan, math.inf, -1.0]) for _ in range(30)]
    step = 100
    each = course = LossCourse.begin(step - 40, 1.0)
    seen = each.step
    for number, loss in enumerate(losses):
        at = step - (len(losses) - 1 - number) // batches
        if at > seen:
            each, seen = each.then(at, loss), at
    assert repr(course.through(losses, step, batches)) == repr(each)  # NaN is not equal to itself


def test_a_step_of_no_batch_is_refused():
    with pytest.raises(ValueError, match="batches: 0; need at least 1 in a step"):
        LossCourse.begin(0, 1.0).through([1.0], 3, 0)
