"""The consequences of Chatterjee's criterion for a run seen now and then: the verdicts go both ways."""

from __future__ import annotations

import math

import pytest
from observed_descent import quadratic

from lightning_conv.theory.papers.chatterjee.descent import descent_criteria
from lightning_conv.theory.tools.observation import Observation


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


def test_what_was_not_seen_is_undecided():
    empty = [Observation(0, math.nan, math.nan, 0.0)]
    assert {c.verdict for c in descent_criteria(empty)} == {"undecided"}
    assert {c.verdict for c in descent_criteria([])} == {"undecided"}


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
