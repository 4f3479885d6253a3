"""Chatterjee's criterion: proven bounds are never undercut, refutations are real, and a certified run does what was promised."""

import math
from itertools import pairwise

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv.losses.objective import Objective
from lightning_conv.theory.papers.chatterjee import (
    affine_independence,
    aligned_points,
    alpha_ratio,
    certify_alpha,
    certify_descent,
    criterion_score,
    judge_ball,
    judge_path,
    judge_positive_start,
    least_radius,
    length_bound,
    positive_init_,
    sampled_alpha,
    sampled_infima,
    score_ceiling,
    smallest_output_weight,
)
from lightning_conv.theory.tools.descent import Descent, gradient_descent


def tanh_network(*widths, bias=True):
    modules = []
    for wide, narrow in pairwise(widths):
        modules += [nn.Linear(wide, narrow, bias=bias), nn.Tanh()]
    return nn.Sequential(*modules[:-1]).double()


def independent_data(n=4, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0][:n]
    inputs = inputs + 0.2 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(n, generator=generator, dtype=torch.float64)


def test_the_ratio_is_twice_a_rayleigh_quotient_of_the_kernel(naive_gram):
    model = tanh_network(3, 5, 1)
    inputs, targets = torch.randn(6, 3).double(), torch.randn(6).double()
    objective = Objective(model, inputs, targets, lambda u, y: (u - y).square().sum() / 2)
    value, gradient = objective.value_and_gradient(objective.start)
    gram, residual = naive_gram(model, inputs), objective.residual(objective.start)
    ratio = alpha_ratio(value, float(gradient.norm()))
    assert ratio == pytest.approx(float(2 * residual @ gram @ residual / (residual @ residual)), rel=1e-10)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert 2 * eigenvalues[0] <= ratio <= 2 * eigenvalues[-1]
    assert alpha_ratio(0.0, 0.0) == math.inf
    with pytest.raises(ValueError, match="never negative"):
        alpha_ratio(-1.0, 1.0)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    radius=st.floats(0.01, 1.0),
    weight=st.floats(0.5, 5.0),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_adversary_undercuts_a_certified_alpha(hidden, radius, weight, bias, seed):
    model = tanh_network(6, *hidden, 1, bias=bias)
    positive_init_(model, A=weight, seed=seed)
    inputs, targets = independent_data(seed=seed)
    certified = certify_alpha(model, inputs, radius).lower
    objective = Objective(model, inputs, targets, nn.MSELoss())
    found = sampled_alpha(
        objective, radius, points=20, descents=2, steps=15, candidates=aligned_points(objective), seed=seed
    )
    assert found.distance <= radius
    assert found.ratio >= certified * (1 - 1e-9)


def test_a_certified_alpha_loses_little_in_a_small_ball():
    """Wide and with large output weights the first layer is nearly all of the kernel; the adversary gets within two percent."""
    model = tanh_network(6, 50, 1)
    positive_init_(model, A=20.0)
    inputs, targets = independent_data()
    objective = Objective(model, inputs, targets, nn.MSELoss())
    certified = certify_alpha(model, inputs, 0.05).lower
    found = sampled_alpha(objective, 0.05, candidates=aligned_points(objective), points=4, descents=1)
    assert certified <= found.ratio <= 1.02 * certified


@pytest.mark.parametrize("bias", [True, False])
def test_the_certified_alpha_is_the_formula_evaluated_by_hand(bias):
    model = tanh_network(6, 3, 2, 1, bias=bias)
    positive_init_(model, A=4.0, kappa=0.7)
    inputs, _ = independent_data()
    r, n = 0.05, 4
    rows = torch.cat([inputs, torch.ones(n, 1)], 1) if bias else inputs
    smallest = min(mpmath.eigsy(mpmath.matrix((rows @ rows.T).tolist()), eigvals_only=True))
    w2, w3 = model[2].weight.detach(), model[4].weight.detach()
    h1 = z1 = r * float(rows.norm(dim=1).max())  # tanh z <= z
    reach = r * math.sqrt(h1**2 + bias)
    z2 = min(float(w2.norm(dim=1).max()) * h1, float(torch.linalg.matrix_norm(w2, 2)) * h1) + reach
    v = (float(w2.sum(1).min()) / math.sqrt(3) - r) * (float(w3.sum()) - r * math.sqrt(2))
    gain = v / math.cosh(z1) ** 2 / math.cosh(z2) ** 2
    assert certify_alpha(model, inputs, r).lower == pytest.approx(4 / n * float(smallest) * gain**2, rel=1e-5)
    simple = (4.0 - r) * (0.7 - r) * 2 * math.sqrt(3) / math.cosh(z1) ** 2 / math.cosh(z2) ** 2
    assert certify_alpha(model, inputs, r).lower >= 4 / n * float(smallest) * simple**2


