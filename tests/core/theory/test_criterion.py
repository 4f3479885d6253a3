"""Verdicts say what the numbers say, and losses convert exactly."""

import math

import pytest
import torch
from torch import nn

from lightning_conv import Bounded
from lightning_conv.losses import loss_scale
from lightning_conv.theory import at_least, at_most, not_applicable


def bounded(value, error, certified=True):
    return Bounded(value, value - error, value + error, certified, "test")


@pytest.mark.parametrize(
    ("measured", "proves", "verdict"),
    [
        (bounded(2.0, 0.5), True, "certified"),
        (bounded(2.0, 0.5), False, "consistent"),
        (bounded(2.0, 0.5, certified=False), True, "consistent"),
        (2.0, True, "consistent"),
        (bounded(1.1, 0.5), True, "undecided"),
        (bounded(0.4, 0.5), True, "refuted"),
        (0.9, False, "refuted"),
        (math.nan, False, "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(measured, proves, verdict):
    assert at_least("x", "s", "x >= 1", measured, 1.0, proves=proves).verdict == verdict
    flipped = -measured if isinstance(measured, float) else Bounded(
        -measured.value, -measured.upper, -measured.lower, measured.certified, "test"
    )  # fmt: skip
    assert at_most("x", "s", "-x <= -1", flipped, -1.0, proves=proves).verdict == verdict


def test_a_theorem_that_does_not_cover_the_run_still_tells_the_number():
    criterion = not_applicable("x", "s", "x >= 1", "momentum", measured=3.0)
    assert (criterion.verdict, criterion.measured, criterion.reason) == ("not applicable", 3.0, "momentum")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_step_of_the_run_is_the_converted_step_of_the_paper(reduction, outputs):
    samples, eta = 7, 0.03
    targets = torch.randn(samples, outputs, dtype=torch.float64)
    scale = loss_scale(nn.MSELoss(reduction=reduction), samples, outputs)

    def step(loss, size):
        u = torch.ones(samples, outputs, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(u), u)
        return u.detach() - size * gradient

    run = step(lambda u: nn.MSELoss(reduction=reduction)(u, targets), eta)
    assert torch.allclose(run, step(lambda u: (u - targets).square().sum() / 2, scale.step_on_sum(eta)), rtol=1e-14)
    assert torch.allclose(
        run, step(lambda u: (u - targets).square().sum() / samples, scale.step_on_mean(eta)), rtol=1e-14
    )


def test_other_losses_have_no_scale():
    assert loss_scale(nn.L1Loss(), 3, 1) is None
    assert loss_scale(nn.MSELoss(reduction="none"), 3, 1) is None
    with pytest.raises(ValueError, match="samples: 0; need a whole number of at least 1"):
        loss_scale(nn.MSELoss(), 0, 1)
