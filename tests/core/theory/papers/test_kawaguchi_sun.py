"""The expressivity condition in numbers, and phase 2 against its bounds, by independent computations."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv.last_layer import HeadProblem, comparators, gradient_descent_bound, head_curvature, rounded_bound
from lightning_conv.linalg.spectrum import Bounded
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import expressivity_facts, judge_expressivity
from lightning_conv.theory.papers.kawaguchi_sun.phase_two import (
    HeadGap,
    judge_head_gaps,
    judge_head_step,
    judge_phase_two,
)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 6),
    extra=st.integers(0, 4),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
    power=st.integers(-30, 30),
)
def test_log_phi_is_the_determinant_s_logarithm_and_its_bounds_hold(n, extra, bias, seed, power):
    h = 2.0**power * torch.randn(n, n + extra, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    facts = expressivity_facts(h, bias=bias)
    with mpmath.workdps(60):
        a = mpmath.matrix((torch.cat([h, torch.ones(n, 1)], 1) if bias else h).tolist())
        exact = mpmath.log(mpmath.det(a * a.T))
        assert facts.log_phi.lower <= exact <= facts.log_phi.upper
        # With features of size 2^-30 beside the ones, rounding moves the smallest singular value by up to 1e-7 of its size.
        allowed = max(1e-9, facts.log_phi.upper - facts.log_phi.lower)
        assert facts.log_phi.value == pytest.approx(float(exact), rel=1e-9, abs=allowed)
        assert facts.log_phi.upper - facts.log_phi.lower < 0.1
    assert facts.log_phi.certified


def test_phi_itself_underflows_where_its_logarithm_does_not():
    h = 1e-8 * torch.randn(60, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(torch.linalg.det(h @ h.T)) == 0
    assert expressivity_facts(h, bias=False).log_phi.value == pytest.approx(
        float(torch.linalg.slogdet(h @ h.T)[1]), rel=1e-9
    )


def test_log_phi_of_many_samples_has_close_bounds_that_are_no_proof():
    h = torch.randn(520, 560, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    facts = expressivity_facts(h)
    columns = torch.cat([h, torch.ones(520, 1)], 1)
    exact = float(torch.linalg.slogdet(columns @ columns.T)[1])
    assert "Cholesky" in facts.certificate.sigma_max.method
    assert facts.log_phi.lower <= exact <= facts.log_phi.upper < facts.log_phi.lower + 1e-3
    assert not facts.log_phi.certified


def test_ranks_are_their_definitions():
    h = torch.randn(5, 7, dtype=torch.float64)
    facts = expressivity_facts(h)
    a = torch.cat([h, torch.ones(5, 1)], 1)
    assert facts.stable_rank == pytest.approx(float((a**2).sum() / torch.linalg.matrix_norm(a, 2) ** 2), rel=1e-12)
    p = torch.linalg.svdvals(a) / torch.linalg.svdvals(a).sum()
    assert facts.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-12)
    assert facts.condition_number == pytest.approx(float(torch.linalg.cond(a)), rel=1e-9)


def test_narrow_features_are_refuted_and_their_targets_told():
    h, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    facts = expressivity_facts(h, y)
    verdicts = {criterion.name: criterion for criterion in judge_expressivity(facts)}
    assert verdicts["expressivity_condition"].verdict == "refuted"
    assert facts.log_phi.value == -math.inf
    assert facts.condition_number == math.inf
    a = torch.cat([h, torch.ones(6, 1)], 1)
    largest = facts.alignment.sigma_max
    assert largest.lower <= float(torch.linalg.matrix_norm(a, 2)) <= largest.upper < largest.lower * (1 + 1e-12)
    residual = y - a @ torch.linalg.pinv(a) @ y
    assert verdicts["alignment"].verdict == "refuted"
    assert verdicts["alignment"].measured == pytest.approx(float(residual.norm() / y.norm()), rel=1e-9)
    reached = expressivity_facts(h, a @ torch.randn(3, 2, dtype=torch.float64))
    assert judge_expressivity(reached)[1].verdict == "certified"


def test_an_estimated_rounding_is_no_proof():
    h = torch.randn(4, 6, dtype=torch.float64)
    assert judge_expressivity(expressivity_facts(h))[0].verdict == "certified"
    assert judge_expressivity(expressivity_facts(h, feature_error=1e-12))[0].verdict == "consistent"


def descend(problem, step, steps):
    w, losses = problem.zeros(), []
    for _ in range(steps + 1):
        value, gradient = problem.loss_and_gradient(w)
        losses.append(value)
        w = w - step * gradient
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_descent_with_the_certified_step_keeps_the_bounds(loss):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    squared = loss == "squared"
    targets = torch.randn(8, 3, generator=generator, dtype=torch.float64) if squared else torch.arange(8) % 3
    problem = HeadProblem(h, targets, nn.MSELoss() if squared else nn.CrossEntropyLoss())
    curvature, family = head_curvature(problem), comparators(problem, problem.zeros())
    gaps = descend(problem, curvature.step, 300)
    sigma = expressivity_facts(h).certificate.sigma_min
    mu = curvature.smoothness / 8 * sigma.lower**2 if squared else None
    verdicts = {
        criterion.name: criterion.verdict
        for criterion in judge_phase_two(gaps, curvature.step, family, curvature, mu=mu)
    }
    assert set(verdicts) == {"head_step", "head_bound"} | ({"head_linear"} if squared else set())
    assert set(verdicts.values()) == {"consistent"}
    if squared:  # L_H R^2 / (2 t) and (1 - eta mu)^(2 t) by hand
        a = torch.cat([h, torch.ones(8, 1)], 1)
        distance = float((torch.linalg.pinv(a) @ targets).norm())
        most = 2 / 3 / 8 * float(torch.linalg.matrix_norm(a, 2)) ** 2
        least = 2 / 3 / 8 * float(torch.linalg.svdvals(a)[-1]) ** 2
        for t in (1, 10, 300):
            assert gaps[t] <= most * distance**2 / (2 * t) * (1 + 1e-3)
            assert gaps[t] <= (1 - curvature.step * least) ** (2 * t) * gaps[0] * (1 + 1e-9)


def test_a_step_that_is_too_large_and_a_loss_that_stays_are_refuted():
    h = torch.randn(4, 6, dtype=torch.float64)
    problem = HeadProblem(h, torch.randn(4, 1, dtype=torch.float64), nn.MSELoss())
    curvature, family = head_curvature(problem), comparators(problem, problem.zeros())
    start = problem.loss_and_gradient(problem.zeros())[0]
    stuck = torch.full((5001,), start, dtype=torch.float64)
    verdicts = {c.name: c.verdict for c in judge_phase_two(stuck, 2.5 * curvature.step, family, curvature)}
    assert verdicts["head_step"] == "refuted"
    assert verdicts["head_bound"] == "refuted"
    with pytest.raises(ValueError, match="gaps: 1"):
        judge_phase_two(stuck[:1], curvature.step, family, curvature)


def test_a_few_measurements_are_judged_at_the_largest_share_of_their_bound():
    seen = [HeadGap(0, 4.0, 4.0, 4.0, 4.0), HeadGap(3, 1.0, 2.0, 2.1, 1.0), HeadGap(9, 0.9, 1.0, 1.1, 0.9)]
    found = judge_head_gaps(seen)
    assert (found.verdict, found.measured, found.bound) == ("consistent", 0.9, 1.0)
    assert "0.9 of the bound" in found.reason
    assert "after 9 steps" in found.reason
    rounded = judge_head_gaps([*seen, HeadGap(20, 1.05, 1.0, 1.1, 1.05)])
    assert (rounded.verdict, rounded.measured) == ("undecided", 1.05)
    # One beyond all rounding counts, however large the share of another is.
    clear = judge_head_gaps([*seen, HeadGap(20, 5e-9, 1e-9, 1e-8, 5e-9), HeadGap(30, 1.2, 1.0, 1.1, 1.15)])
    assert (clear.verdict, clear.measured, clear.bound) == ("refuted", 1.2, 1.0)
    assert judge_head_gaps(seen[:1]).verdict == "undecided"
    assert judge_head_gaps([HeadGap(5, 0.0, 0.0, 0.0, 0.0)]).verdict == "consistent"


def test_of_a_step_beyond_one_over_l_h_the_theorem_is_silent():
    curvature = Bounded(2.0, 1.6, 2.5, True, "")
    said = [judge_head_step(step, curvature) for step in (0.4, 0.5, 0.7, 0.9)]
    assert [each.verdict for each in said] == ["consistent", "undecided", "undecided", "undecided"]
    assert "lies between 1 / L_H" in said[1].reason
    assert "the loss still never rises" in said[2].reason
    assert "beyond which nothing is" in said[3].reason
    assert {each.bound for each in said} == {said[0].bound}


@pytest.mark.parametrize("seed", range(5))
def test_the_rounded_bound_holds_for_steps_that_err(seed):
    """Errors that push uphill, of a size that matters, on a random convex quadratic and on a cross-entropy."""
    generator, squared = torch.Generator().manual_seed(seed), nn.MSELoss()
    h = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    for targets, loss_fn in (
        (torch.randn(8, 3, generator=generator, dtype=torch.float64), squared),
        (torch.arange(8) % 3, nn.CrossEntropyLoss()),
    ):
        problem = HeadProblem(h, targets, loss_fn)
        curvature, w, drift = head_curvature(problem), problem.zeros(), 0.0
        family, exceeded = comparators(problem, w), 0
        for t in range(1, 400):
            gradient = problem.loss_and_gradient(w)[1]
            error = gradient / gradient.norm() * 0.1  # uphill
            w = w - curvature.step * gradient + error
            drift += float(error.norm())
            gap = problem.loss_and_gradient(w)[0]
            bound = gradient_descent_bound(family, curvature.step, t)
            exceeded += gap > bound
            assert gap <= rounded_bound(bound, drift, curvature.value.upper)
        assert exceeded or loss_fn is not squared  # the bound of exact steps does not hold


def test_steps_of_different_sizes_keep_the_bound_of_their_sum():
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    problem = HeadProblem(h, torch.randn(8, 2, generator=generator, dtype=torch.float64), nn.MSELoss())
    curvature, w, total = head_curvature(problem), problem.zeros(), 0.0
    family = comparators(problem, w)
    for k in range(200):
        eta = curvature.step * float(torch.rand((), generator=generator))
        w = w - eta * problem.loss_and_gradient(w)[1]
        total += eta
        assert problem.loss_and_gradient(w)[0] <= gradient_descent_bound(family, total, 1), k