def test_dependent_inputs_are_told_and_give_nothing():
    model = tanh_network(3, 4, 1)
    positive_init_(model, A=100.0)
    inputs = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.5, 0.5, 0]]).double()  # affinely dependent
    bound = certify_alpha(model, inputs, 0.1)
    assert bound.lower == 0
    assert "not proven independent" in bound.reason
    certificate = certify_descent(model, inputs, torch.ones(3))
    assert (certificate.criterion.verdict, certificate.holds, certificate.rate) == ("undecided", False, 0.0)
    with pytest.raises(ValueError, match="not proven independent"):
        smallest_output_weight(model, inputs, torch.ones(3))


def test_affine_independence_needs_one_dimension_less():
    simplex = torch.cat([torch.zeros(1, 3), torch.eye(3)])  # n = d + 1
    assert affine_independence(simplex).verdict == "certified"
    assert affine_independence(simplex, bias=False).verdict == "refuted"
    exact = mpmath.svd_r(mpmath.matrix(torch.cat([simplex, torch.ones(4, 1)], 1).tolist()), compute_uv=False)
    bound = affine_independence(simplex).sigma_min
    assert bound.lower <= min(exact) <= bound.upper


@settings(max_examples=12, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 3), min_size=1, max_size=2), seed=st.integers(0, 2**16), weight=st.floats(1.0, 6.0)
)
def test_no_point_of_the_ball_with_a_smaller_loss_is_more_curved_than_certified(hidden, seed, weight):
    model = tanh_network(6, *hidden, 1)
    positive_init_(model, A=weight, seed=seed)
    inputs, targets = independent_data(seed=seed)
    radius = 0.3
    certificate = certify_descent(model, inputs, targets, radius=radius)
    objective = Objective(model, inputs, targets, nn.MSELoss())
    assert certificate.value.lower <= objective.value(objective.start) <= certificate.value.upper
    generator = torch.Generator().manual_seed(seed)
    _, downhill = objective.value_and_gradient(objective.start)
    for k in range(12):
        direction = torch.randn(objective.size, generator=generator, dtype=torch.float64)
        direction = direction / direction.norm() * 0.5 - (k % 2) * downhill / downhill.norm()
        x = objective.start + direction / direction.norm() * (radius * (k + 1) / 12)
        if objective.value(x) <= certificate.value.lower:
            hessian = torch.autograd.functional.hessian(objective.loss, x)
            assert float(torch.linalg.matrix_norm(hessian, 2)) <= certificate.smoothness


def test_a_positive_start_is_told_from_another_one_and_says_why():
    model = tanh_network(6, 5, 4, 1)
    positive_init_(model, A=7.0, kappa=0.5)
    found = judge_positive_start(model)
    assert found.verdict == "certified"
    assert found.measured == pytest.approx(float(model[2].weight.detach().min()))

    def broken(change):
        positive_init_(model, A=7.0)
        with torch.no_grad():
            change()
        other = judge_positive_start(model)
        assert other.verdict == "not applicable"
        return other.reason

    assert "W_1" in broken(lambda: model[0].weight[1, 2].fill_(1e-9))
    assert "biases" in broken(lambda: model[4].bias.fill_(-0.1))
    assert "not positive" in broken(lambda: model[2].weight[0, 0].fill_(0.0))
    assert "not positive" in broken(lambda: model[4].weight[0, 3].fill_(-1.0))
    sigmoid = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1)).double()
    positive_init_(sigmoid, A=1.0)
    assert "s(0)" in judge_positive_start(sigmoid).reason


@pytest.mark.parametrize("hidden", [(8,), (6, 4), (3, 3, 3)])
def test_a_certified_run_keeps_its_promises_at_every_step(hidden):
    model = tanh_network(6, *hidden, 1)
    inputs, targets = independent_data()
    weight = smallest_output_weight(model, inputs, targets)
    positive_init_(model, A=weight)
    certificate = certify_descent(model, inputs, targets)
    assert certificate.holds
    assert certificate.flow.verdict == "certified"
    objective = Objective(model, inputs, targets, nn.MSELoss())
    path = gradient_descent(objective, certificate.step, steps=3000, until=1e-14)
    criteria = judge_path(path, certificate=certificate)
    assert {criterion.verdict for criterion in criteria} == {"consistent"}
    # The promises by hand, with nothing of ``judge_path``.
    loss, x, delta = path.losses[0], objective.start, certificate.rate
    assert delta > 0
    for k in (1, 10, path.taken):
        assert path.losses[k] <= (1 - delta) ** k * loss * (1 + 1e-9)
    assert float((path.final - x).norm()) <= certificate.length < certificate.radius
    assert path.losses[-1] < path.losses[0] / 2


