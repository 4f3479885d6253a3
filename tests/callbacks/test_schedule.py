"""The time budget holds whatever a measurement costs."""

from __future__ import annotations

import pytest

from lightning_conv.callbacks import schedule as module
from lightning_conv.callbacks.schedule import Schedule


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("cost", [0.01, 0.5, 5.0])
def test_measurements_after_the_first_stay_within_the_share_of_wall_time(clock, cost):
    schedule = Schedule(None, 0.03)
    schedule.begin()
    clock[0] += cost
    schedule.paid(0, cost)  # the first one is always taken
    spent = 0.0
    for step in range(1, 20_000):
        clock[0] += 0.01
        if schedule.due(step):
            clock[0] += cost
            spent += cost
            schedule.paid(step, cost)
        assert spent <= 0.03 * clock[0] + 1e-9
    assert spent > 0 or cost > 0.03 * clock[0]


def test_two_callbacks_on_one_schedule_are_charged_together(clock):
    schedule = Schedule(None, 0.5)
    schedule.begin()
    schedule.paid(0, 1.0)
    schedule.paid(0, 1.0)  # the second callback at the first step: still free of charge
    clock[0] = 3.9
    assert not schedule.due(1)  # the next would cost 2
    clock[0] = 4.0
    assert schedule.due(2)


def test_every_n_steps_means_multiples():
    schedule = Schedule(3, 0.03)
    assert [step for step in range(10) if schedule.due(step)] == [0, 3, 6, 9]
