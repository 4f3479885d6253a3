"""A run seen now and then: ratios, efficiency and curvature are what they are called, and the verdicts go both ways."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lightning_conv.reporting.report import criteria_table, report_json, report_markdown, verdict_counts
from lightning_conv.theory import Criterion, at_least, not_applicable
from lightning_conv.theory.tools.observation import (
    Observation,
    descent_criteria,
    infimum_of_ratios,
    observed_metrics,
)

VALUES = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)


def quadratic(eta: float, steps: int, every: int = 1) -> list[Observation]:
    """Gradient descent on f = 1/2 sum lambda_i w_i^2, seen at every ``every``-th step."""
    w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    start, length, history = w.clone(), 0.0, []

    def loss(w: torch.Tensor) -> float:
        return float(0.5 * (VALUES * w * w).sum())

    for t in range(steps):
        gradient = VALUES * w
        after = w - eta * gradient
        if t % every == 0:
            history.append(
                Observation(
                    t, loss(w), float(gradient.norm()), float((w - start).norm()), length, eta, loss(after),
                    float(gradient @ (after - w)), float((after - w).norm()), noise=1e-15,
                )
            )  # fmt: skip
        length += eta * float(gradient.norm())
        w = after
    return history


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


@pytest.mark.parametrize("every", [1, 7])
def test_descent_below_1_over_beta_is_consistent_with_every_consequence(every):
    verdicts = {c.name: c.verdict for c in descent_criteria(quadratic(1 / 8, 60, every))}
    assert verdicts == dict.fromkeys(("descent_efficiency", "linear_rate", "path_length"), "consistent")


def test_a_step_too_long_refutes_the_descent_and_a_detour_the_length():
    assert {c.name: c.verdict for c in descent_criteria(quadratic(0.24, 20))}["descent_efficiency"] == "refuted"


@pytest.mark.parametrize(("last", "verdict"), [(1, "refuted"), (10, "undecided")])
def test_a_detour_refutes_the_length_where_every_step_was_measured(last, verdict):
    """Between measured steps the ratio may have been smaller, and the bound with it larger."""
    slow = [Observation(0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.99, -0.5, 0.5), Observation(last, 0.9, 1.0, 1.0, 5.0)]
    verdicts = {c.name: c.verdict for c in descent_criteria(slow)}
    assert verdicts["path_length"] == verdict  # 2 (1 - sqrt 0.9) / 0.5 = 0.2
    assert verdicts["linear_rate"] == verdict


def test_what_was_not_seen_is_undecided_and_rounding_is_not_judged():
    empty = [Observation(0, math.nan, math.nan, 0.0)]
    assert {c.verdict for c in descent_criteria(empty)} == {"undecided"}
    assert {c.verdict for c in descent_criteria([])} == {"undecided"}
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
    page = report_markdown("Title", {"run": "completed"}, criteria, {"theory/loss": 0.25})
    assert "| **refuted** | a\\|b | x >= 1 | 0.5 | 1 | 0.5 < 1 | P |" in page
    assert page.count(why) == 1
    assert page.count("(a)") == 3  # two rows and the note
    assert "| theory/loss | 0.25 |" in page
    stored = json.loads(report_json({"run": "completed"}, criteria, {"theory/loss": 0.25, "bad": math.inf}))
    assert [each["verdict"] for each in stored["criteria"]] == ["refuted", "not applicable", "not applicable"]
    assert stored["criteria"][1]["measured"] is None
    assert stored["metrics"] == {"theory/loss": 0.25, "bad": None}
    assert verdict_counts(criteria) == {"refuted": 1, "not applicable": 2}
    assert criteria_table([]) == ""


def test_epsilon_is_a_share():
    with pytest.raises(ValueError, match="epsilon: 1"):
        descent_criteria([], epsilon=1.0)


def test_a_rate_and_a_path_that_were_missed_once_stay_refuted():
    """f rises at the first step, along a long way, and falls ever after."""
    losses = [1.0, 4.0, *(0.5**t for t in range(1, 12))]
    history = [
        Observation(t, f, f**0.5, 0.0, 3.0 + 0.01 * t if t else 0.0, 0.1, after, -0.1 * f, 0.1, noise=1e-14)
        for t, (f, after) in enumerate(zip(losses, [*losses[1:], losses[-1] / 2], strict=True))
    ]
    found = {each.name: each for each in descent_criteria(history)}
    assert found["linear_rate"].verdict == "refuted"
    assert found["linear_rate"].measured == pytest.approx(-math.log(4))
    assert found["path_length"].verdict == "refuted"
    assert found["path_length"].measured == pytest.approx(3.01)
    assert found["path_length"].bound < 0  # a path that leads upwards


def test_a_first_step_whose_effect_is_rounding_is_not_held_against_the_rate():
    losses = [1.0, 1.0 + 1e-7, *(0.9**t for t in range(1, 40))]
    history = [
        Observation(t, f, f**0.5, 0.0, 0.0, 1e-7, f * 0.9, -0.1 * f, 0.1, noise=1e-6) for t, f in enumerate(losses)
    ]
    rate = {each.name: each for each in descent_criteria(history)}["linear_rate"]
    assert 0 < rate.bound < 1e-7  # far below the rounding of log f over one step
    assert rate.measured > 0
    assert rate.verdict == "consistent"


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