def test_a_larger_step_than_certified_is_not_judged_by_the_certificate():
    model = tanh_network(6, 8, 1)
    positive_init_(model, A=50.0)
    inputs, targets = independent_data()
    certificate = certify_descent(model, inputs, targets)
    path = gradient_descent(Objective(model, inputs, targets, nn.MSELoss()), 1.5 * certificate.step, steps=3)
    with pytest.raises(ValueError, match="steps up to"):
        judge_path(path, certificate=certificate)
    assert [criterion.name for criterion in judge_path(path)] == ["descent_efficiency", "path_length"]


def test_the_smallest_output_weight_is_the_smallest_and_moves_no_loss():
    model, (inputs, targets) = tanh_network(6, 5, 4, 1), independent_data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = smallest_output_weight(model, inputs, targets, tolerance=0.01)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for factor, holds in ((1.0, True), (0.97, False)):
        positive_init_(model, A=factor * weight)
        certificate = certify_descent(model, inputs, targets)
        assert certificate.holds == holds
        assert certificate.value.value == pytest.approx(float(targets.square().mean()), rel=1e-14)
    shifted = nn.Sequential(nn.Linear(6, 3), nn.Sigmoid(), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"s\(0\)"):
        smallest_output_weight(shifted, inputs, targets)


def test_alpha_grows_as_the_square_of_the_output_weight():
    model, (inputs, _) = tanh_network(6, 5, 1), independent_data()
    bounds = []
    for weight in (1e3, 1e4):
        positive_init_(model, A=weight)
        bounds.append(certify_alpha(model, inputs, 0.1).lower)
    assert bounds[1] / bounds[0] == pytest.approx(100, rel=1e-3)


