"""The critical sharpness is the curvature along the update on a quadratic, and goes with the stability ratio on networks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers_of_ones_own import Lion, Muon
from torch import nn, optim

from lightning_conv import NTKOperator
from lightning_conv.health.findings.of_update import finding_of_update, reading_of
from lightning_conv.health.step.course import StabilityCourse
from lightning_conv.health.step.critical_sharpness import LEAST, MOST, CriticalFactor, critical_factor
from lightning_conv.health.step.next_update import next_update
from lightning_conv.health.step.optimizer_rules import step_sizes
from lightning_conv.health.step.sharpness import sharpness

VALUES = torch.tensor([7.0, 2.0, 0.5], dtype=torch.float64)
AXES = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
HESSIAN = AXES @ torch.diag(VALUES) @ AXES.T


def quadratic(w):
    return 0.5 * w @ HESSIAN @ w + 3.0


def along(w, u):
    return lambda c: float(quadratic(w + c * u))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("rate", [0.005, 0.2, 40.0])
def test_along_an_eigenvector_the_critical_sharpness_of_descent_is_the_eigenvalue(axis, rate):
    w = 1.7 * AXES[:, axis]
    found = critical_factor(along(w, -rate * HESSIAN @ w))
    assert found.lower <= 2 / (rate * float(VALUES[axis])) <= found.upper
    assert found.upper <= 1.05 * found.lower
    assert found.sharpness(rate) == pytest.approx(float(VALUES[axis]), rel=0.03)
    assert found.ratio == pytest.approx(rate * float(VALUES[axis]) / 2, rel=0.03)  # the stability ratio
    assert found.rate(rate) == pytest.approx(2 / float(VALUES[axis]), rel=0.03)
    assert found.evaluations <= 16


@given(st.integers(0, 1000), st.floats(-3, 1))
@settings(max_examples=30, deadline=None)
def test_for_descent_it_is_the_curvature_along_the_gradient_and_no_more_than_the_largest(seed, exponent):
    w = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g, rate = HESSIAN @ w, 10.0**exponent
    found = critical_factor(along(w, -rate * g))
    curvature = float(g @ HESSIAN @ g / (g @ g))
    assert found.sharpness(rate) == pytest.approx(curvature, rel=0.03)
    assert found.lower * (1 - 1e-9) <= 2 / (rate * curvature) <= found.upper * (1 + 1e-9)
    assert found.sharpness(rate) <= 1.03 * float(VALUES[0])


def test_what_is_not_found_is_said_with_the_range():
    never = critical_factor(lambda c: -c)
    assert (never.lower, never.upper, never.found) == (MOST, math.inf, False)
    always = critical_factor(lambda c: c)
    assert (always.lower, always.upper, always.found) == (0.0, LEAST, False)
    assert math.isnan(always.sharpness(0.1))
    assert math.isnan(never.ratio)
    assert critical_factor(lambda c: 1.0).upper == math.inf  # a zero update raises nothing


def test_what_is_not_finite_counts_as_raised_and_a_start_that_is_not_is_refused():
    found = critical_factor(lambda c: -c if c < 5 else math.nan)
    assert found.lower < 5 <= found.upper
    with pytest.raises(ValueError, match="loss: inf before the update"):
        critical_factor(lambda c: math.inf)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"start": "a"}, TypeError, "start: 'a' (str); need a finite number above 0"),
        ({"start": math.nan}, ValueError, "start: nan; need a finite number above 0"),
        ({"start": 0.0}, ValueError, "start: 0.0; need a finite number above 0"),
        (
            {"start": 2 * MOST},
            ValueError,
            f"least, start, most: {LEAST}, {2 * MOST}, {MOST}; need 0 < least <= start <= most",
        ),
        ({"least": -1}, ValueError, "least: -1; need a finite number above 0"),
        ({"most": math.inf}, ValueError, "most: inf; need a finite number above 0"),
        ({"tolerance": 0}, ValueError, "tolerance: 0; need a finite number above 0"),
        ({"tolerance": math.inf}, ValueError, "tolerance: inf; need a finite number above 0"),
        ({"rounding": math.nan}, ValueError, "rounding: nan; need a finite number of at least 0"),
        ({"rounding": -1}, ValueError, "rounding: -1; need a finite number of at least 0"),
        (
            {"loss": 3},
            TypeError,
            "loss: 3 (int) cannot be called; need a function of how many times the update is made",
        ),
    ],
)
def test_a_bad_argument_of_the_search_is_named_before_the_loss_is_evaluated(options, error, says):
    def never(c):
        raise AssertionError("was evaluated")

    with pytest.raises(error) as raised:
        critical_factor(**{"loss": never, **options})
    assert str(raised.value).startswith(says)


@pytest.mark.parametrize(
    ("returned", "says"),
    [(None, "None"), ("a", "'a' (str)"), (torch.ones(2), "a tensor of shape (2,)")],
)
def test_a_loss_that_is_no_number_is_refused(returned, says):
    with pytest.raises(TypeError) as raised:
        critical_factor(lambda c: returned)
    assert str(raised.value) == f"loss: returned {says}; need a number"
    assert critical_factor(lambda c: torch.tensor(c * (c - 2.9))).found


@pytest.mark.parametrize("start", [1.0, 3.0, 200.0, LEAST, MOST])
def test_the_start_of_the_search_changes_only_its_cost(start):
    found = critical_factor(lambda c: c * (c - 2.9), start=start)
    assert found.lower <= 2.9 <= found.upper <= 1.05 * found.lower
    if start == 3.0:
        assert found.evaluations <= 7


X = torch.randn(24, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = (X @ torch.randn(6, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)).sin()


def trained(make, steps=20):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), Y).backward()
        optimizer.step()
    return model, optimizer


def measured(model, optimizer):
    named = dict(model.named_parameters())
    loss = nn.functional.mse_loss(model(X), Y)
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    u = next_update(optimizer, named, gradients)

    def at(c):
        given = {name: each.detach() + c * u[name] for name, each in named.items()}
        return float(nn.functional.mse_loss(torch.func.functional_call(model, given, X), Y))

    return critical_factor(at)


def stability(model, optimizer):
    operator = NTKOperator(model, X, outputs="full")
    sizes = step_sizes(optimizer, dict(model.named_parameters()))
    relative = {name: sizes.relative(name) for name in sizes.scales}
    return sharpness(operator, lambda v: 2 * v / Y.numel(), relative, products=40).value


RULES = {
    "sgd": lambda lr: lambda p: optim.SGD(p, lr=lr),
    "momentum": lambda lr: lambda p: optim.SGD(p, lr=lr, momentum=0.9),
    "adamw": lambda lr: lambda p: optim.AdamW(p, lr=lr),
}


@pytest.mark.parametrize("name", RULES)
def test_it_goes_with_the_stability_ratio_when_the_rate_is_changed(name):
    ratios, lengths = [], []
    model, optimizer = trained(RULES[name](0.01))
    for factor in (1.0, 8.0, 64.0):
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        ratios.append(stability(model, optimizer))
        lengths.append(measured(model, optimizer).ratio)
    assert ratios[0] < ratios[1] < ratios[2]
    for ratio, length in zip(ratios, lengths, strict=True):  # both are proportional to the rate
        assert ratio / ratios[0] == pytest.approx(length / lengths[0], rel=0.15)
    if name == "sgd":
        assert all(length <= 1.1 * ratio for ratio, length in zip(ratios, lengths, strict=True))


OWN = {"lion": (lambda lr: lambda p: Lion(p, lr=lr), 3e-4), "muon": (lambda lr: lambda p: Muon(p, lr=lr), 1e-3)}


@pytest.mark.parametrize("name", OWN)
def test_an_update_of_an_optimizer_of_ones_own_raises_the_loss_above_its_critical_length_and_not_below(name):
    make, small = OWN[name]
    model, optimizer = trained(make(small))
    found = measured(model, optimizer)
    assert found.found
    assert found.ratio < 1
    before = nn.functional.mse_loss(model(X), Y).item()
    for factor, raised in ((0.8 * found.lower, False), (1.2 * found.upper, True)):
        other, stepper = trained(make(small))
        stepper.param_groups[0]["lr"] = factor * small
        stepper.zero_grad()
        nn.functional.mse_loss(other(X), Y).backward()
        stepper.step()  # the real step, with a rate so many times as large
        assert (nn.functional.mse_loss(other(X), Y).item() > before) is raised


def says(*factors, step=0):
    course = None
    for number, factor in enumerate(factors):
        reading = reading_of(factor, step + number)
        course = StabilityCourse.begin(reading) if course is None else course.then(reading)
    return finding_of_update(course, optimizer="Lion")


@pytest.mark.parametrize(
    ("lower", "upper", "level", "words"),
    [
        (
            10.0,
            10.4,
            "ok",
            "The update is 0.0981 times the length from which on it raises the loss of the probe: far from it, by",
        ),
        (1.25, 1.3, "ok", "The update is 0.784 times the length from which on it raises the loss of the probe;"),
        (0.8, 0.83, "ok", "The update is 1.23 times the length"),
        (0.2, 0.21, "notice", "The update is 4.88 times the length"),
        (0.0, 2.0**-10, "notice", "The update raises the loss of the probe, even shortened to 1/1,024 of its length"),
        (2.0**10, math.inf, "ok", "The update does not raise the loss of the probe, even at 1,024 times its length;"),
    ],
)
def test_the_sentence_rests_on_the_update_and_says_so(lower, upper, level, words):
    found = says(CriticalFactor(lower=lower, upper=upper, evaluations=1))
    assert found.level == level
    assert found.sentence.startswith(words)
    assert found.sentence.endswith(
        "no limit of stability is known for Lion, so this rests on the loss along its update alone."
    )
    assert not found.advice
