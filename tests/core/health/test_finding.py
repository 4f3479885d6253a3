"""A finding is valid, ordered by severity, and survives JSON."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_conv.health.finding import LEVELS, Finding, in_order, worst_level

SENTENCE = "The step is at the edge."


def finding(level="ok", **options):
    return Finding(**{"name": "stability", "level": level, "sentence": SENTENCE} | options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": "Stability"}, "name"),
        ({"name": "loss floor"}, "name"),
        ({"name": "loss_"}, "name"),
        ({"name": ""}, "name"),
        ({"level": "error"}, "level"),
        ({"sentence": ""}, "sentence"),
        ({"sentence": "No stop"}, "sentence"),
        ({"sentence": "Two\nlines."}, "sentence"),
        ({"advice": "Lower it"}, "advice"),
        ({"step": -1}, "step"),
        ({"value": 1.0, "lower": 2.0}, "lower, value, upper"),
        ({"value": 3.0, "lower": 1.0, "upper": 2.0}, "lower, value, upper"),
        ({"lower": 3.0, "upper": 2.0}, "lower, value, upper"),
    ],
)
def test_what_is_no_finding_is_refused(options, why):
    with pytest.raises(ValueError, match=why):
        finding(**options)


def test_json_has_no_infinity_and_no_nan():
    written = finding(value=2.0, lower=1.0, upper=math.inf, step=3).to_json()
    assert list(written) == [
        "name",
        "level",
        "sentence",
        "value",
        "lower",
        "upper",
        "limit",
        "step",
        "advice",
        "page",
    ]
    assert (written["value"], written["upper"], written["limit"], written["step"]) == (2.0, None, None, 3)
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    read = Finding.from_json(written)
    assert (read.value, read.step, read.sentence) == (2.0, 3, SENTENCE)
    assert math.isnan(read.upper)
    assert read.to_json() == written


def test_a_finding_knows_its_page_by_its_name_and_keeps_another_one():
    assert finding().page == "docs/health.md#stability"
    assert finding(name="loss_floor").page == "docs/health.md#loss-floor"
    other = finding(page="docs/health.md#critical-sharpness")
    assert other.page == "docs/health.md#critical-sharpness"
    assert Finding.from_json(other.to_json()).page == other.page
    assert finding().to_json()["page"] == "docs/health.md#stability"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"name": 3}, TypeError, "name: 3 (int); need a text"),
        ({"sentence": None}, TypeError, "sentence: None; need a text"),
        ({"advice": None}, TypeError, "advice: None; need a text"),
        ({"value": "a"}, TypeError, "value: 'a' (str); need a number, or NaN for none"),
        ({"limit": None}, TypeError, "limit: None; need a number, or NaN for none"),
        ({"step": 1.5}, ValueError, "step: 1.5 (float); need a whole number of 0 or more, or None"),
    ],
)
def test_a_part_of_another_type_is_named(options, error, says):
    with pytest.raises(error) as raised:
        finding(**options)
    assert str(raised.value) == says


@given(st.lists(st.sampled_from(LEVELS), max_size=12))
def test_the_most_severe_come_first_and_equals_keep_their_order(levels):
    given = [finding(level, step=number) for number, level in enumerate(levels)]
    ordered = in_order(given)
    assert sorted(each.step for each in ordered) == list(range(len(levels)))
    for earlier, later in pairwise(ordered):
        assert (LEVELS.index(earlier.level), -earlier.step) > (LEVELS.index(later.level), -later.step)
    assert worst_level(given) == (ordered[0].level if ordered else "ok")
