"""The floor of a frozen trunk encloses the least loss that other solvers find, and is said as a notice at most."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightning_conv.health.findings.of_head import finding_of_head
from lightning_conv.health.fit.head_floor import HeadFloor, head_floor
from lightning_conv.last_layer.problem import HeadProblem

GENERATOR = torch.Generator().manual_seed(0)
H = torch.randn(60, 5, generator=GENERATOR, dtype=torch.float64)
VALUES = torch.randn(60, 3, generator=GENERATOR, dtype=torch.float64)
CLASSES = (H[:, 0] + 2 * torch.randn(60, generator=GENERATOR, dtype=torch.float64) > 0).long()


def least_squares(bias):
    rows = torch.cat([H, torch.ones(60, 1, dtype=torch.float64)], 1) if bias else H
    rest = VALUES - rows @ torch.linalg.lstsq(rows, VALUES).solution
    return float(rest.square().sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("reduction", "over"), [("mean", 180), ("sum", 1)])
def test_a_squared_loss_has_that_of_the_least_squares(bias, reduction, over):
    found = head_floor(HeadProblem(H, VALUES, nn.MSELoss(reduction=reduction), bias=bias), tol=1e-8, radius=1e3)
    least = least_squares(bias) / over
    assert found.lower <= least * (1 + 1e-12)
    assert least <= found.upper * (1 + 1e-12)
    assert found.upper - found.lower <= 1e-6 * least
    assert found.radius == math.inf


def test_cross_entropy_has_that_of_an_unregularised_logistic_regression():
    fitted = LogisticRegression(C=math.inf, tol=1e-12, max_iter=10_000).fit(H.numpy(), CLASSES.numpy())
    chosen = torch.tensor(fitted.predict_log_proba(H.numpy()))[torch.arange(60), CLASSES]
    least = -float(chosen.mean())
    found = head_floor(HeadProblem(H, CLASSES, nn.CrossEntropyLoss()), tol=1e-5, radius=1e3)
    assert found.lower <= least <= found.upper + 1e-9
    assert found.upper - found.lower <= 1e-5
    assert found.lower > 0.3


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_what_is_proven_holds_wherever_the_solver_ends(iterations):
    problem = HeadProblem(H, CLASSES, nn.CrossEntropyLoss())
    early, late = (
        head_floor(problem, tol=1e-4, radius=100.0, iterations=iterations),
        head_floor(problem, tol=1e-4, radius=100.0),
    )
    assert early.lower <= late.upper
    assert early.upper >= late.lower


def test_where_the_best_layer_is_at_infinity_a_ball_has_a_floor():
    """Class 2 lies on one side, so that its probability can go to 0 and 1 only; classes 0 and 1 overlap."""
    side = (H[:, 1] > 0.5).long()
    classes = torch.where(side == 1, 2, CLASSES)
    problem = HeadProblem(H, classes, nn.CrossEntropyLoss())
    found = head_floor(problem, tol=0.01, radius=50.0)
    assert 50.0 <= found.radius < math.inf
    kept = 1 - side
    alone = HeadProblem(H[kept == 1], CLASSES[kept == 1], nn.CrossEntropyLoss())
    least = head_floor(alone, tol=1e-6, radius=50.0)
    share = float(kept.double().mean())
    assert share * least.lower <= found.upper  # no layer has less, of whatever norm
    assert found.upper - found.lower <= 0.05
    assert found.lower > 0.2
    for seed in range(20):
        w = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert problem.value(50 * w / w.norm()).value >= found.lower


def test_a_radius_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"radius: 0\.0; need a finite number above 0"):
        head_floor(HeadProblem(H, CLASSES, nn.CrossEntropyLoss()), tol=0.1, radius=0.0)


def test_a_head_that_reaches_every_output_has_no_floor():
    wide = torch.randn(20, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = head_floor(HeadProblem(wide, CLASSES[:20], nn.CrossEntropyLoss()), tol=1e-3, radius=1e3)
    assert found.lower == 0
    assert found.upper <= 1e-3


def test_it_is_a_notice_if_it_is_a_tenth_of_the_loss_and_ok_below():
    notice = finding_of_head(HeadFloor(lower=0.2, upper=0.21), loss=1.0, step=3)
    assert notice.level == "notice"
    assert (
        "no last layer has a loss below 0.2 on the probe; the present one is 1, and 20 % of it cannot go away"
        in notice.sentence
    )
    assert (notice.value, notice.lower, notice.upper, notice.limit, notice.step) == (0.2, 0.2, 0.21, 1.0, 3)
    limited = finding_of_head(HeadFloor(lower=0.2, upper=0.21, radius=5e3), loss=0.2)
    assert "(proven for weights of a norm of at most 5,000)" in limited.sentence
    small = finding_of_head(HeadFloor(lower=0.05, upper=0.06), loss=1.0)
    assert (small.level, small.advice) == ("ok", "")
    assert "which is 1, to 0.06 or below" in small.sentence


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"problem": None}, TypeError, "problem: None; need HeadProblem(features, targets, loss_fn)"),
        ({"tol": "a"}, TypeError, "tol: 'a' (str); need a finite number above 0"),
        ({"tol": math.nan}, ValueError, "tol: nan; need a finite number above 0"),
        ({"radius": math.inf}, ValueError, "radius: inf; need a finite number above 0"),
        ({"iterations": 0}, ValueError, "iterations: 0; need a whole number of at least 1"),
    ],
)
def test_a_bad_argument_is_named(change, error, says):
    problem = HeadProblem(torch.ones(4, 1), torch.zeros(4, 1), nn.MSELoss())
    with pytest.raises(error) as raised:
        head_floor(**{"problem": problem, "tol": 1e-3, "radius": 1.0} | change)
    assert str(raised.value) == says