def test_positive_initialisation_is_what_it_says_and_takes_no_global_randomness():
    model = tanh_network(6, 5, 4, 1)
    state = torch.get_rng_state()
    positive_init_(model, A=7.0, kappa=0.5, spread=0.2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[0].weight.any()
    assert not any(layer.bias.any() for layer in model if isinstance(layer, nn.Linear))
    assert 0.5 <= float(model[2].weight.detach().min()) < float(model[2].weight.detach().max()) <= 0.6
    assert 7.0 <= float(model[4].weight.detach().min()) < float(model[4].weight.detach().max()) <= 8.4
    with pytest.raises(ValueError, match="A, kappa, spread: -1"):
        positive_init_(model, A=-1.0)


def test_a_stationary_point_in_the_ball_is_found_by_descent_on_the_ratio():
    """f = mean (v tanh(w) - 1)^2: the origin is stationary with f = 1, and lies at distance |x_0|."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(0.3)
        model[2].weight.fill_(-0.2)
    objective = Objective(model, torch.ones(1, 1), torch.ones(1), nn.MSELoss())
    near = sampled_alpha(objective, 0.1, steps=100)
    far = sampled_alpha(objective, 0.5, steps=100)
    assert far.ratio < 1e-6 < 1e-2 < near.ratio
    assert far.distance == pytest.approx(math.hypot(0.3, 0.2), rel=1e-2)
    grid = torch.linspace(-0.1, 0.1, 201, dtype=torch.float64)
    points = [objective.start + torch.stack([a, b]) for a in grid[::4] for b in grid[::4] if math.hypot(a, b) <= 0.1]
    brute = min(alpha_ratio(v, float(g.norm())) for v, g in map(objective.value_and_gradient, points))
    assert near.ratio <= 1.001 * brute


def test_candidates_outside_the_ball_do_not_count():
    model, (inputs, targets) = tanh_network(6, 4, 1), independent_data()
    objective = Objective(model, inputs, targets, nn.MSELoss())
    still = torch.zeros(objective.size, dtype=torch.float64)
    still[-1] = targets.mean()  # no gradient there
    distance = float((still - objective.start).norm())
    inside = sampled_alpha(objective, 1.01 * distance, points=0, descents=0, candidates=[still])
    outside = sampled_alpha(objective, 0.99 * distance, points=0, descents=0, candidates=[still])
    assert inside.ratio < 1e-20
    assert outside.ratio == alpha_ratio(*_value_and_norm(objective, objective.start))


def _value_and_norm(objective, x):
    value, gradient = objective.value_and_gradient(x)
    return value, float(gradient.norm())


@settings(max_examples=50, deadline=None)
@given(
    ratios=st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4),
    distances=st.lists(st.floats(0.01, 5.0), min_size=3, max_size=3, unique=True),
    value=st.floats(0.1, 10.0),
    radius=st.none() | st.floats(0.05, 8.0),
)
def test_no_radius_scores_above_the_ceiling_and_none_below_refuted_to_passes(ratios, distances, value, radius):
    """Alpha a step function that falls at each point: the worst case of what is known."""
    points = list(zip([0.0, *distances], ratios, strict=True))
    ceiling = score_ceiling(value, points, radius=radius)
    farthest = max(distances) if radius is None else radius
    passing = []
    for r in torch.linspace(0.001, 1.0, 400, dtype=torch.float64).mul(farthest).tolist():
        alpha = min(ratio for distance, ratio in points if distance <= r * (1 - 1e-12))
        assert criterion_score(value, alpha, r) <= ceiling.score * (1 + 1e-9)
        if criterion_score(value, alpha, r) > 1 + 1e-9:
            passing.append(r)
    assert ceiling.refuted == (ceiling.score <= 1)
    assert not ceiling.refuted or not passing
    assert all(r >= ceiling.refuted_to * (1 - 1e-9) for r in passing)
    inside = [ratio for distance, ratio in points if distance <= ceiling.refuted_to]
    assert ceiling.refuted_to <= least_radius(value, min(inside)) * (1 + 1e-9)


def test_what_is_found_in_a_ball_refutes_where_a_radius_is_asked_about_and_leaves_larger_ones_open():
    points = [(0.0, 4.0), (0.9, 0.25)]  # f_0 = 1: fails to r = 1 by the first ratio, to r = 4 by the second
    assert score_ceiling(1.0, points).refuted_to == 4.0
    within, beyond, open_ended = (judge_ball(1.0, points, radius=r) for r in (3.9, 4.1, None))
    assert (within.verdict, beyond.verdict, open_ended.verdict) == ("refuted", "undecided", "undecided")
    assert within.measured == pytest.approx(3.9**2 * 0.25 / 4)
    assert beyond.measured == pytest.approx(4.1**2 * 0.25 / 4)
    assert "every r up to 4" in within.reason
    assert "larger ones are open" in open_ended.reason
    assert "some r <= 3.9" in within.asks
    # A point beyond the radius does not count; the first ratio alone leaves r > 1 open.
    assert judge_ball(1.0, points, radius=0.8).measured == pytest.approx(0.64)
    gap = score_ceiling(1.0, [(0.0, 4.0), (2.0, 0.25)])  # between r = 1 and 2 nothing is known
    assert (gap.refuted, gap.score, gap.refuted_to) == (False, 4.0, 1.0)


@pytest.mark.slow
def test_a_random_initialisation_is_refuted_at_every_radius_and_a_certified_one_is_not():
    inputs, targets = independent_data()
    torch.manual_seed(0)
    model = tanh_network(6, 8, 1)
    scores = {}
    for kind in ("random", "positive"):
        if kind == "positive":
            positive_init_(model, A=1.1 * smallest_output_weight(model, inputs, targets))
        objective = Objective(model, inputs, targets, nn.MSELoss())
        still = torch.zeros(objective.size, dtype=torch.float64)
        still[-1] = targets.mean()
        value, norm = _value_and_norm(objective, objective.start)
        radii = torch.logspace(-2, 1.5, 15).tolist()
        found = sampled_infima(
            objective, radii, points=4, descents=1, steps=30, candidates=[*aligned_points(objective), still]
        )
        assert [each.ratio for each in found] == sorted([each.ratio for each in found], reverse=True)
        for radius, each in zip(radii, found, strict=True):
            assert float((each.point - objective.start).norm()) == pytest.approx(each.distance)
            assert each.distance <= radius
            assert alpha_ratio(*_value_and_norm(objective, each.point)) == each.ratio
        points = [(0.0, alpha_ratio(value, norm)), *((each.distance, each.ratio) for each in found)]
        scores[kind] = score_ceiling(value, points)
        flow = certify_descent(model, inputs, targets).flow
        assert flow.measured <= score_ceiling(value, points, radius=radii[-1]).score
    assert scores["random"].refuted
    assert scores["random"].refuted_to > 1e6
    assert not scores["positive"].refuted


@settings(max_examples=50, deadline=None)
@given(
    losses=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=8, unique=True),
    slopes=st.lists(st.floats(0.1, 10.0), min_size=8, max_size=8),
    shares=st.lists(st.floats(0.3, 1.0), min_size=8, max_size=8),
)
def test_no_descent_path_is_longer_than_its_bound(losses, slopes, shares):
    """Any losses that fall, any ratios, any efficiencies: the steps that would cause them."""
    losses = sorted(losses, reverse=True)
    length = 0.0
    for (before, after), ratio, share in zip(pairwise(losses), slopes, shares, strict=False):
        norm = math.sqrt(ratio * before)
        length += (before - after) / (share * norm)  # h |grad| with f_t - f_{t+1} = share h |grad|^2
    steps = len(losses) - 1
    bound = length_bound(losses[0], losses[-1], min(slopes[:steps]), epsilon=1 - min(shares[:steps]))
    assert length <= bound * (1 + 1e-9)


def test_the_length_bound_is_attained_by_short_steps_on_a_parabola():
    objective = Objective(nn.Linear(1, 1, bias=False), torch.ones(1, 1), torch.zeros(1), nn.MSELoss())
    path = gradient_descent(objective, 1e-3, steps=2000)  # f = w^2, alpha = 4
    bound = length_bound(float(path.losses[0]), float(path.losses[-1]), 4.0)
    assert 0.998 * bound <= float(path.lengths[-1]) <= bound * (1 + 1e-3)
    assert least_radius(9.0, 4.0) == 3.0


@settings(max_examples=20, deadline=None)
@given(k=st.floats(1e-3, 1e3), radius=st.floats(0.1, 10.0))
def test_the_score_does_not_depend_on_the_scale_of_the_loss(k, radius):
    model, (inputs, targets) = tanh_network(6, 3, 1), independent_data()
    scores = []
    for scale in (1.0, k):
        objective = Objective(model, inputs, targets, lambda u, y, scale=scale: scale * (u - y).square().mean())
        value, norm = _value_and_norm(objective, objective.start)
        scores.append(criterion_score(value, alpha_ratio(value, norm), radius))
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


def test_a_path_that_loses_efficiency_or_ratio_is_refuted():
    losses = torch.tensor([1.0, 0.9, 0.89], dtype=torch.float64)
    norms = torch.tensor([1.0, 1.0, 1e-3], dtype=torch.float64)
    path = Descent(losses, norms, torch.tensor([0, 0.1, 0.2]).double(), torch.tensor([0.1, 0.1]).double(), losses)
    verdicts = {criterion.name: criterion.verdict for criterion in judge_path(path, radius=1.0)}
    assert verdicts == {"descent_efficiency": "refuted", "path_length": "consistent", "criterion_score_path": "refuted"}


@pytest.mark.parametrize("second", [1.0, 1.2], ids=["no descent", "rises"])
def test_where_a_step_does_not_lower_the_loss_nothing_bounds_the_length(second):
    losses, norms = torch.tensor([1.0, second, 0.8]).double(), torch.ones(3).double()
    path = Descent(losses, norms, torch.tensor([0, 0.1, 0.2]).double(), torch.tensor([0.1, 0.1]).double(), losses)
    found = {criterion.name: criterion for criterion in judge_path(path)}["path_length"]
    assert found.verdict == "undecided"
    assert "did not lower f" in found.reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: certify_descent(m, x, y, epsilon=1.5), "epsilon: 1.5"),
        (lambda m, x, y: certify_descent(m, x, y[:2]), "targets: 2 for 4"),
        (lambda m, x, y: certify_alpha(m, x[:, :3], 0.1), "3 features"),
        (lambda m, x, y: certify_alpha(m, x, -0.1), "radius: -0.1"),
        (lambda m, x, y: certify_alpha(m.requires_grad_(False), x, 0.1), "frozen"),
        (lambda m, x, y: sampled_alpha(Objective(m, x, y, nn.MSELoss()), 0.0), "radius: 0"),
        (lambda m, x, y: score_ceiling(1.0, [(1.0, 1.0)]), "not x_0 itself"),
        (lambda m, x, y: score_ceiling(1.0, [(0.0, 1.0)], radius=-1.0), "radius: -1"),
    ],
)
def test_mistakes_get_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(tanh_network(6, 3, 1), *independent_data())
