"""Layers that never move and losses that curve downward are named; what is usual is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_conv.health.findings.of_movement import (
    PATIENCE,
    Unmoved,
    curves_downward,
    finding_of_descent,
    finding_of_movement,
    weight_digests,
)
from lightning_conv.health.step.course import LossCourse


@pytest.mark.parametrize(
    ("reason", "level", "words"),
    [
        ("rate", "warning", "the rate 0"),
        ("", "warning", "though an optimizer has them"),
        ("absent", "notice", "no optimizer"),
    ],
)
def test_a_layer_that_never_moved_is_named_with_what_is_known(reason, level, words):
    found = finding_of_movement([Unmoved("trunk", reason)], layers=3, since=0, step=PATIENCE)
    assert found.level == level
    assert "trunk" in found.sentence
    assert words in found.sentence
    assert found.advice
    assert found.value == 1


def test_reasons_that_differ_are_not_made_one():
    found = finding_of_movement([Unmoved("a", "rate"), Unmoved("b")], layers=3, since=0, step=20)
    assert "rate 0" not in found.sentence
    mixed = finding_of_movement([Unmoved("a", "absent"), Unmoved("b", "rate")], layers=3, since=0, step=20)
    assert mixed.level == "warning"
    assert "of b " in mixed.sentence


def test_few_steps_say_nothing_and_movement_is_ok():
    assert finding_of_movement([Unmoved("a", "rate")], layers=1, since=3, step=2 + PATIENCE) is None
    assert finding_of_movement([], layers=4, since=0, step=50).level == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_movement_of_one_number_shows(dtype):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight_digests({"w": weight})
    assert weight_digests({"w": weight.clone()}) == before
    moved = weight.clone()
    moved[3, 4] = torch.nextafter(moved[3, 4], torch.tensor(math.inf, dtype=dtype))
    assert weight_digests({"w": moved}) != before
    two = weight.clone()
    two[0, 0] = torch.nextafter(two[0, 0], torch.tensor(math.inf, dtype=dtype))
    two[7, 9] = torch.nextafter(two[7, 9], torch.tensor(-math.inf, dtype=dtype))
    assert weight_digests({"w": two}) != before
    assert weight_digests({"w": weight.flip(0)}) != before


def forms(loss, outputs, targets):
    """v^T S_i v by the whole Hessian of every sample, for four directions."""
    generator, made = torch.Generator().manual_seed(1), []
    for _ in range(4):
        row = []
        for u, y in zip(outputs, targets, strict=True):
            hessian = torch.autograd.functional.hessian(lambda at, y=y: loss(at[None], y[None]), u)
            v = torch.randn(len(u), generator=generator, dtype=torch.float64)
            row.append(v @ hessian @ v)
        made.append(torch.stack(row))
    return torch.stack(made)


U = 3 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LABELS, TARGETS = torch.arange(6) % 4, torch.zeros(6, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "targets", "down"),
    [
        (lambda u, y: -F.cross_entropy(u, y), LABELS, True),
        (lambda u, y: -F.mse_loss(u, y), TARGETS, True),
        (lambda u, y: -F.binary_cross_entropy_with_logits(u, y), TARGETS, True),
        (F.cross_entropy, LABELS, False),
        (F.mse_loss, TARGETS, False),
        (lambda u, y: -F.cosine_similarity(u, y + torch.arange(4.0)).mean(), TARGETS, False),
        (lambda u, y: (u[:, 1] + 0.5 * ((u[:, 0] - 1) / u[:, 1].exp()) ** 2).mean(), TARGETS, False),
        (lambda u, y: (u - y).sum() + 0 * u.square().sum(), TARGETS, None),
    ],
    ids=["-ce", "-mse", "-bce", "ce", "mse", "cosine", "likelihood", "linear"],
)
def test_which_losses_curve_downward(loss, targets, down):
    assert curves_downward(forms(loss, U, targets)) is down


def test_a_loss_that_has_flattened_says_nothing():
    assert curves_downward(torch.full((4, 3), 1e-12), largest=1.0) is None
    assert curves_downward(torch.full((4, 3), math.nan)) is None
    assert curves_downward(torch.tensor([[-1e-3, 1e-9]]), largest=1.0) is True


def test_a_loss_with_the_wrong_sign_is_a_warning_and_then_an_alert():
    course = LossCourse.begin(0, -2.3).then(5, -4.0)
    found = finding_of_descent(course, downward_since=0, step=5)
    assert found.level == "warning"
    assert "curves downward in the outputs of every sample since step 0" in found.sentence
    assert finding_of_descent(course.then(9, -50.0), downward_since=0, step=9).level == "alert"
    assert finding_of_descent(course.then(9, -math.inf), downward_since=0, step=9).level == "alert"


def test_a_loss_below_zero_or_curving_downward_alone_is_not_named():
    falls = LossCourse.begin(0, 1.4).then(5, -3.0)
    assert finding_of_descent(falls, downward_since=None, step=5) is None  # a likelihood
    robust = LossCourse.begin(0, 9.0).then(5, 2.0)
    assert finding_of_descent(robust, downward_since=0, step=5) is None  # a loss such as log(1 + r^2)
    rises = LossCourse.begin(0, -9.0).then(5, -2.0)
    assert finding_of_descent(rises, downward_since=0, step=5) is None
