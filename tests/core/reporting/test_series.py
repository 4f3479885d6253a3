"""Values by step in bounded memory: nothing is lost while there are few, and peaks stay when there are many."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_conv.reporting.series import MOST, Series


def test_few_values_stay_as_they_are():
    points = [(3 * k, math.sin(k)) for k in range(MOST)]
    series = Series().extend(points)
    assert list(zip(series.steps, series.values, strict=True)) == points
    assert series.width == 1


def test_a_million_steps_stay_within_the_bound_and_keep_both_extremes():
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(100_000)]
    values[31_415], values[77_777] = 50.0, -50.0
    series = Series().extend(enumerate(values))
    assert 500 < len(series) <= MOST
    assert max(zip(series.values, series.steps, strict=True)) == (50.0, 31_415)
    assert min(zip(series.values, series.steps, strict=True)) == (-50.0, 77_777)
    # Every interval has the smallest and the largest of its own values: a plain loop finds the same.
    width = series.width
    for begin in range(0, len(values) - width, 7 * width):
        kept = [v for s, v in zip(series.steps, series.values, strict=True) if begin <= s < begin + width]
        assert {min(kept), max(kept)} == {min(values[begin : begin + width]), max(values[begin : begin + width])}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), max_size=300), st.integers(4, 40), st.integers(0, 299))
def test_a_checkpoint_anywhere_changes_nothing(values, most, at):
    straight = Series(most).extend(enumerate(values))
    resumed = Series.from_state(Series(most).extend(enumerate(values[:at])).state_dict())
    resumed.extend(list(enumerate(values))[at:])
    assert resumed.steps == straight.steps
    assert str(resumed.values) == str(straight.values)
    assert len(straight) <= most
    assert straight.steps == sorted(straight.steps)


def test_missing_values_are_gaps_and_no_zeros():
    series = Series().extend([(0, 1.0), (1, math.inf), (2, math.nan), (3, 4.0)])
    assert series.values[0::3] == [1.0, 4.0]
    assert all(math.isnan(value) for value in series.values[1:3])


def test_a_run_that_is_resumed_replaces_what_lay_ahead():
    series = Series().extend((k, 0.0) for k in range(10))
    series.put(5, 1.0)
    assert (series.steps, series.values) == ([0, 1, 2, 3, 4, 5], [0.0] * 5 + [1.0])


def test_a_bound_without_room_for_both_ends_is_refused():
    with pytest.raises(ValueError, match="most: 3; need 4"):
        Series(3)
