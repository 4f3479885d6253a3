"""What is written to a terminal: colours where they are wanted, whole bars, tables of the terminal's width."""

import io
import logging
import re
import sys
import warnings

import pytest
from rich.console import Console
from rich.live import Live
from rich.text import Text
from tqdm import tqdm

from lightning_conv.health.finding import Finding
from lightning_conv.reporting.plain_words import alert_line, run_block, verdict_of_run
from lightning_conv.reporting.terminal import (
    console,
    log_block,
    path_from_here,
    print_paths,
    print_table,
    warnings_shown_as,
)

STEEP = Finding(name="stability", level="alert", sentence="The loss rose 40-fold.", step=70, advice="Lower the rate.")
DEAD = Finding(name="units", level="warning", sentence="All units are dead.", step=40)
WIDE = Finding(name="width", level="ok", sentence="The last layer has 8 features.")
ROSE = Finding(name="loss_rise", level="notice", sentence="The loss rose 40-fold.")
PATH = "/a/folder with spaces/" + "long/" * 30 + "convergence.html"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)


def bare(text):
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        ([WIDE, DEAD, STEEP], "1 alert: it cannot go on well as it is."),
        ([WIDE, DEAD, DEAD], "2 warnings: it is held back."),
        ([WIDE], "nothing that was judged holds it back."),
        ([WIDE, ROSE], "the loss rose, and nothing that was judged explains it."),
        ([WIDE, DEAD, ROSE], "1 warning: it is held back."),
        ([], "nothing could be judged."),
    ],
)
def test_the_verdict_is_that_of_the_worst_level(findings, said):
    assert verdict_of_run("completed", 1200, findings) == f"the run completed after 1,200 steps; {said}"


def test_a_run_that_failed_is_not_said_to_be_well():
    said = verdict_of_run("failed (TypeError)", 1, [WIDE])
    assert said == "the run failed (TypeError) after 1 step; nothing that was judged says why."


def test_a_run_that_was_interrupted_is_said_in_a_whole_sentence():
    assert verdict_of_run("interrupted (KeyboardInterrupt)", 70, []).startswith(
        "the run was interrupted (KeyboardInterrupt) after 70 steps;"
    )


