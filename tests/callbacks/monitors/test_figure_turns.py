"""Figures are drawn at steps that are evenly spaced on a logarithmic scale, within a third of the monitor's share."""

from types import SimpleNamespace

import pytest

from lightning_conv.callbacks.monitors import figure_turns
from lightning_conv.callbacks.monitors.figure_turns import FIRST_DRAWING, FigureTurns
from lightning_conv.callbacks.run import schedule as schedule_module
from lightning_conv.callbacks.run.schedule import Schedule


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    for module in (schedule_module, figure_turns):
        read = lambda: now[0]  # noqa: E731
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=read, perf_counter=read))
    monkeypatch.setattr(schedule_module, "FIRST_SECONDS", 1.2)
    monkeypatch.setattr(schedule_module, "SHORT_RUN_SECONDS", 1.6)
    return now


def begun(every_n_steps=None):
    made = Schedule(every_n_steps, 0.03)
    made.begin(0)
    return made


def taking(clock, seconds):
    def draw():
        clock[0] += seconds

    return draw


def test_with_every_n_steps_the_step_doubles_between_two_pictures_of_a_kind(clock):
    turns, made, drawn = FigureTurns(), begun(1), {"a": [], "b": []}
    for step in range(2000):
        for tag in drawn:
            if tag == "b" and step < 5:
                continue
            if turns.may(tag, made, 0.03, step, last=False):
                turns.draw(tag, step, taking(clock, 10.0))
                drawn[tag].append(step)
    assert drawn == {
        "a": [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
        "b": [5, 10, 20, 40, 80, 160, 320, 640, 1280],
    }
    assert not turns.may("a", made, 0.03, 1024, last=True)  # that of this step is there
    assert turns.may("a", made, 0.03, 1999, last=True)


def test_in_a_budget_all_figures_take_a_third_of_the_share(clock):
    turns, made = FigureTurns(), begun()
    made.expect(0.01)
    drawn = 0
    for step in range(20_000):  # a step of 10 ms, a figure of 0.2 s
        clock[0] += 0.01
        for tag in ("a", "b", "c"):
            if turns.may(tag, made, 0.03, step, last=False):
                turns.draw(tag, step, taking(clock, 0.2))
                made.spend(step, 0.2)
                drawn += 1
        assert turns.spent <= 0.03 / 3 * made.elapsed + 0.2 - FIRST_DRAWING + 1e-9
    assert drawn >= 6


def test_at_the_end_of_a_short_run_the_first_figure_is_drawn_and_the_others_if_they_fit(clock):
    for first, expected in ((0.1, ["a", "b", "c"]), (1.45, ["a"]), (5.0, ["a"])):
        turns, made = FigureTurns(), begun()
        made.spend(0, first)
        clock[0] += 0.5
        drawn = []
        for tag in ("a", "b", "c"):
            if turns.may(tag, made, 0.03, 50, last=True, since=turns.spent):
                turns.draw(tag, 50, taking(clock, 0.1))
                drawn.append(tag)
        assert drawn == expected


def test_a_resumed_run_does_not_draw_again_what_it_has(clock):
    turns, again = FigureTurns(), FigureTurns()
    turns.draw("a", 100, taking(clock, 0.3))
    again.load_state_dict(turns.state_dict())
    again.begin()
    made = begun(1)
    assert [step for step in (100, 150, 200) if again.may("a", made, 0.03, step, last=False)] == [200]
    again.load_state_dict({})
    assert again.may("a", made, 0.03, 100, last=False)
