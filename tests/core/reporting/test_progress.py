"""The progress bar of a long kernel: its reports, and when it is shown."""

import pytest
import torch
from rich.progress import Progress
from torch import nn

from lightning_conv import ntk_gram
from lightning_conv.kernels import gram as grams
from lightning_conv.kernels import plan_ntk
from lightning_conv.reporting import progress


def network(width=64):
    return nn.Sequential(nn.Linear(40, width), nn.Tanh(), nn.Linear(width, 3))


@pytest.fixture
def told(monkeypatch):
    """The reports of a kernel to its bar."""
    shares = []

    class Told:
        def __enter__(self):
            return shares.append

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(grams, "progress_bar", lambda *_: Told())
    return shares


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({}, None),
        ({"outputs": "full"}, 7),
        ({"engine": "jacobian"}, None),
        ({"engine": "jacobian"}, 9),
        ({"outputs": "projected", "projections": 2}, None),
        ({"batch_norm": "batch"}, None),
        ({"batch_norm": "batch", "per_layer": True}, None),
    ],
)
def test_what_is_done_grows_from_nothing_to_all(told, options, second):
    model, inputs = network(), torch.randn(24, 40)
    ntk_gram(model, inputs, None if second is None else torch.randn(second, 40), **options)
    assert told == sorted(told)
    assert told[0] < 0.6
    assert told[-1] == pytest.approx(1)


def test_blocks_of_samples_report_every_pair(told):
    model, inputs = network(2000), torch.randn(24, 40)
    options = {"engine": "jacobian", "outputs": "full", "max_memory": 25_000_000}
    plan = plan_ntk(model, inputs, **options)
    assert any(each.rows < 24 for each in plan.passes)
    ntk_gram(model, inputs, **options)
    ntk_gram(model, inputs, torch.randn(10, 40), **options)
    first, second = told[: told.index(1.0) + 1], told[told.index(1.0) + 1 :]
    for shares in (first, second):
        assert shares == sorted(shares)
        assert len(set(shares)) > 10
        assert shares[-1] == 1


def test_no_bar_away_from_a_terminal_and_one_when_asked(capsys):
    ntk_gram(network(), torch.randn(5, 40))
    assert capsys.readouterr().err == ""
    ntk_gram(network(), torch.randn(5, 40), progress=True)
    shown = capsys.readouterr()
    assert "tangent kernel of 5 samples" in shown.err
    assert shown.out == ""
    ntk_gram(network(), torch.randn(5, 40), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "shown"), [(progress.LONG, True), (0.9 * progress.LONG, False)])
def test_on_a_terminal_long_work_has_a_bar(seconds, shown, monkeypatch, capsys):
    monkeypatch.setattr(progress.Console, "is_terminal", True)
    with progress.progress_bar("work", seconds, None) as report:
        report(0.5)
    assert ("work" in capsys.readouterr().err) == shown


def test_brackets_in_a_title_are_shown(capsys):
    with progress.progress_bar("rank of [h, 1]", 0.0, True) as report:
        report(0.5)
    assert "rank of [h, 1]" in capsys.readouterr().err


def test_a_bar_that_is_there_already_is_left_alone(monkeypatch):
    def refuse(_):
        raise progress.LiveError("only one live display")

    monkeypatch.setattr(Progress, "start", refuse)
    assert ntk_gram(network(), torch.randn(5, 40), progress=True).matrix.shape == (5, 5)


def test_lines_for_a_log_come_every_few_per_cent_and_never_too_often(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    report = progress.Lines(lines.append, "proof", step=1 / 8, pause=60.0)
    for step in range(129):  # shares that are exact binary numbers
        clock[0] = 30.0 * step
        report(step / 128)
    assert len(lines) == 8
    assert lines[3] == "proof: 50 %, 32 minutes gone, about 32 minutes to go"
    quick = progress.Lines(lines.append, "proof", step=1 / 8, pause=1e9)
    for step in range(129):
        quick(step / 128)
    assert len(lines) == 8


def test_lines_of_work_that_goes_on_count_its_own_time_only(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    report = progress.Lines(lines.append, "proof", step=1 / 16, pause=0.0)
    report(0.75)  # an earlier process had done that
    clock[0] = 600.0
    report(0.875)
    assert lines == ["proof: 88 %, 10 minutes gone, about 10 minutes to go"]


def test_lines_say_the_prediction_first_where_they_are_asked_to_and_it_is_long():
    lines = []
    for predicts, seconds in ((True, 42.0), (True, 0.9 * progress.LONG), (False, 42.0), (True, 600.0)):
        report = progress.Lines(lines.append, "kernel", predicts=predicts)
        with progress.progress_bar("another title", seconds, report) as given:
            assert given is report
    assert lines == ["kernel: about 42 s", "kernel: about 10 minutes"]
