"""The time budget holds whatever a measurement costs."""

from __future__ import annotations

import math
import re

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_conv.callbacks.run import schedule as module
from lightning_conv.callbacks.run.schedule import Schedule


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def real_limits(monkeypatch):
    monkeypatch.setattr(module, "FIRST_SECONDS", 1.2)
    monkeypatch.setattr(module, "SHORT_RUN_SECONDS", 2.0)
    monkeypatch.setattr(module, "LATER_BESIDE", 1.0)
    monkeypatch.setattr(module, "SECONDS_OF_A_STEP", 0.0)


@pytest.fixture
def free_hooks(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_OF_A_STEP", 0.0)


@pytest.mark.parametrize("cost", [0.01, 0.5, 5.0])
def test_measurements_after_the_first_stay_within_the_share_of_wall_time(clock, free_hooks, cost):
    schedule = Schedule(None, 0.03)
    schedule.begin(0)
    clock[0] += 10 * cost  # the first one is always taken, with its set-up
    schedule.expect(cost)
    schedule.spend(0, 10 * cost)
    spent, count = 0.0, 0
    for step in range(1, 100_000):
        clock[0] += 0.01
        if schedule.due(step):
            clock[0] += cost
            spent, count = spent + cost, count + 1
            schedule.note(step, 0.0)
            schedule.spend(step, cost)
        assert spent <= 0.03 * clock[0] + 1e-9
    assert count == pytest.approx(0.03 * clock[0] / cost, abs=2.5)  # and use it up, but for the last one


def run(clock, *, seconds, first, kernel, beside, extra=0.0):
    """Run a schedule as a fit does; return the number of measurements and the seconds that they took.

    ``extra`` is what a part takes that may be left out.
    """
    schedule = Schedule(None, 0.03)

    def measure(step, taken):
        clock[0] += taken
        schedule.expect(kernel)
        schedule.note(step, beside)
        schedule.spend(step, taken)
        if extra and schedule.allows_beside(extra, step):
            clock[0] += extra
            schedule.spend(step, extra)
            taken += extra
        return taken

    schedule.begin(0)
    spent, step, trained = [measure(0, first)], 0, 0.0
    while trained < seconds:
        step, trained = step + 1, trained + 0.02
        clock[0] += 0.02
        if schedule.due(step):
            spent.append(measure(step, kernel + beside))
    if schedule.allows_last(step):
        spent.append(measure(step + 1, kernel + beside))
    return len(spent), sum(spent)


@pytest.mark.parametrize("seconds", [20.0, 23.0, 60.0, 400.0])
@pytest.mark.parametrize("first", [0.2, 1.2])
@pytest.mark.parametrize(("kernel", "beside"), [(0.001, 0.002), (0.05, 0.1), (0.2, 0.0), (0.2, 0.1)])
def test_a_run_of_20_seconds_has_three_measurements_within_a_tenth_of_its_time(
    clock, real_limits, seconds, first, kernel, beside
):
    count, spent = run(clock, seconds=seconds, first=first, kernel=kernel, beside=beside)
    assert count >= 3
    assert spent <= 0.1 * seconds
    assert count == 3 or spent <= 0.06 * (seconds + spent) + kernel + beside  # a fourth one is not worth more


@pytest.mark.parametrize("seconds", [24.0, 60.0])
@pytest.mark.parametrize("extra", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("first", "cost"), [(0.2, 0.05), (1.0, 0.5), (1.15, 0.45)])
def test_what_can_be_left_out_leaves_time_for_three_measurements(clock, real_limits, seconds, extra, first, cost):
    count, spent = run(clock, seconds=seconds, first=first, kernel=cost / 2, beside=cost / 2, extra=extra)
    assert count >= 3
    assert spent <= 0.1 * seconds + (count - 3) * extra  # from the fourth one on the callback has a share of its own


def test_what_can_be_left_out_is_never_left_out_where_the_user_has_said_when_to_measure(clock):
    schedule = Schedule(2, 0.03)
    schedule.begin(0)
    schedule.spend(0, 100.0)
    assert schedule.allows_beside(1e6, 0)
    assert schedule.allows_beside(1e6, 2)


@pytest.mark.parametrize("seconds", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("first", [0.2, 1.2, 1.8, 5.0])
@pytest.mark.parametrize("cost", [0.01, 0.3, 1.0, 8.0])
def test_a_short_run_has_its_last_measurement_where_two_seconds_are_enough(clock, real_limits, seconds, first, cost):
    count, spent = run(clock, seconds=seconds, first=first, kernel=cost, beside=0.0)
    cheap = cost <= 0.01 * (seconds + first)
    assert spent <= max(2.0, first + 2 * cost if cheap else first) + 1e-9
    assert (count > 1) == (cheap or first + cost <= 2.0)


@pytest.mark.parametrize("cost", [0.01, 0.1, 0.2])
def test_after_a_first_one_that_took_too_long_there_are_still_three(clock, real_limits, cost):
    count, spent = run(clock, seconds=22.0, first=2.3, kernel=cost, beside=0.0)
    assert count >= 3
    assert spent <= 2.3 + 2 * cost + 1e-9


def test_what_the_first_one_takes_beyond_its_seconds_is_made_up_for_by_later_ones(clock, real_limits):
    schedule = Schedule(None, 0.1)
    schedule.begin(3)
    clock[0] += 5.0
    schedule.expect(1.0)
    schedule.spend(3, 2.0)
    schedule.spend(3, 3.0)
    assert schedule.left(3) == pytest.approx(0.5 - (5.0 - 1.2))
    schedule.note(4, 0.0)
    schedule.spend(4, 1.0)
    clock[0] = 67.9
    assert not schedule.due(5)
    clock[0] = 68.1
    assert schedule.due(5)


def test_the_cost_of_the_next_one_is_that_of_all_callbacks(clock):
    schedule = Schedule(None, 0.5)
    schedule.begin(0)
    schedule.expect(2.0)
    schedule.note(0, 0.25)
    schedule.note(0, 0.5)
    assert schedule.cost == 2.0 + module.LATER_BESIDE * 0.75
    schedule.note(9, 0.125)
    assert schedule.cost == 2.125


def test_measuring_every_n_steps_asks_for_the_last_one_whatever_it_costs(clock, real_limits):
    schedule = Schedule(5, 0.03)
    schedule.begin(0)
    assert schedule.allows(1e6, 9)
    assert not Schedule(None, 0.03).allows(1e6, 9)


def test_two_callbacks_on_one_schedule_are_charged_together(clock, free_hooks):
    schedule = Schedule(None, 0.5)
    schedule.begin(7)
    schedule.spend(7, 9.0)  # the first step is free of charge
    schedule.expect(1.0)
    clock[0] = 2.0
    assert schedule.due(8)
    schedule.spend(8, 1.0)
    schedule.spend(8, 0.5)
    clock[0] = 4.9
    assert not schedule.due(9)
    clock[0] = 5.0
    assert schedule.due(10)


def test_every_n_steps_means_multiples():
    schedule = Schedule(3, 0.03)
    assert [step for step in range(10) if schedule.due(step)] == [0, 3, 6, 9]


def test_what_the_hooks_take_counts_and_a_third_of_the_share_is_left_for_measurements(clock, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_OF_A_STEP", 0.01)
    schedule = Schedule(None, 0.3)
    schedule.begin(100)
    clock[0] = 10.0
    assert schedule.left(100) == pytest.approx(3.0)
    assert schedule.left(200) == pytest.approx(2.0)
    assert schedule.left(400) == pytest.approx(1.0)


@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize("first", [0.1, 3.0])
def test_nothing_is_due_before_the_moment_until_which_it_rests(clock, later, first):
    schedule = Schedule(None, 0.03)
    schedule.begin(0)
    schedule.expect(0.2)
    schedule.spend(0, first)
    clock[0] = first
    for step in range(1, later + 1):
        schedule.note(step, 0.05)
        schedule.spend(step, 0.2)
    rests, due = schedule.rests_until(later), 0.0
    for step in range(later + 1, 200_000):
        clock[0] += 0.002
        rests = max(rests, schedule.rests_until(step))
        if schedule.due(step):
            due = clock[0]
            break
    assert first < rests <= due


def test_where_the_steps_decide_it_never_rests():
    assert Schedule(5, 0.03).rests_until(3) == 0.0


@pytest.mark.parametrize("steps", [0, -1, 1.5, "3", True])
def test_a_number_of_steps_that_is_none_is_refused_by_its_value(steps):
    with pytest.raises(
        MisconfigurationException, match=rf"every_n_steps: {re.escape(repr(steps))}; need a whole number"
    ):
        Schedule(steps, 0.03)


@pytest.mark.parametrize("share", [0, 1.5, math.nan, "x", True, None])
def test_a_share_that_is_none_is_refused_by_its_value(share):
    with pytest.raises(MisconfigurationException, match=rf"max_overhead: {re.escape(repr(share))}; need a share"):
        Schedule(None, share)
