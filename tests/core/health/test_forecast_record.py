"""A forecast is shown with the errors of its predecessors, or not at all."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_conv.health.kernel.forecast_record import KEPT, LEAST, RECENT, ForecastRecord, relative_error


def follow(record, losses, forecast, every=10):
    """Measure every ten steps and predict the next two measurements."""
    for number, loss in enumerate(losses):
        record.compare(every * number, loss)
        predicted = {every * (number + k): forecast(number, k) for k in (1, 2)}
        record.keep(every * number, loss, predicted)


HALVED = [0.5**number for number in range(12)]


def test_no_forecast_without_a_past():
    record = ForecastRecord()
    follow(record, HALVED[:LEAST], lambda n, k: 0.5 ** (n + k))
    assert record.shown() is None
    follow_one = ForecastRecord()
    follow(follow_one, HALVED[: LEAST + 1], lambda n, k: 0.5 ** (n + k))
    shown = follow_one.shown()
    assert shown is not None
    assert shown.steps == (10 * (LEAST + 1),)  # two measurements ahead was compared once less
    assert shown.compared == (LEAST,)


def test_it_comes_with_the_median_error_of_the_forecasts_as_far_ahead():
    record = ForecastRecord()
    follow(record, HALVED, lambda n, k: (1 + 0.1 * k) * 0.5 ** (n + k))
    shown = record.shown()
    assert shown.made == 110
    assert shown.steps == (120, 130)
    assert shown.errors == pytest.approx((0.1, 0.2))
    assert shown.losses == pytest.approx((1.1 * 0.5**12, 1.2 * 0.5**13))
    assert shown.compared == (RECENT, RECENT)


@pytest.mark.parametrize(
    "forecast",
    [
        lambda n, k: 1.6 * 0.5 ** (n + k),  # off by 60 %
        lambda n, k: 3.0 * 0.5**n,  # worse than no change
        lambda n, k: math.inf,
        lambda n, k: math.nan,
    ],
)
def test_what_was_of_no_use_is_not_shown(forecast):
    record = ForecastRecord()
    follow(record, HALVED, forecast)
    assert record.shown() is None
    assert len(record.comparisons) == 21


def test_a_forecast_that_is_no_better_than_no_change_is_not_shown():
    record = ForecastRecord()
    follow(record, [1.0 + 0.01 * (n % 2) for n in range(12)], lambda n, k: 0.9)
    assert max(record.errors()) < 0.15
    assert record.shown() is None


def test_an_old_failure_is_forgotten_and_a_new_one_is_not():
    late, early = ForecastRecord(), ForecastRecord()
    losses = [0.5**number for number in range(40)]
    follow(early, losses, lambda n, k: 0.5 ** (n + k) * (9 if n < 10 else 1))
    follow(late, losses, lambda n, k: 0.5 ** (n + k) * (9 if n > 28 else 1))
    assert early.shown() is not None
    assert late.shown() is None


def test_errors_by_share_of_the_run():
    record = ForecastRecord(total=100)
    follow(record, HALVED[:11], lambda n, k: 0.5 ** (n + k) * (2 if n < 3 else 1))
    assert record.errors(until=0.29) == pytest.approx([1.0] * 6)
    assert record.errors(since=0.3) == pytest.approx([0.0] * len(record.errors(since=0.3)))
    assert len(record.errors(since=0.3)) == 13
    assert len(record.errors(place=0)) == 10
    unknown = ForecastRecord()
    follow(unknown, HALVED[:11], lambda n, k: 0.5 ** (n + k))
    assert len(unknown.errors()) == 19
    assert unknown.errors(since=0.0) == []


def test_steps_that_are_not_measured_are_dropped():
    record = ForecastRecord()
    record.keep(0, 1.0, {10: 0.5, 20: 0.25})
    assert record.compare(15, 0.4) == []
    (found,) = record.compare(20, 0.5)
    assert (found.made, found.place, found.error, found.error_unchanged) == (0, 1, 0.5, 1.0)
    assert record.compare(20, 0.5) == []


def test_resumed_is_uninterrupted():
    def forecast(n, k):
        return 1.05 * 0.5 ** (n + k)

    whole, first, second = ForecastRecord(110), ForecastRecord(110), ForecastRecord()
    follow(whole, HALVED, forecast)
    follow(first, HALVED[:7], forecast)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for number in range(7, 12):
        second.compare(10 * number, HALVED[number])
        second.keep(10 * number, HALVED[number], {10 * (number + k): forecast(number, k) for k in (1, 2)})
    assert second.shown() == whole.shown()
    assert second.state_dict() == whole.state_dict()


def test_the_record_is_bounded():
    record = ForecastRecord(total=10**6)
    for step in range(KEPT + 100):
        record.compare(step, 1.0)
        record.keep(step, 1.0, {step + 1: 1.0})
    assert len(record.comparisons) == KEPT
    assert record.comparisons[0].step == 100


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_the_relative_error_has_no_unit(predicted, real):
    assert relative_error(1024 * predicted, 1024 * real) == relative_error(predicted, real)
    assert relative_error(predicted, real) == abs(predicted - real) / real
    assert relative_error(predicted, math.nan) == relative_error(math.inf, real) == math.inf
    assert relative_error(real, 0.0) == math.inf
    assert relative_error(0.0, 0.0) == 0.0


def test_nothing_is_predicted_after_the_end():
    record = ForecastRecord(total=110)
    follow(record, HALVED[:11], lambda n, k: 0.5 ** (n + k))
    assert record.shown().steps == (110,)
    record.compare(110, HALVED[11])
    record.keep(110, HALVED[11], {120: 0.5**12})
    assert record.shown() is None


def test_a_forecast_of_the_past_is_refused():
    with pytest.raises(ValueError, match="need steps after 10"):
        ForecastRecord().keep(10, 1.0, {10: 0.5})


@pytest.mark.parametrize(("total", "error"), [("a", TypeError), (1.5, TypeError), (-1, ValueError)])
def test_a_length_of_the_run_that_is_none_is_refused(total, error):
    with pytest.raises(error, match=r"total: .*; need a whole number of at least 0"):
        ForecastRecord(total)
