"""The time budget holds whatever a measurement costs."""

from __future__ import annotations

import pytest

from lightning_conv.callbacks.run import schedule as module
from lightning_conv.callbacks.run.schedule import Schedule


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("cost", [0.01, 0.5, 5.0])
def test_measurements_after_the_first_stay_within_the_share_of_wall_time(clock, cost):
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
            schedule.spend(step, cost)
        assert spent <= 0.03 * clock[0] + 1e-9
    assert count == pytest.approx(0.03 * clock[0] / cost, abs=1.5)  # and use it up


def test_two_callbacks_on_one_schedule_are_charged_together(clock):
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
