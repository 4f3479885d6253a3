"""Threshold networks: the patterns are all there are, the LASSO is their weight-decay problem, and its optimum is certified."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from lightning_conv.theory.papers.threshold import (
    arrangement_patterns,
    cell_count,
    duality_gap,
    fewest_units,
    lasso_objective,
    shattered_optimum,
    solve_threshold_network,
)


def gaussian(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def patterns_from_rays(rows: torch.Tensor) -> set[tuple[int, ...]]:
    """In general position every cell has a ray on which d - 1 samples vanish, and these may take any signs beside it."""
    n, d = rows.shape
    found = set()
    for chosen in combinations(range(n), d - 1):
        ray = torch.linalg.svd(rows[list(chosen)])[2][-1]
        for sign in (1, -1):
            bits = (sign * rows @ ray > 0).int().tolist()
            for own in product((0, 1), repeat=d - 1):
                for i, bit in zip(chosen, own, strict=True):
                    bits[i] = bit
                found.add(tuple(bits))
    return found


@pytest.mark.parametrize(("n", "d"), [(2, 2), (5, 2), (7, 3), (9, 3), (7, 4), (3, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_in_general_position_the_patterns_are_those_beside_the_rays_and_of_v_0(n, d, bias):
    rows = gaussian(n, d, seed=n + d)
    if bias:
        rows[:, -1] = 1.0
    arrangement = arrangement_patterns(rows)
    found = {tuple(column) for column in arrangement.patterns.T.int().tolist()}
    assert len(found) == arrangement.count
    assert found == patterns_from_rays(rows) | {(1,) * n}  # v = 0 gives all ones
    assert arrangement.general_position
    assert arrangement.complete
    assert len(patterns_from_rays(rows)) == cell_count(n, d)
    if bias:
        assert arrangement.count == cell_count(n, d)


def test_random_directions_find_no_other_pattern_and_each_direction_has_its_own():
    rows = gaussian(8, 3, seed=3)
    arrangement = arrangement_patterns(rows)
    listed = {tuple(column) for column in arrangement.patterns.T.int().tolist()}
    sampled = (rows @ gaussian(3, 200_000, seed=4) >= 0).int().unique(dim=1).T.tolist()
    assert {tuple(column) for column in sampled} <= listed
    strict = arrangement.directions.abs().sum(0) > 0
    assert torch.equal((rows @ arrangement.directions[:, strict] >= 0).double(), arrangement.patterns[:, strict])


def test_rows_that_are_not_in_general_position_get_the_patterns_of_the_boundary_too():
    arrangement = arrangement_patterns(torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    assert {tuple(c) for c in arrangement.patterns.T.int().tolist()} == {(1, 0), (0, 1), (1, 1)}
    # In the plane x, -x and y: v may lie on the line orthogonal to x, on either side of y.
    degenerate = arrangement_patterns(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    by_hand = {(a >= 0, -a >= 0, b >= 0) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert {tuple(map(bool, c)) for c in degenerate.patterns.T.int().tolist()} == by_hand
    assert not degenerate.general_position
    assert not degenerate.complete


def test_what_is_out_of_reach_is_refused_with_the_number():
    with pytest.raises(ValueError, match="60 samples of rank 5 have up to"):
        arrangement_patterns(gaussian(60, 5))
    with pytest.raises(ValueError, match="need a matrix"):
        arrangement_patterns(torch.zeros(3))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
def test_the_gap_bounds_the_distance_to_an_optimum_found_by_another_solver(seed, beta):
    patterns, targets = arrangement_patterns(gaussian(6, 2, seed=seed)).patterns, gaussian(6, 1, seed=seed + 1)[:, 0]
    optimum = solve_threshold_network(patterns, targets, beta)
    p = patterns.shape[1]

    def split(z):  # w = z+ - z-, a smooth problem with bounds
        w = torch.tensor(z[:p] - z[p:])
        residual = patterns @ w - targets
        gradient = patterns.T @ residual
        value = 0.5 * residual @ residual + beta * float(z.sum())
        return float(value), torch.cat([gradient + beta, -gradient + beta]).numpy()

    start, bounds = torch.zeros(2 * p, dtype=torch.float64).numpy(), [(0, None)] * (2 * p)
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000}
    other = minimize(split, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    assert optimum.lower <= other.fun + 1e-9
    assert optimum.objective <= other.fun + 1e-6
    assert optimum.gap <= 1e-6 * max(1.0, float(targets @ targets))
    assert optimum.units <= 6


def test_the_gap_of_any_weights_reaches_below_the_optimum():
    patterns, targets = arrangement_patterns(gaussian(7, 3)).patterns, gaussian(7, 1, seed=9)[:, 0]
    best = solve_threshold_network(patterns, targets, 0.2).objective
    for seed in range(20):
        weights = gaussian(patterns.shape[1], 1, seed=seed)[:, 0] * 0.1
        value = lasso_objective(patterns, targets, weights, 0.2)
        assert value >= best - 1e-9
        assert value - duality_gap(patterns, targets, weights, 0.2) <= best + 1e-9


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_fewer_units_give_the_same_outputs_at_no_higher_norm(seed):
    patterns = (gaussian(5, 16, seed=seed) > 0).double()
    weights = gaussian(16, 1, seed=seed + 1)[:, 0]
    fewer = fewest_units(patterns, weights)
    assert torch.allclose(patterns @ fewer, patterns @ weights, atol=1e-9)
    assert float(fewer.abs().sum()) <= float(weights.abs().sum()) * (1 + 1e-9)
    assert int((fewer != 0).sum()) <= 5


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 5.0))
def test_where_samples_are_shattered_the_optimum_has_a_closed_form(seed, beta):
    patterns = torch.tensor(list(product((0.0, 1.0), repeat=5)), dtype=torch.float64).T
    targets = gaussian(5, 1, seed=seed)[:, 0]
    outputs, value = shattered_optimum(targets, beta)
    optimum = solve_threshold_network(patterns, targets, beta)
    assert optimum.lower - 1e-9 <= value <= optimum.objective + 1e-9
    assert torch.allclose(patterns @ optimum.weights, outputs, atol=1e-3)


def test_linearly_independent_samples_are_shattered():
    assert arrangement_patterns(gaussian(6, 6)).count == 2**6


def test_a_network_of_the_convex_solution_has_its_objective_and_no_random_network_has_less():
    """The weight-decay loss of the network itself, all its parameters counted, against the LASSO."""
    inputs, targets, beta = gaussian(8, 3, seed=1), gaussian(8, 1, seed=2)[:, 0], 0.1
    arrangement = arrangement_patterns(inputs)
    optimum = solve_threshold_network(arrangement.patterns, targets, beta)

    def loss(directions, amplitudes, weights):
        outputs = (inputs @ directions >= 0).double() @ (amplitudes * weights)
        decay = sum(float(t.square().sum()) for t in (directions, amplitudes, weights))
        return float(0.5 * (outputs - targets).square().sum()) + beta / 2 * decay

    root = optimum.weights.abs().sqrt()
    built = loss(1e-9 * arrangement.directions, root, root * optimum.weights.sign())
    assert built == pytest.approx(optimum.objective, rel=1e-8)
    for seed in range(200):
        width = 1 + seed % 12
        tensors = gaussian(3, width, seed), gaussian(width, 1, seed + 1)[:, 0], gaussian(width, 1, seed + 2)[:, 0]
        assert loss(*tensors) >= optimum.lower


def test_impossible_settings_get_one_message():
    with pytest.raises(ValueError, match="beta: 0"):
        solve_threshold_network(torch.eye(2), torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="beta: -1"):
        shattered_optimum(torch.zeros(2), -1.0)
    with pytest.raises(ValueError, match=r"\(2, 2\), \(3,\)"):
        solve_threshold_network(torch.eye(2), torch.zeros(3), 1.0)
