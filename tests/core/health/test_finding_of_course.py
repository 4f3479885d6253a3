"""Forecast, regime and bound are said with their numbers, and not at all where nothing is known."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_conv.health.findings.of_course import finding_of_forecast, finding_of_regime, finding_of_subset
from lightning_conv.health.kernel.forecast_record import ShownForecast
from lightning_conv.health.kernel.regime import training_regime
from lightning_conv.health.kernel.subset_bound import SubsetBound
from lightning_conv.health.wording import PAGE, page_of
from lightning_conv.linalg.eigenvalues.bounded import Bounded


def test_a_forecast_comes_with_the_error_of_the_earlier_ones():
    shown = ShownForecast(made=8, steps=(12, 16), losses=(0.03, 0.02), errors=(0.04, 0.07), compared=(5, 4))
    found = finding_of_forecast(shown)
    assert found.sentence == (
        "If training goes on like this, the loss of the probe is about 0.02 at step 16; the last 4 forecasts as far ahead were off by "
        "7 % in the median."
    )
    assert (found.value, found.step, found.level) == (0.02, 8, "ok")
    assert finding_of_forecast(None) is None


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((0.999, 0.03, 0.02), "close to its linearisation"),
        ((0.4, 1.5, math.inf), "learns features"),
        ((0.4, 1.5, None), "learns features"),
    ],
)
def test_the_regime_is_one_sentence_with_its_numbers(numbers, says):
    found = finding_of_regime(training_regime(*numbers, progress=10.0), step=3)
    assert says in found.sentence
    assert found.level == "ok"
    assert ("linearised network " in found.sentence.split("(")[1]) == (numbers[2] is not None)
    assert found.value == numbers[1]


def test_an_undecided_regime_is_no_finding():
    assert finding_of_regime(training_regime(math.nan, 0.3, None, progress=10.0), step=3) is None


def bound(probe, on_training_set=False):
    training_set = probe if on_training_set else Bounded(math.nan, 0.0, math.inf, False, "interlacing")
    return SubsetBound(
        probe=probe, training_set=training_set, parameters=("a", "b"), samples=64, on_training_set=on_training_set
    )


def test_a_bound_is_said_of_the_samples_that_it_is_of():
    proven = Bounded(0.25, 0.25, math.inf, True, "sum")
    found = finding_of_subset(bound(proven), step=1)
    assert "on the 64 samples of the probe is at least 0.25" in found.sentence
    assert "nothing of other samples" in found.sentence
    whole = finding_of_subset(bound(proven, True), step=1)
    assert "on all training samples is at least 0.25" in whole.sentence
    assert "nothing" not in whole.sentence


@pytest.mark.parametrize(
    ("outputs", "number", "says"),
    [
        ("trace", 1, "of the kernel on"),
        ("full", 10, "of the kernel on"),
        ("trace", 10, "of the kernel summed over 10 outputs on"),
        ("sum", 10, "of the kernel of the summed output on"),
        ("cotangents", 10, "of the kernel of the loss gradients on"),
    ],
)
def test_a_bound_names_its_kernel(outputs, number, says):
    proven = replace(bound(Bounded(0.25, 0.25, math.inf, True, "sum")), outputs=outputs, n_outputs=number)
    assert says in finding_of_subset(proven, step=1).sentence


@pytest.mark.parametrize("probe", [Bounded(0.25, 0.25, 1.0, False, "sum"), Bounded(0.0, 0.0, 1.0, True, "sum")])
def test_what_is_not_proven_is_not_said(probe):
    assert finding_of_subset(bound(probe), step=1) is None


def test_every_finding_has_a_section_in_the_docs():
    root = Path(__file__).parents[3]
    sections = {
        line[3:].strip().lower().replace(" ", "-")
        for line in (root / PAGE).read_text().splitlines()
        if line.startswith("## ")
    }
    sources = "".join(each.read_text() for each in (root / "lightning_conv" / "health" / "findings").glob("of_*.py"))
    names, others = (set(re.findall(rf'{how}"(\w+)"', sources)) for how in ("name=", r"page_of\("))
    assert {"stability", "loss_floor", "units", "forecast", "training_floor"} <= names
    assert others == {"critical_sharpness", "lambda_min"}  # of findings that have another name
    assert {page_of(each).split("#")[1] for each in (names | others) - {"lambda_min_bound"}} == sections


@pytest.mark.parametrize(("change", "said"), [(0.62, "change 62 % of its norm"), (110.03, "change 110 times its norm")])
def test_a_large_change_is_no_percentage(change, said):
    regime = training_regime(0.5, change, None, progress=10.0)
    assert said in finding_of_regime(regime, step=1).sentence
