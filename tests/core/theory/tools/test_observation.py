"""A run seen now and then: ratios, efficiency and curvature are what they are called, and a state comes back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from observed_descent import VALUES, quadratic

from lightning_conv.reporting.report import criteria_table, report_json, report_markdown, verdict_counts
from lightning_conv.theory import Criterion, at_least, not_applicable
from lightning_conv.theory.tools.observation import (
    Observation,
    infimum_of_ratios,
    observed_metrics,
)


def test_efficiency_and_curvature_of_a_quadratic_are_its_own():
    """f_{t+1} = f_t - h |g|^2 + (h^2 / 2) g^T A g: curvature g^T A g / |g|^2, efficiency 1 - h / 2 of it."""
    eta = 0.1
    w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    for seen in quadratic(eta, 12):
        gradient = VALUES * w
        curvature = float(gradient @ (VALUES * gradient) / (gradient @ gradient))
        assert seen.curvature == pytest.approx(curvature, rel=1e-8)
        assert seen.efficiency == pytest.approx(1 - eta / 2 * curvature, rel=1e-8)
        assert 2 <= seen.ratio <= 16  # between 2 lambda_min and 2 lambda_max
        w = w - eta * gradient


def test_what_is_rounding_has_no_efficiency_and_no_curvature():
    empty = [Observation(0, math.nan, math.nan, 0.0)]
    tiny = Observation(0, 1.0, 1e-4, 0.0, 0.0, 0.01, 1.0 + 1e-9, -1e-10, 1e-6)
    assert math.isnan(tiny.efficiency)
    assert math.isnan(tiny.curvature)
    assert observed_metrics(empty) == {"distance": 0.0}


def test_the_running_infimum_and_a_state_that_comes_back():
    history = quadratic(0.05, 9)
    assert infimum_of_ratios(history) == min(seen.ratio for seen in history)
    restored = [Observation.from_state(json.loads(json.dumps(seen.state()))) for seen in history]
    assert [repr(seen) for seen in restored] == [repr(seen) for seen in history]  # NaN is not equal to itself
    assert Observation(3, 0.0, 0.0, 1.0).ratio == math.inf


def test_the_page_and_the_json_hold_the_same_verdicts():
    why = "momentum, weight decay, mini-batches and many other things that break a hypothesis"
    criteria: list[Criterion] = [
        at_least("a|b", "P", "x >= 1", 0.5, 1.0), not_applicable("c", "P", "y", why), not_applicable("d", "P", "z", why, 3.0),
    ]  # fmt: skip
    page = report_markdown(
        "Title", {"run": "completed"}, criteria, {"theory/loss": 0.25, "bad": math.inf}, steps={"theory/loss": 7}
    )
    assert "| **refuted** | a\\|b | x >= 1 | 0.5 | 1 | 0.5 < 1 | P |" in page
    assert page.count(why) == 1
    assert f"- Not applicable: `c`, `d` ({why})" in page
    assert criteria_table(criteria).count("(a)") == 3  # two rows and the note
    assert "| theory/loss | 0.25 | 7 |" in page
    assert "| bad |" not in page
    stored = json.loads(report_json({"run": "completed"}, criteria, {"theory/loss": 0.25, "bad": math.inf}))
    assert [each["verdict"] for each in stored["criteria"]] == ["refuted", "not applicable", "not applicable"]
    assert stored["criteria"][1]["measured"] is None
    assert stored["metrics"] == {"theory/loss": 0.25, "bad": None}
    assert verdict_counts(criteria) == {"refuted": 1, "not applicable": 2}
    assert criteria_table([]) == ""


def test_a_departed_step_is_one_beyond_rounding():
    seen = Observation(0, 1.0, 1.0, 0.0, departure=0.2, rounding=0.1)
    assert seen.departed
    assert Observation.from_state(seen.state()) == seen
    assert observed_metrics([seen])["step_departure"] == 0.2
    assert not Observation(0, 1.0, 1.0, 0.0, departure=0.05, rounding=0.1).departed
    assert not Observation(0, 1.0, 1.0, 0.0).departed


def test_the_rate_tends_to_the_linearised_one_as_the_step_shrinks():
    for eta in (1e-2, 1e-3):
        seen = quadratic(eta, 1)[0]
        w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
        slope, loss = float((VALUES * w).square().sum()), float((VALUES * w * w).sum()) / 2
        assert seen.linearised_rate == pytest.approx(eta * slope / loss, rel=1e-12)
        after = float((VALUES * (w - eta * VALUES * w) ** 2).sum()) / 2
        assert seen.rate == pytest.approx(1 - after / loss, rel=1e-9)
        assert abs(seen.rate / seen.linearised_rate - 1) < 8 * eta  # 1 - eta beta / 2 at least, beta = 8
    assert math.isnan(Observation(0, 1.0, 1.0, 0.0, next_loss=1.0, linear=-1e-9).rate)
