"""Oymak and Soltanolkotabi's line and PL*: proven constants are never undercut, promises are kept, and broken hypotheses show."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv.losses.objective import Objective
from lightning_conv.theory.papers.oymak import (
    Hypotheses,
    certify_hypotheses,
    judge_hypotheses,
    judge_line,
    judge_step,
    misfits,
    sampled_hypotheses,
)
from lightning_conv.theory.tools.descent import gradient_descent


def half_sum(outputs, targets):
    return (outputs - targets).square().sum() / 2


def problem(width=64, weight=200.0, n=3, d=4, seed=0):
    """A two-layer tanh network whose units come in pairs of opposite sign, so that it is zero; its Jacobian is large."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(d, width), nn.Tanh(), nn.Linear(width, 1)).double()
    with torch.no_grad():
        half = 0.3 * torch.randn(width // 2, d, generator=generator, dtype=torch.float64)
        model[0].weight.copy_(torch.cat([half, half]))
        model[0].bias.zero_()
        model[2].weight.copy_(weight * torch.cat([torch.ones(width // 2), -torch.ones(width // 2)])[None])
        model[2].bias.zero_()
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return model, inputs / inputs.norm(dim=1, keepdim=True), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)[:n]


def test_proven_constants_hold_at_every_point_that_is_tried_and_the_run_keeps_the_line():
    model, inputs, targets = problem()
    certified = certify_hypotheses(model, inputs, targets)
    assert certified.holds
    assert certified.criterion.verdict == "certified"
    claimed = certified.hypotheses
    objective = Objective(model, inputs, targets, half_sum)
    assert claimed.misfit == pytest.approx(float(objective.residual(objective.start).norm()), rel=1e-6)
    seen = sampled_hypotheses(objective, claimed.radius, points=15)
    assert {criterion.verdict for criterion in judge_hypotheses(claimed, seen)} == {"consistent"}
    path = gradient_descent(objective, claimed.step, steps=2000, until=1e-12)
    assert {criterion.verdict for criterion in judge_line(path, claimed)} == {"consistent"}
    # By hand, and with the paper's own constants.
    r = (2 * path.losses).sqrt()
    assert torch.equal(misfits(path, 1.0), r)
    assert bool((claimed.alpha / 4 * path.distances + r <= r[0] * (1 + 1e-9)).all())
    k = torch.arange(len(r), dtype=torch.float64)
    assert bool((r.square() <= (1 - claimed.step * claimed.alpha**2 / 2) ** k * r[0] ** 2 * (1 + 1e-9)).all())
    assert float(path.lengths[-1]) <= 4 * claimed.misfit / claimed.alpha


def test_small_output_weights_leave_it_open():
    model, inputs, targets = problem(weight=0.1)
    certified = certify_hypotheses(model, inputs, targets)
    assert certified.criterion.verdict == "undecided"
    assert certified.hypotheses.alpha == 0
    path = gradient_descent(Objective(model, inputs, targets, half_sum), 0.01, steps=2)
    with pytest.raises(ValueError, match="alpha is 0"):
        judge_line(path, certified.hypotheses)


def test_equal_inputs_are_no_proof():
    model, inputs, targets = problem()
    inputs[1] = inputs[0]
    certified = certify_hypotheses(model, inputs, targets)
    assert certified.criterion.verdict == "undecided"
    assert "not proven positive" in certified.criterion.reason


def linear_hypotheses(features: torch.Tensor, targets: torch.Tensor, start: torch.Tensor) -> Hypotheses:
    """The constants of u = features @ theta: the Jacobian is the feature matrix everywhere."""
    sizes = torch.linalg.svdvals(features)
    misfit = float((features @ start - targets).norm())
    return Hypotheses(misfit, float(sizes[-1]), float(sizes[0]), 0.0)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), extra=st.integers(0, 3), seed=st.integers(0, 2**16), share=st.floats(0.05, 1.0))
def test_a_linear_model_keeps_the_sharper_line_at_every_step(n, extra, seed, share):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, n + extra, generator=generator, dtype=torch.float64)
    targets = torch.randn(n, generator=generator, dtype=torch.float64)
    model = nn.Linear(n + extra, 1, bias=False).double()
    objective = Objective(model, features, targets, half_sum)
    claimed = linear_hypotheses(features, targets, objective.start)
    path = gradient_descent(objective, share * claimed.step, steps=60)
    usable = path.losses > 1e-20 * path.losses[0]
    if bool(usable.all()) and claimed.alpha > 1e-3:
        assert {criterion.verdict for criterion in judge_line(path, claimed)} == {"consistent"}


def test_the_line_of_gradient_flow_is_attained_by_one_number():
    """U = alpha theta: |r| + alpha distance = |r_0| exactly; the theorem has 1/2 in the place of this 1, for steps of any allowed size."""
    features = torch.tensor([[3.0]], dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    objective = Objective(model, features, torch.tensor([5.0]), half_sum)
    claimed = linear_hypotheses(features, torch.tensor([5.0]), objective.start)
    path = gradient_descent(objective, 1e-4, steps=100)
    assert torch.allclose(misfits(path, 1.0) + 3.0 * path.distances, path.losses.new_tensor(claimed.misfit), rtol=1e-9)


def test_false_constants_and_large_steps_are_refuted():
    model, inputs, targets = problem(width=8, weight=1.0)
    objective = Objective(model, inputs, targets, half_sum)
    sizes = torch.linalg.svdvals(objective.jacobian(objective.start))
    misfit = float(objective.residual(objective.start).norm())
    frozen = Hypotheses(misfit, float(sizes[-1]), float(sizes[0]), 0.0)  # as if J were constant
    seen = sampled_hypotheses(objective, 3.0, points=20)
    verdicts = {criterion.name: criterion.verdict for criterion in judge_hypotheses(frozen, seen)}
    assert verdicts["jacobian_lipschitz"] == "refuted"
    assert "refuted" in (verdicts["sigma_min_jacobian"], verdicts["sigma_max_jacobian"])
    path = gradient_descent(objective, 2.5 / float(sizes[0]) ** 2, steps=3)
    verdicts = {criterion.name: criterion.verdict for criterion in judge_line(path, frozen)}
    assert verdicts["oymak_step"] == "refuted"


def test_sampled_constants_are_those_of_a_naive_double_loop(naive_jacobian):
    model, inputs, targets = problem(width=4, weight=2.0)
    objective = Objective(model, inputs, targets, half_sum)
    other = objective.start + 0.1
    seen = sampled_hypotheses(objective, 10.0, points=0, path=(other,))
    twin = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    nn.utils.vector_to_parameters(other, twin.parameters())
    jacobians = naive_jacobian(model, inputs), naive_jacobian(twin, inputs)
    sizes = [torch.linalg.svdvals(jacobian) for jacobian in jacobians]
    assert seen.sigma_min == pytest.approx(min(float(s[-1]) for s in sizes), rel=1e-9)
    assert seen.sigma_max == pytest.approx(max(float(s[0]) for s in sizes), rel=1e-9)
    slope = torch.linalg.matrix_norm(jacobians[1] - jacobians[0], 2) / (other - objective.start).norm()
    assert seen.lipschitz == pytest.approx(float(slope), rel=1e-9)
    with pytest.raises(ValueError, match="radius: 0"):
        sampled_hypotheses(objective, 0.0)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_scale_of_the_loss_is_converted(scale):
    model, inputs, targets = problem()
    claimed = certify_hypotheses(model, inputs, targets).hypotheses
    objective = Objective(model, inputs, targets, lambda u, y: scale * half_sum(u, y))
    path = gradient_descent(objective, claimed.step / scale, steps=20)
    reference = gradient_descent(Objective(model, inputs, targets, half_sum), claimed.step, steps=20)
    measured, expected = (
        [criterion.measured for criterion in judge_line(each, claimed, scale=k)]
        for each, k in ((path, scale), (reference, 1.0))
    )
    assert measured == pytest.approx(expected, rel=1e-9)


def test_the_step_is_at_least_the_paper_s():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        alpha, more, lipschitz, misfit = torch.rand(4, generator=generator).tolist()
        claimed = Hypotheses(misfit, alpha, alpha + more, lipschitz)
        papers_step = min(1, alpha**2 / (lipschitz * misfit)) / (2 * claimed.beta**2)
        assert papers_step <= claimed.step * (1 + 1e-12)


# --- the step condition ---------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(misfit=st.floats(1e-3, 1e3), alpha=st.floats(1e-3, 1e3), ratio=st.floats(1, 1e3), lipschitz=st.floats(0, 1e3))
def test_the_papers_step_is_its_whole_condition_rounded_down(misfit, alpha, ratio, lipschitz):
    claimed = Hypotheses(misfit, alpha, alpha * ratio, lipschitz)
    r, a, b, lip = map(Fraction, (misfit, alpha, claimed.beta, lipschitz))
    share = min(Fraction(1), a**2 / (lip * r)) if lip * r > 0 else Fraction(1)
    exact = share / (2 * b**2)
    assert exact * (1 - Fraction(1, 10**14)) <= Fraction(claimed.papers_step) <= exact
    sharper = 1 / (2 * max(b**2, lip * r))
    assert sharper * (1 - Fraction(1, 10**14)) <= Fraction(claimed.step) <= sharper
    assert claimed.papers_step <= claimed.step * (1 + 1e-12)  # alpha <= beta
    assert Fraction(claimed.rate) <= sharper * a**2
    assert Fraction(claimed.radius) >= 2 * r / a


def test_the_step_is_judged_by_both_factors():
    known = Hypotheses(misfit=10.0, alpha=1.0, beta=2.0, lipschitz=1.0)  # min(1, 1 / 10) / 8
    assert judge_step(0.0124, known).verdict == "consistent"
    assert judge_step(0.0126, known).verdict == "refuted"
    assert judge_step(0.0126, known).asks == "h <= min(1, alpha^2 / (L |r_0|)) / (2 beta^2)"


def test_without_l_a_step_is_refuted_or_undecided():
    unknown = Hypotheses(misfit=10.0, alpha=1.0, beta=2.0, lipschitz=math.nan)
    assert judge_step(0.0126, unknown).verdict == "undecided"
    assert "is not known" in judge_step(0.0126, unknown).reason
    assert judge_step(0.1251, unknown).verdict == "refuted"
