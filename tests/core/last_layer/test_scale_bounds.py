"""The bounds of phase 2 are never below the exact numbers that they bound, at any size; sizes that cannot be solved with are refused."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv import (
    Comparator,
    HeadProblem,
    batch_curvature,
    comparator,
    comparators,
    gradient_descent_bound,
    gradient_descent_steps,
    linear_bound,
    sgd_bound,
    sgd_interpolation_bound,
    solve_head,
)
from lightning_conv.last_layer.bounds import rounded_bound
from lightning_conv.last_layer.dual import HeadDual

SIZES = st.floats(1e-150, 1e150)
ANY = st.floats(0, allow_infinity=False)


def above(found: float, exact) -> bool:
    return found == math.inf or Fraction(found) >= exact


@settings(max_examples=300, deadline=None)
@given(stay=ANY, excess=ANY, distance=ANY, step=st.floats(5e-324, 1e300), steps=st.integers(1, 10**6))
@example(stay=2.225073858507e-311, excess=5e-324, distance=2.225073858507e-311, step=5e-324, steps=2)
def test_the_bound_of_gradient_descent_is_not_below_the_exact_one(stay, excess, distance, step, steps):
    price = Fraction(distance) ** 2 / (2 * Fraction(step) * steps)
    only = gradient_descent_bound(Comparator(excess, distance), step, steps)
    if distance > 0:
        assert above(only, Fraction(excess) + price)
    found = gradient_descent_bound([Comparator(stay, 0.0), Comparator(excess, distance)], step, steps)
    saved = Fraction(stay) - Fraction(excess)
    exact = Fraction(stay)
    if distance > 0 and saved > 0:
        exact = Fraction(excess) + price if saved >= 2 * price else exact - saved**2 / (4 * price)
    if distance > 0:
        assert above(found, min(exact, Fraction(stay)))
        # Not loose either, unless the price overflows.
        assert price > Fraction(1e308) or found <= math.nextafter(
            float(min(exact, Fraction(stay))) * (1 + 1e-13), math.inf
        )


@settings(max_examples=100, deadline=None)
@given(excess=st.floats(0, 0.4), distance=SIZES, step=SIZES)
def test_the_number_of_steps_reaches_the_gap(excess, distance, step):
    family = [Comparator(1.0, 0.0), Comparator(excess, distance)]
    steps = gradient_descent_steps(family, step, 0.5)
    if math.isfinite(steps):
        assert gradient_descent_bound(family, step, steps) <= 0.5
        assert steps == 1 or gradient_descent_bound(family, step, steps // 2) > 0.5 * (1 - 1e-9)


@settings(max_examples=300, deadline=None)
@example(gap=1.7976931348623091e308, mu=1.0, share=3.842683895344844e-292, steps=1)
@given(gap=ANY, mu=st.floats(1e-300, 1e300), share=st.floats(0, 1), steps=st.integers(0, 10**7))
def test_the_linear_bound_is_not_below_the_exact_one(gap, mu, share, steps):
    step = share / mu
    if not 0 < step < math.inf or step * mu > 1:
        return
    found = linear_bound(gap, step, mu, steps)
    with mpmath.workdps(60):
        contraction = mpmath.mpf(step) * mpmath.mpf(mu)
        exact = mpmath.mpf(gap) * mpmath.power(max(1 - contraction, 0), 2 * steps) if steps else mpmath.mpf(gap)
        assert found >= exact
        if share < 0.99:  # beyond, 1 - eta mu is lost in its rounding
            tight = exact * (1 + mpmath.mpf(10) ** -8) + mpmath.mpf(gap) * mpmath.mpf(10) ** -300
            assert found <= tight + mpmath.mpf(10) ** -320


@settings(max_examples=200, deadline=None)
@given(bound=ANY, drift=ANY, curvature=ANY)
def test_the_bound_for_rounded_steps_is_not_below_the_exact_one(bound, drift, curvature):
    found = rounded_bound(bound, drift, curvature)
    with mpmath.workdps(60):
        exact = (mpmath.sqrt(bound) + mpmath.sqrt(mpmath.mpf(curvature) / 2) * drift) ** 2
        assert found == math.inf or found >= exact


@settings(max_examples=200, deadline=None)
@example(0.0, 1e-150, 18376.0, [5.960464477539063e-08], 5.711171658090467e149)
@given(
    excess=st.floats(0, 1e3),
    distance=SIZES,
    noise=SIZES,
    shares=st.lists(st.floats(1e-12, 1 - 1e-12), min_size=1, max_size=20),
    curvature=SIZES,
)
def test_bounds_of_stochastic_steps_are_not_below_the_exact_ones(excess, distance, noise, shares, curvature):
    steps = torch.tensor(shares, dtype=torch.float64) / curvature
    exact = [Fraction(s) for s in steps.tolist()]
    found = sgd_bound(Comparator(excess, distance), noise, steps)
    squares = sum(s**2 for s in exact)
    assert above(
        found, Fraction(excess) + (Fraction(distance) ** 2 + Fraction(noise) ** 2 * squares) / (2 * sum(exact))
    )
    useful = sum(s * (1 - s * Fraction(curvature)) for s in exact)
    if float(steps.max()) * curvature < 1 and useful > 0:
        found = sgd_interpolation_bound(Comparator(excess, distance), curvature, steps)
        assert above(found, (Fraction(distance) ** 2 + 2 * Fraction(excess) * sum(exact)) / (2 * useful))


def squared(h, y, bias=False):
    return HeadProblem(h, y, nn.MSELoss(), bias=bias)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e-162, 1e-160, 1e-150, 1.0, 1e150])
def test_a_loss_whose_squares_vanish_is_not_certified_as_zero(size):
    torch.manual_seed(0)
    y = torch.randn(4, 2, dtype=torch.float64) * size
    found = squared(torch.randn(4, 3, dtype=torch.float64), y).value(torch.zeros(3, 2, dtype=torch.float64))
    exact = sum(Fraction(x) ** 2 for row in y.tolist() for x in row) / 8
    assert found.certified
    assert Fraction(found.lower) <= exact <= Fraction(found.upper)


@pytest.mark.parametrize("size", [1e-310, 1e-170, 1e-81, 1.0, 1e81, 1e150])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_curvature_of_a_batch_is_not_below_the_exact_one(size, batch):
    torch.manual_seed(1)
    h = torch.randn(4, 3, dtype=torch.float64) * size
    found = batch_curvature(squared(h, torch.zeros(4, 1, dtype=torch.float64)), batch)
    with mpmath.workdps(60):
        rows = mpmath.matrix(h.tolist())
        for first in range(4 - batch + 1):
            part = rows[first : first + batch, :]
            exact = mpmath.mpf(2) / batch * mpmath.eigsy(part * part.T, eigvals_only=True)[batch - 1]
            assert found >= exact


@pytest.mark.parametrize("size", [1e-310, 1e-170, 1.0, 1e170, 1e300])
def test_the_distance_of_a_comparator_is_not_below_the_exact_one(size):
    torch.manual_seed(2)
    w = torch.randn(3, 2, dtype=torch.float64) * size
    problem = squared(torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))
    found = comparator(problem, torch.zeros(3, 2, dtype=torch.float64), w).distance
    assert Fraction(found) ** 2 >= sum(Fraction(x) ** 2 for row in w.tolist() for x in row)
    assert found <= float(size) * 10


@pytest.mark.parametrize(
    ("size", "bias", "words"),
    [
        (1e160, True, "overflow; divide"),
        (1e160, False, "overflow; divide"),
        (1e300, True, "overflow; divide"),
        (1e-160, False, "vanish; multiply"),
        (1e-310, False, "vanish; multiply"),
    ],
)
def test_features_that_cannot_be_solved_with_are_refused_in_a_sentence(size, bias, words):
    torch.manual_seed(0)
    problem = squared(torch.randn(4, 5, dtype=torch.float64) * size, torch.randn(4, 1, dtype=torch.float64), bias)
    for call in (solve_head, HeadDual, lambda p: comparators(p, p.zeros())):
        with pytest.raises(ValueError, match=rf"^features: of size up to .*, whose products {words} by a constant$"):
            call(problem)


def test_zero_features_without_a_bias_are_refused_in_a_sentence():
    problem = squared(torch.zeros(4, 5, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="features: all zero without a trained bias"):
        solve_head(problem)


def test_tiny_features_beside_a_bias_are_solved():
    problem = squared(torch.full((4, 2), 1e-170, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64), bias=True)
    assert solve_head(problem, tol=1e-6).verdict == "certified"
