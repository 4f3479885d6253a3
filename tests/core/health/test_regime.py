"""The regime is named where all numbers agree, and is undecided elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_conv import ntk_gram
from lightning_conv.health.kernel.linearisation import linearisation_error
from lightning_conv.health.kernel.regime import training_regime
from lightning_conv.kernels.drift import centred_alignment, relative_frobenius_change


@pytest.mark.parametrize(
    ("alignment", "change", "error", "progress", "regime", "why"),
    [
        (0.999, 0.05, 0.03, 10.0, "lazy", "predicts"),
        (0.999, 0.05, None, 10.0, "undecided", "not known"),
        (0.999, 0.05, 0.5, 10.0, "undecided", "does not predict"),
        (0.999, 0.05, 0.03, 1.1, "undecided", "less than 2-fold"),
        (0.5, 3.0, 20.0, 1.9, "undecided", "less than 2-fold"),
        (0.5, 3.0, 20.0, 10.0, "feature learning", "directions"),
        (0.5, 3.0, math.inf, 0.1, "undecided", "the loss has risen"),
        (0.5, 3.0, math.inf, 10.0, "feature learning", "directions"),
        (0.5, 3.0, None, 10.0, "feature learning", "directions"),
        (0.5, 3.0, 0.05, 10.0, "undecided", "and yet"),
        (0.9999, 3.0, 5.0, 10.0, "undecided", "its size"),
        (0.95, 0.3, 0.3, 10.0, "undecided", "between"),
        (math.nan, 0.05, 0.03, 10.0, "undecided", "not defined"),
        (0.5, math.inf, 0.03, 10.0, "undecided", "not defined"),
        (0.999, 0.05, math.nan, 10.0, "undecided", "not defined"),
        (0.999, 0.05, 0.03, math.nan, "undecided", "not finite"),
    ],
)
def test_the_three_numbers_decide_together(alignment, change, error, progress, regime, why):
    found = training_regime(alignment, change, error, progress=progress)
    assert found.regime == regime
    assert why in found.reason
    assert (found.alignment, found.change) == pytest.approx((alignment, change), nan_ok=True)


@given(st.floats(-1, 1), st.floats(0, 5), st.floats(0, 5), st.floats(0.01, 100), st.floats(0, 0.2))
def test_rounding_makes_no_judgement(alignment, change, error, progress, floor):
    exact = training_regime(alignment, change, error, progress=progress).regime
    rounded = training_regime(alignment, change, error, progress=progress, floor=floor).regime
    assert rounded in (exact, "undecided")


def test_negative_numbers_are_refused():
    for arguments in ((0.9, -0.1, 0.1, 0.0), (0.9, 0.1, -0.1, 0.0), (0.9, 0.1, 0.1, -1.0)):
        with pytest.raises(ValueError, match=r"need (0 or more|a finite number of at least 0)"):
            training_regime(*arguments[:3], progress=10.0, floor=arguments[3])


@pytest.mark.parametrize(("scale", "rate", "regime"), [(30.0, 0.1, "lazy"), (0.1, 0.03, "feature learning")])
def test_networks_with_a_large_and_a_small_output_scale(scale, rate, regime):
    """A factor at the output, with the rate over its square, makes a network lazy (Chizat et al. 2019); a small one does not."""
    found = [_regime(scale, rate, seed) for seed in range(5)]
    assert found.count(regime) >= 3
    assert set(found) <= {regime, "undecided"}


def _regime(scale, rate, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    origin = net(x).detach()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return scale * self.net(x)

    model = Scaled()

    def loss(u):
        return F.mse_loss(u - scale * origin, y)

    weights = {name: each.detach().clone() for name, each in model.named_parameters()}
    first = ntk_gram(model, x).matrix
    start = float(loss(model(x)).detach())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate / scale**2)
    for _ in range(1000):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
    now, last = float(loss(model(x)).detach()), ntk_gram(model, x).matrix
    error = linearisation_error(model, x, weights).error
    alignment, change = centred_alignment(last, first), relative_frobenius_change(last, first)
    return training_regime(alignment, change, error, progress=start / now).regime


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"alignment": "a"}, TypeError, "alignment: 'a' (str); need a number"),
        ({"change": None}, TypeError, "change: None; need a number"),
        ({"error": "a"}, TypeError, "error: 'a' (str); need a number"),
        ({"progress": "a"}, TypeError, "progress: 'a' (str); need a number"),
        ({"floor": math.nan}, ValueError, "floor: nan; need a finite number of at least 0"),
        ({"floor": -0.1}, ValueError, "floor: -0.1; need a finite number of at least 0"),
        ({"change": -0.1}, ValueError, "change: -0.1; need 0 or more"),
    ],
)
def test_a_bad_number_is_named(change, error, says):
    with pytest.raises(error) as raised:
        training_regime(**{"alignment": 0.99, "change": 0.1, "error": None, "progress": 10.0} | change)
    assert str(raised.value) == says


@pytest.mark.parametrize(
    ("progress", "reason"),
    [(math.nan, "a number is not finite or not defined"), (-5.0, "the loss has changed its sign")],
)
def test_a_loss_whose_factor_says_nothing_is_not_called_unchanged(progress, reason):
    found = training_regime(0.999, 0.01, 0.01, progress=progress)
    assert (found.regime, found.reason) == ("undecided", reason)


@pytest.mark.parametrize(
    ("change", "error", "beyond"),
    [(0.3, 0.3, True), (0.05, 0.3, False), (0.3, 0.05, False), (0.3, None, False), (math.nan, 0.3, False)],
)
def test_what_a_lazy_run_has_not_is_told_whatever_the_loss(change, error, beyond):
    found = training_regime(0.95, change, error, progress=1.1)
    assert found.regime == "undecided"
    assert found.beyond_lazy is beyond
