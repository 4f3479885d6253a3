"""What forces the loss is named with its samples; a width that forces nothing accuses nobody."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_conv.health.findings.of_fit import finding_of_floor, finding_of_rank, finding_of_width
from lightning_conv.health.fit.loss_floor import LossFloor, loss_floor
from lightning_conv.health.fit.width_floor import width_floor
from lightning_conv.losses.per_sample import SampleLosses


def test_samples_twice_with_different_labels():
    one_hot = torch.eye(10, dtype=torch.float64)[torch.arange(32) % 10]
    losses = SampleLosses(nn.MSELoss(), torch.cat([one_hot, one_hot.roll(1, 1)]))
    floor = loss_floor(losses, [(i, i + 32) for i in range(32)])
    found = finding_of_floor(floor, loss=0.06, what="labels", step=200)
    assert found.level == "warning"
    assert found.sentence == (
        "Samples 0 and 32 of the probe are equal and have different labels; 32 such pairs keep the loss on the probe at 0.05 or above, "
        "83 % of what it is now."
    )
    assert found.value == found.lower == found.upper == floor.value
    assert found.limit == 0.06


@pytest.mark.parametrize(
    ("loss", "level"), [(0.5, "warning"), (0.51, "notice"), (None, "notice"), (math.nan, "warning")]
)
def test_a_floor_matters_by_its_share_of_the_loss(loss, level):
    found = finding_of_floor(LossFloor(0.05, 0.05, ((7, 39, 40),)), loss=loss, of="the training set")
    assert found.level == level
    assert "Samples 7, 39 and 40 of the training set" in found.sentence
    assert "1 such group keeps" in found.sentence


def test_no_conflict_is_no_accusation():
    found = finding_of_floor(LossFloor(0.3, 0.0, ()), loss=0.3)
    assert (found.level, found.advice) == ("ok", "")


def test_three_units_for_ten_digits():
    losses = SampleLosses(nn.MSELoss(), torch.eye(10, dtype=torch.float64)[torch.arange(64) % 10])
    floor = width_floor(losses, 3)
    found = finding_of_width(3, 64, 10, floor=floor, loss=0.065, step=3)
    assert found.level == "warning"
    assert "3 features for 64 samples with 10 outputs" in found.sentence
    assert f"at {floor:.3g} or above, {100 * floor / 0.065:.0f} % of" in found.sentence
    assert "at least 10 features" in found.advice
    assert finding_of_width(3, 64, 10, floor=floor, loss=10.0).level == "notice"
    assert finding_of_width(3, 64, 10, floor=floor).level == "notice"


@pytest.mark.parametrize(
    ("width", "samples", "outputs", "level", "says"),
    [
        (3, 64, 10, "notice", "a space of 4 dimensions"),
        (128, 512, 10, "ok", "it alone cannot fit every choice"),
        (512, 64, 10, "ok", "enough"),
        (10, 512, 10, "ok", "it alone"),
    ],
)
def test_a_width_without_a_floor(width, samples, outputs, level, says):
    found = finding_of_width(width, samples, outputs, floor=None if width < 10 else 0.0)
    assert (found.level, found.advice) == (level, "")
    assert says in found.sentence


@pytest.mark.parametrize(
    ("lower", "upper", "columns", "samples", "level", "says"),
    [
        (64, 64, 129, 64, "ok", "independent"),
        (129, 129, 129, 512, "ok", "at most 129 for 512"),
        (5, 10, 129, 64, "notice", "at most 10 where 64 is possible"),
        (5, 64, 129, 64, "ok", "undecided"),
        (60, 63, 129, 64, "ok", "at most 63"),
    ],
)
def test_the_rank_says_what_is_proven(lower, upper, columns, samples, level, says):
    found = finding_of_rank(lower, upper, columns=columns, samples=samples)
    assert found.level == level
    assert says in found.sentence
    assert "frozen the loss is 0.1 or above" in (
        finding_of_rank(lower, upper, columns=columns, samples=samples, best=0.1).sentence
    )


def test_ranks_that_cannot_be_are_refused():
    for lower, upper in ((3, 2), (-1, 2), (0, 65)):
        with pytest.raises(ValueError, match="lower, upper"):
            finding_of_rank(lower, upper, columns=129, samples=64)


def test_a_last_layer_that_is_too_narrow_says_nothing_of_layers_that_may_not_be_there():
    found = finding_of_width(32, 64, 2)
    assert found.sentence == (
        "The last layer has 32 features for the 64 samples of the probe: it alone cannot fit every choice of targets; only layers before "
        "it could."
    )