def test_the_block_has_verdict_findings_with_their_steps_and_paths():
    block = run_block("completed", 80, [WIDE, DEAD, STEEP], {"none": ["labels"]}, {"page": PATH}, stream=io.StringIO())
    assert block.splitlines() == [
        "In plain words: the run completed after 80 steps; 1 alert: it cannot go on well as it is.",
        "  alert   step 70: The loss rose 40-fold. Lower the rate.",
        "  warning step 40: All units are dead.",
        "  ok      The last layer has 8 features.",
        "          Not judged: the labels of the probe (none).",
        f"  page    {PATH}",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_the_block_keeps_to_its_width_apart_from_paths(width):
    block = run_block("completed", 80, [DEAD, STEEP], None, {"page": PATH}, stream=io.StringIO(), width=width)
    *lines, last = block.splitlines()
    assert all(len(line) <= width for line in lines)
    assert last.endswith(PATH)


def test_colours_are_only_in_a_terminal_that_wants_them(monkeypatch):
    plain = run_block("completed", 80, [STEEP], stream=io.StringIO())
    colored = run_block("completed", 80, [STEEP], stream=Terminal())
    assert "\x1b" not in plain
    assert bare(colored) == plain
    assert "\x1b[31;1malert" in colored
    assert "\x1b" in alert_line(STEEP, "ConvergenceHealth", stream=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert run_block("completed", 80, [STEEP], stream=Terminal()) == plain
    assert alert_line(STEEP, "ConvergenceHealth", stream=Terminal()).startswith(
        "alert   ConvergenceHealth: step 70: The"
    )


@pytest.fixture
def logger():
    made = logging.Logger("one of this test", logging.INFO)
    made.propagate = False
    return made


def test_a_log_file_gets_the_plain_text_and_the_terminal_the_coloured_one(logger, tmp_path):
    terminal, quiet = Terminal(), Terminal()
    handlers = [logging.StreamHandler(terminal), logging.FileHandler(tmp_path / "log"), logging.StreamHandler(quiet)]
    handlers[2].setLevel(logging.ERROR)
    for each in handlers:
        logger.addHandler(each)
    log_block(logger, logging.INFO, lambda stream: run_block("completed", 8, [STEEP], stream=stream or io.StringIO()))
    handlers[1].close()
    assert "\x1b[" in terminal.getvalue()
    assert (tmp_path / "log").read_text() == bare(terminal.getvalue())
    assert quiet.getvalue() == ""
    log_block(logger, logging.DEBUG, lambda stream: "too mild")
    assert "mild" not in terminal.getvalue()


def test_a_bar_of_tqdm_stays_whole(logger):
    terminal = Terminal()
    logger.addHandler(logging.StreamHandler(terminal))
    with tqdm(total=10, file=terminal, ncols=40, mininterval=0) as bar:
        bar.update(3)
        drawn = terminal.getvalue().rpartition("\r")[2]
        log_block(logger, logging.INFO, lambda stream: "first\nsecond")
        after = terminal.getvalue()
        line = after.split("first")[0].rpartition("\r")[2]
        assert "30%" in drawn
        assert line.strip() == ""
        assert "30%" in after.partition("second\n")[2]  # and drawn again below it


def test_a_live_display_of_rich_stays_whole(logger, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger.addHandler(logging.StreamHandler(terminal))  # as Lightning's handler, made before the display
    on = Console(file=terminal, force_terminal=True, width=60)
    with Live(Text("the bar"), console=on, auto_refresh=False, redirect_stdout=False):
        log_block(logger, logging.INFO, lambda stream: "\x1b[31malert\x1b[0m above")
        shown = [line.strip() for line in bare(terminal.getvalue()).replace("\r", "\n").split("\n")]
    assert "alert above" in shown  # a line of its own
    assert shown.index("alert above") < max(i for i, line in enumerate(shown) if line == "the bar")


def test_an_alert_replaces_the_line_of_its_warning_in_a_terminal_alone(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr(sys, "stderr", stream)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "_showwarnmsg_impl", _printed)  # what pytest has put in its place
            before = warnings.formatwarning
            with warnings_shown_as("shown"):
                warnings.warn("said", UserWarning, stacklevel=1)
            assert warnings.formatwarning is before
    assert terminal.getvalue() == "shown\n"
    assert "UserWarning: said" in file.getvalue()


def _printed(message):
    sys.stderr.write(warnings._formatwarnmsg(message))


def test_whoever_records_warnings_gets_the_message(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.warns(UserWarning, match="said"), warnings_shown_as("shown"):
        warnings.warn("said", UserWarning, stacklevel=1)


@pytest.mark.parametrize("width", [40, 80])
def test_a_table_keeps_to_its_width_and_every_word(width):
    stream = io.StringIO()
    print_table(
        console(stream, width), ("name", "what"), [("rank of [h, 1]", "many words " * 20)], title="A [red] title"
    )
    text = stream.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("many") == 20
    assert "A [red] title" in text
    assert "\x1b" not in text


def test_a_pipe_gets_plain_text_and_whole_paths():
    stream = io.StringIO()
    print_paths(console(stream), [f"page: {PATH}"])
    assert stream.getvalue() == f"page: {PATH}\n"


def test_a_path_is_shown_from_the_working_directory_if_it_is_in_it(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert path_from_here(str(here / "runs" / "a.html")) == "runs/a.html"
    assert path_from_here("runs/a.html") == "runs/a.html"
    assert path_from_here(str(tmp_path / "other.html")) == str(tmp_path / "other.html")
    assert path_from_here("s3://bucket/run") == "s3://bucket/run"
