"""The same findings as Markdown, in the terminal, as text and as scalars."""

from __future__ import annotations

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_conv.health.finding import LEVELS, Finding
from lightning_conv.reporting.plain_words import (
    health_scalars,
    plain_words_markdown,
    plain_words_terminal,
    plain_words_text,
)

WIDE = Finding(name="width", level="ok", sentence="The last layer of net_a has 8 features.", value=math.inf)
STEEP = Finding(
    name="stability",
    level="alert",
    sentence="The loss rose 40-fold.",
    value=5.1,
    advice="Lower the learning rate.",
)
DEAD = Finding(name="units", level="warning", sentence="All units are dead.", value=1.0)
ALL = [WIDE, DEAD, STEEP]
REASONS = {"no classes": ["labels", "margins"], "never": []}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_markdown_has_the_most_severe_first_and_one_line_per_reason():
    assert plain_words_markdown(ALL, REASONS).splitlines() == [
        "## In plain words",
        "",
        "- **alert** The loss rose 40-fold. Lower the learning rate. ([stability](docs/health.md#stability))",
        "- **warning** All units are dead. ([units](docs/health.md#units))",
        r"- The last layer of net\_a has 8 features. ([width](docs/health.md#width))",
        "- Not judged: the labels of the probe, margins (no classes).",
    ]


def test_no_finding_says_so_everywhere():
    assert plain_words_markdown([]).endswith("Nothing could be judged.")
    assert plain_words_terminal([], stream=io.StringIO()).endswith("Nothing could be judged.")
    assert plain_words_text([]) == "Nothing could be judged."
    assert health_scalars([]) == {"health/level": 0.0}


def test_colour_only_in_a_terminal_that_wants_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = plain_words_terminal(ALL, REASONS, stream=io.StringIO())
    coloured = plain_words_terminal(ALL, REASONS, stream=Terminal())
    assert "\x1b" not in plain
    assert "\x1b[31;1malert" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "")
    assert plain_words_terminal(ALL, REASONS, stream=Terminal()) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert plain_words_terminal(ALL, REASONS, stream=Terminal()) == plain


def test_the_standard_output_is_asked_when_no_stream_is_given(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", Terminal())
    assert "\x1b" in plain_words_terminal(ALL)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert "\x1b" not in plain_words_terminal(ALL)
    monkeypatch.setattr("sys.stdout", None)  # as with pythonw
    assert "\x1b" not in plain_words_terminal(ALL)


@pytest.mark.parametrize("width", [40, 100])
def test_the_block_keeps_its_width_and_every_word(width):
    long = Finding(name="rank", level="notice", sentence=("many words " * 30).strip() + ".")
    block = plain_words_terminal([long, STEEP], REASONS, stream=io.StringIO(), width=width)
    assert all(len(line) <= width for line in block.splitlines())
    assert block.split().count("words") == 1 + 29  # the title, and all but the one with the full stop
    assert block.splitlines()[1].startswith("  alert   The loss")


def test_text_for_loggers_has_no_markup():
    assert plain_words_text(ALL).splitlines() == [
        "alert: The loss rose 40-fold. Lower the learning rate.",
        "warning: All units are dead.",
        "ok: The last layer of net_a has 8 features.",
    ]


def test_scalars_are_finite_and_the_level_is_the_worst():
    assert health_scalars(ALL) == {"health/stability": 5.1, "health/units": 1.0, "health/level": 3.0}
    twice = [Finding(name="units", level="ok", sentence="None is dead.", value=0.0), DEAD]
    assert health_scalars(twice) == {"health/units": 1.0, "health/level": 2.0}


@given(st.lists(st.sampled_from(LEVELS), max_size=6), st.floats())
def test_every_finding_is_in_every_form(levels, value):
    given = [
        Finding(name=f"number_{number}", level=level, sentence=f"Sentence {number}.", value=value)
        for number, level in enumerate(levels)
    ]
    forms = (
        plain_words_markdown(given),
        plain_words_text(given),
        plain_words_terminal(given, stream=io.StringIO()),
    )
    for form in forms:
        assert all(form.count(each.sentence) == 1 for each in given)
    scalars = health_scalars(given)
    assert all(math.isfinite(each) for each in scalars.values())
    assert scalars["health/level"] == max((LEVELS.index(each) for each in levels), default=0)
