"""No narrow last layer has a smaller squared loss than the floor, and the best one has it."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from torch import nn

from lightning_conv.health.fit.width_floor import width_floor
from lightning_conv.losses.per_sample import SampleLosses


def targets_of(n, outputs, seed=0):
    return torch.randn(n, outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "outputs", "width"), [(20, 6, 3), (5, 9, 2), (20, 6, 0), (12, 4, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_best_approximation_by_forty_digits(bias, n, outputs, width, reduction):
    y = 3 + targets_of(n, outputs)
    found = width_floor(SampleLosses(nn.MSELoss(reduction=reduction), y), width, bias=bias)
    with mpmath.workdps(40):
        rows = mpmath.matrix(y.tolist())
        if bias:
            for j in range(outputs):
                mean = sum(rows[i, j] for i in range(n)) / n
                for i in range(n):
                    rows[i, j] -= mean
        values = mpmath.svd_r(rows, compute_uv=False)
        exact = float(sum(each**2 for each in list(values)[width:]))
    exact /= n * outputs if reduction == "mean" else 1
    assert found <= exact
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_no_network_gets_below_it_and_training_comes_close():
    torch.manual_seed(0)
    y, x = targets_of(16, 6), torch.randn(16, 8, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2), nn.Tanh(), nn.Linear(2, 6)).double()
    floor = width_floor(SampleLosses(nn.MSELoss(), y), 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(800):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        assert loss.item() >= floor
        optimizer.step()
    assert loss.item() < 1.3 * floor


def test_width_zero_is_the_variance_of_the_targets():
    y = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 0, 0, 1, 2, 3])]
    rows = [[Fraction(int(each)) for each in row] for row in y.tolist()]
    means = [sum(column) / 6 for column in zip(*rows, strict=True)]
    exact = sum((each - mean) ** 2 for row in rows for each, mean in zip(row, means, strict=True)) / 24
    found = width_floor(SampleLosses(nn.MSELoss(), y), 0)
    assert Fraction(found) <= exact
    assert found == pytest.approx(float(exact), rel=1e-12)


def test_three_units_for_ten_digits_and_ten_units():
    y = torch.eye(10, dtype=torch.float64)[torch.arange(64) % 10]
    losses = SampleLosses(nn.MSELoss(), y)
    assert 0.05 < width_floor(losses, 3) < 0.07
    assert width_floor(losses, 9) == pytest.approx(0.0, abs=1e-14)
    assert width_floor(losses, 10) == 0.0
    assert width_floor(SampleLosses(nn.MSELoss(), torch.zeros(4, 3)), 1) == 0.0


def test_other_losses_have_none():
    assert width_floor(SampleLosses(nn.CrossEntropyLoss(), torch.tensor([0, 1, 2])), 1) is None
    assert width_floor(SampleLosses(nn.HuberLoss(), targets_of(4, 3)), 1) is None
    with pytest.raises(ValueError, match="width"):
        width_floor(SampleLosses(nn.MSELoss(), targets_of(4, 3)), -1)


@pytest.mark.parametrize(
    ("width", "error"), [("a", TypeError), (1.5, TypeError), (math.nan, TypeError), (-1, ValueError)]
)
def test_a_width_that_is_none_is_refused(width, error):
    with pytest.raises(error, match=r"width: .*; need a whole number of at least 0"):
        width_floor(SampleLosses(nn.MSELoss(), torch.zeros(4, 2)), width)
    with pytest.raises(TypeError, match=r"losses: None; need SampleLosses"):
        width_floor(None, 2)
