"""A ratio above one accuses nobody; a rise of the loss has its cause told only where the ratio tells it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_conv.health.findings.of_step import (
    finding_of_noise,
    finding_of_rise,
    finding_of_stability,
    of_small_batches,
)
from lightning_conv.health.kernel.gradient_noise import NoiseScale, gradient_noise, noise_scale
from lightning_conv.health.step.course import LossCourse, StabilityCourse, StabilityReading
from lightning_conv.health.step.rise_cause import cause_of_rise


def losses(*series):
    course = LossCourse.begin(0, series[0])
    for step, loss in enumerate(series[1:], 1):
        course = course.then(step, loss)
    return course


def ratios(*series, spread=0.02):
    readings = [StabilityReading(step, each, each * (1 + spread)) for step, each in enumerate(series)]
    course = StabilityCourse.begin(readings[0])
    for reading in readings[1:]:
        course = course.then(reading)
    return course


FALLING = losses(1.0, 0.9, 0.8, 0.7)


def test_a_step_that_is_too_long_with_the_rate_that_would_not_have_been():
    found = finding_of_stability(ratios(5.1), losses(1.0, 3.0, 12.0, 40.0), rate=20.0, safe=0.2)
    assert found.level == "alert"
    assert found.sentence == (
        "The loss rose 40-fold by step 3 (its least was 1, at step 0) while the step was 5.1 times too long for the curvature (step 0)."
    )
    assert found.advice == "Lower the learning rate: at lr 0.784 the ratio starts at 0.2."
    assert (found.value, found.limit, found.step) == (5.1, 1.0, 0)
    assert found.upper == pytest.approx(5.1 * 1.02)


@pytest.mark.parametrize(
    ("series", "level"),
    [
        ((1.0, 3.5, math.nan), "alert"),
        ((1.0, math.inf), "alert"),
        ((1.0, 21.0), "alert"),
        ((1.0, 5.0), "warning"),
        ((1.0, 0.1, 0.4), "warning"),
        ((1.0, 0.001, 0.01), "notice"),
    ],
)
def test_levels_of_a_rise_after_steps_above_the_edge(series, level):
    found = finding_of_stability(ratios(3.2), losses(*series))
    assert found.level == level
    assert found.advice == "Lower the learning rate by a factor of 64."


def test_a_loss_that_is_back_has_not_risen():
    found = finding_of_stability(ratios(1.5), losses(1.0, 5.0, 0.9))
    assert (found.level, found.advice) == ("ok", "")


def test_just_beyond_the_edge_only_a_loss_that_has_blown_up_is_put_down_to_the_step():
    risen, blown = losses(1.0, 5.0), losses(1.0, 5.0, 25.0)
    assert finding_of_stability(ratios(1.5), blown).level == "alert"
    assert finding_of_stability(ratios(1.5), risen).level == "ok"
    assert (
        "1.5 times its limit, as in many runs that are well, so the cause is open"
        in finding_of_rise(risen, ratios(1.5)).sentence
    )


@pytest.mark.parametrize(
    ("series", "level", "says"),
    [
        ((0.01,), "ok", "by a factor of 98"),
        ((0.2, 0.7), "ok", "near the edge"),
        ((0.5, 1.04), "ok", "which is usual in training"),
        ((0.5, 1.04, 1.9), "ok", "above 1 since step 1"),
        (
            (0.5, 2.6),
            "notice",
            "2.6 times its limit for the curvature and rising, above 1 since step 1; the loss has not risen",
        ),
        ((0.0,), "ok", "no curvature"),
    ],
)
def test_a_ratio_alone_is_never_more_than_a_notice_and_advises_nothing(series, level, says):
    found = finding_of_stability(ratios(*series), FALLING, rate=0.1)
    assert found.level == level
    assert says in found.sentence
    assert found.advice == ""
    assert finding_of_rise(FALLING, ratios(*series)) is None


def test_without_losses_nothing_is_said_of_them():
    assert "loss" not in finding_of_stability(ratios(2.6)).sentence


def test_a_leap_far_from_the_edge_is_not_the_step():
    rise, calm = losses(1.0, 0.5, 0.45, 3.5), ratios(0.1, 0.1, 0.1)
    cause = cause_of_rise(rise, calm, rise)
    found = finding_of_rise(rise, calm, cause=cause)
    assert found.level == "warning"
    assert "only 0.1 of its limit, and the loss leapt" in found.sentence
    assert "labels" in found.advice
    assert finding_of_stability(calm, rise, cause=cause).level == "ok"
    assert finding_of_rise(rise, calm, statistical=True, cause=cause).level == "notice"
    kept = losses(1.0, *[0.1] * 17, 0.5)
    assert finding_of_rise(kept, calm, cause=cause_of_rise(kept, calm, kept)).level == "notice"


@pytest.mark.parametrize("course", [None, ratios(0.8), ratios(0.4, spread=1.0), ratios(0.1), ratios(0.1, 0.1)])
def test_a_cause_that_is_not_known_is_open(course):
    found = finding_of_rise(losses(1.0, 1.0, 30.0), course)
    assert found.level == "notice"
    assert "the cause is open" in found.sentence
    assert found.advice == ""


def test_a_rise_belongs_to_one_finding():
    rise = losses(1.0, 30.0)
    for ratio in (0.1, 0.9, 1.1, 1.2, 5.0):
        blamed = finding_of_stability(ratios(ratio), rise).level == "alert"
        assert blamed == (finding_of_rise(rise, ratios(ratio)) is None)
        assert blamed == (ratio > 1.1)


def test_a_ratio_that_came_after_the_rise_is_not_its_cause():
    for rise in (losses(1.0, 5.0, 6.0), losses(1.0, 0.9, 6.0)):
        found = finding_of_stability(ratios(0.1, 0.1, 9.0), rise)
        assert found.level == "notice"
        assert "not risen" not in found.sentence


NOISE = gradient_noise(torch.eye(64, dtype=torch.float64) + 1)


@pytest.mark.parametrize(
    ("scale", "batch", "level", "says"),
    [
        (NoiseScale(1000.0, 500.0, 2000.0), 16, "notice", "far below the noise scale of about 1,000 (500 to 2,000)"),
        (NoiseScale(math.inf, 900.0, math.inf), 64, "notice", "at least 900"),
        (NoiseScale(math.inf, math.inf, math.inf), 64, "ok", "not told from the noise of the 64 samples"),
        (NoiseScale(3.0, 2.0, 5.0), 64, "notice", "far above"),
        (NoiseScale(100.0, 50.0, 200.0), 64, "ok", "in the range"),
        (NoiseScale(math.inf, 0.0, math.inf), 64, "ok", "in the range"),
    ],
)
def test_the_batch_against_the_noise_scale(scale, batch, level, says):
    found = finding_of_noise(NOISE, scale, batch=batch, step=4)
    assert found.level == level
    assert says in found.sentence
    assert found.limit == batch


def test_a_batch_of_everything_has_no_noise():
    scale = NoiseScale(1000.0, 900.0, 1100.0)
    assert finding_of_noise(NOISE, scale, batch=64, training_samples=65).level == "notice"
    found = finding_of_noise(NOISE, scale, batch=64, training_samples=64)
    assert found.level == "ok"
    assert "all training samples" in found.sentence


def test_samples_that_carry_the_gradient_and_gradients_of_zero():
    gradients = torch.full((64, 1), 1e-3, dtype=torch.float64)
    gradients[7] = 1.0
    near = NoiseScale(64.0, 32.0, 128.0)
    found = finding_of_noise(gradient_noise(gradients @ gradients.T), near, batch=64)
    assert found.sentence == "One sample of 64 carries 90 % of the squared gradient norms."
    zero = finding_of_noise(gradient_noise(torch.zeros(8, 8)), NoiseScale(math.inf, 0.0, math.inf), batch=8)
    assert zero.level == "notice"
    assert "all 8 samples are zero" in zero.sentence
    with pytest.raises(ValueError, match="batch"):
        finding_of_noise(NOISE, near, batch=0)


@pytest.mark.parametrize(("batch", "error"), [("a", TypeError), (math.nan, TypeError), (0, ValueError)])
def test_a_batch_that_is_no_number_of_samples_is_refused(batch, error):
    noise = gradient_noise(torch.eye(4))
    with pytest.raises(error, match=r"batch: .*; need a whole number of at least 1"):
        finding_of_noise(noise, noise_scale([noise]), batch=batch)


def test_a_rise_names_the_least_loss_and_the_reading_that_it_is_judged_by():
    course = LossCourse.begin(0, 1.588).then(192, 934.7)
    found = finding_of_rise(course, StabilityCourse.begin(StabilityReading(0, 0.148, 0.15)))
    assert found.sentence == (
        "The loss rose 589-fold by step 192 (its least was 1.59, at step 0) while the step was 0.148 of its limit at step 0, "
        "the last reading before it, so the cause is open."
    )


def test_a_ratio_of_many_samples_says_so_to_steps_on_few():
    course = StabilityCourse.begin(StabilityReading(0, 0.1, 0.11, 0.5))
    found = finding_of_stability(course)
    assert of_small_batches(found, 64, 9) == found
    said = of_small_batches(found, 64, 8)
    assert said.sentence.endswith("That is of 64 samples together, not of batches of 8, whose curvature may be larger.")
    assert replace(said, sentence=found.sentence) == found
    assert "not of single samples, whose" in of_small_batches(found, 64, 1).sentence
    other = replace(found, name="units")
    assert of_small_batches(other, 64, 1) == other


def test_steps_on_single_samples_diverge_far_below_the_edge():
    inputs, weights = math.sqrt(1.5) * torch.eye(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    curvature = 2 / 64 * torch.linalg.eigvalsh(inputs.T @ inputs)[-1]  # of the mean of (x w)^2
    rate = 1.0
    assert rate * curvature / 2 < 0.03
    for each in 10 * list(inputs):
        weights -= rate * 2 * (each @ weights) * each
    assert (inputs @ weights).square().mean() > 1e5
