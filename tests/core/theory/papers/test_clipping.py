"""delta-GClip: its step is the formula, and its bounds hold where the hypotheses do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_conv.theory.papers.clipping import (
    ClippedPath,
    clipped_loss_bound,
    clipped_path_bound,
    clipping_criteria,
    clipping_factor,
    clipping_regime,
)

positive = st.floats(1e-6, 1e6)


@given(norm=st.floats(0, 1e9), gamma=positive, delta=st.floats(0, 1))
def test_the_factor_is_the_formula_and_its_regime_says_which_term_decides(norm, gamma, delta):
    ratio = gamma / norm if norm else math.inf
    expected = sorted([min(delta, 1.0), ratio, 1.0])[1]  # the middle one of delta <= 1 and gamma / |g|
    assert clipping_factor(norm, gamma=gamma, delta=delta) == pytest.approx(expected, rel=1e-12)
    regime = clipping_regime(norm, gamma=gamma, delta=delta)
    assert regime == ("full" if ratio >= 1 or delta == 1 else "floor" if ratio <= delta else "clipped")


def test_delta_one_is_gradient_descent_and_delta_zero_keeps_the_step_at_gamma():
    assert clipping_factor(1e6, gamma=1e-3, delta=1.0) == 1.0
    assert 1e6 * clipping_factor(1e6, gamma=1e-3, delta=0.0) == pytest.approx(1e-3)
    assert clipping_factor(0.0, gamma=1.0, delta=0.1) == 1.0
    assert math.isnan(clipping_factor(math.nan, gamma=1.0, delta=0.1))


@pytest.mark.parametrize(
    ("gamma", "delta", "message"),
    [(0, 0.1, "gamma: 0"), (-1, 0.1, "gamma: -1"), (math.inf, 0.1, "gamma: inf"), (1, 1.5, "delta: 1.5"), (1, -0.1, "delta: -0.1")],
)  # fmt: skip
def test_settings_that_are_none_are_refused(gamma, delta, message):
    with pytest.raises(ValueError, match=message):
        clipping_factor(1.0, gamma=gamma, delta=delta)


def quadratic_run(
    eta_over_beta: float, delta: float, steps: int = 400
) -> tuple[ClippedPath, torch.Tensor, torch.Tensor]:
    """f = 1/2 w^T A w with eigenvalues 1 ... 10: beta = 10 and |grad f|^2 >= 2 f."""
    values = torch.linspace(1, 10, 7, dtype=torch.float64)
    eta = eta_over_beta / 10
    w = 30 * torch.ones(7, dtype=torch.float64)
    losses, norms, points = [], [], [w]
    for _ in range(steps):
        gradient = values * w
        losses.append(float(0.5 * (values * w * w).sum()))
        norms.append(float(gradient.norm()))
        w = w - eta * clipping_factor(norms[-1], gamma=20.0, delta=delta) * gradient
        points.append(w)
    losses.append(float(0.5 * (values * w * w).sum()))
    return ClippedPath(eta, 20.0, delta, losses, norms), torch.stack(points), values


def test_on_a_quadratic_every_inequality_holds_and_all_regimes_occur():
    path, points, _ = quadratic_run(1.0, 0.1)
    assert set(path.regimes) == {"full", "clipped", "floor"}
    assert [criterion.verdict for criterion in clipping_criteria(path, mu=2.0)] == ["consistent"] * 4
    assert path.length == pytest.approx(float((points[1:] - points[:-1]).norm(dim=1).sum()), rel=1e-12)
    assert path.length <= clipped_path_bound(path.losses[0], 2.0)


def test_a_step_beyond_the_smoothness_refutes_descent_and_too_large_a_mu_refutes_pl():
    too_long, _, _ = quadratic_run(1.9, 0.9, steps=60)
    assert {c.name: c.verdict for c in clipping_criteria(too_long, mu=2.0)}["clipping_descent"] == "refuted"
    path, _, _ = quadratic_run(1.0, 0.1)
    assert {c.name: c.verdict for c in clipping_criteria(path, mu=2.5)}["clipping_pl"] == "refuted"


def test_the_rate_is_refuted_by_a_loss_above_it_and_the_length_by_a_detour():
    slow = ClippedPath(0.1, 1.0, 0.5, [1.0, 0.99, 0.98], [1.0, 1.0])
    verdicts = {c.name: c.verdict for c in clipping_criteria(slow, mu=1.0)}  # (1 - 0.025)^t
    assert verdicts["clipping_rate"] == "refuted"
    wandering = ClippedPath(1.0, 100.0, 0.5, [1.0] + [0.5] * 10, [1.0] * 10)
    assert {c.name: c.verdict for c in clipping_criteria(wandering, mu=1.0)}["clipping_length"] == "refuted"


def test_the_bound_is_the_geometric_one_and_impossible_constants_are_refused():
    bound = 3.0
    for _ in range(17):
        bound *= 1 - 0.2 * 0.5 * 0.3 / 2
    assert clipped_loss_bound(3.0, eta=0.2, delta=0.5, mu=0.3, steps=17) == pytest.approx(bound, rel=1e-13)
    with pytest.raises(ValueError, match="eta delta mu / 2 = 3"):
        clipped_loss_bound(1.0, eta=2.0, delta=1.0, mu=3.0, steps=1)
    with pytest.raises(ValueError, match="mu: 0"):
        clipping_criteria(quadratic_run(1.0, 0.1, steps=2)[0], mu=0.0)
    with pytest.raises(ValueError, match="2 and 2"):
        ClippedPath(1.0, 1.0, 0.5, [1.0, 1.0], [1.0, 1.0])


@pytest.mark.parametrize(("eta", "steps"), [(1.0, 1201), (2.0, 1)])
def test_a_loss_above_a_bound_of_zero_refutes_the_rate(eta, steps):
    stuck = ClippedPath(eta, 1.0, 1.0, [1.0] * (steps + 1), [1.0] * steps)  # the bound is 2^-1201 or 0
    assert {c.name: c.verdict for c in clipping_criteria(stuck, mu=1.0)}["clipping_rate"] == "refuted"


def test_where_no_loss_is_above_rounding_the_rate_is_undecided():
    done = ClippedPath(1.0, 1.0, 1.0, [1.0, 0.0], [1.0])
    assert {c.name: c.verdict for c in clipping_criteria(done, mu=1.0)}["clipping_rate"] == "undecided"
