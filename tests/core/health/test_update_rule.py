"""The limit of an update rule is where the real optimizer begins to diverge on a quadratic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim

from lightning_conv.health.step.optimizer_rules import UnknownStepError, step_sizes
from lightning_conv.health.step.update_rule import UpdateRule

unit = st.floats(0, 0.95)


@given(a=unit, b=st.floats(0.05, 2), c=st.floats(0.05, 2), e=st.floats(0, 2), d=st.floats(0, 0.5))
def test_the_limit_is_where_the_spectral_radius_passes_one(a, b, c, e, d):
    limit = UpdateRule(a=a, b=b, c=c, e=e, d=d).limit

    def radius(h):
        step = torch.tensor([[1 - d - h * (c * b + e), -c * a], [b * h, a]], dtype=torch.float64)
        return float(torch.linalg.eigvals(step).abs().max())

    assert radius(limit * 0.99) <= 1 + 1e-9
    assert radius(limit * 1.01) > 1


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        (UpdateRule(), 2),
        (UpdateRule(a=0.9), 3.8),
        (UpdateRule(a=0.9, b=0.5), 7.6),
        (UpdateRule(a=0.9, c=0.9, e=1), 3.8 / 2.8),
        (UpdateRule(a=0.9, b=0.1), 38),
        (UpdateRule(a=0.9, b=0.1, d=0.01), 1.99 * 1.9 / 0.1),
        (UpdateRule(a=0.9, b=0.1, c=0.96, e=0.04), 2 * 1.9 / (1.9 - 2 * 0.96 * 0.9)),
    ],
)
def test_the_limits_are_those_of_the_papers(rule, limit):
    assert rule.limit == pytest.approx(limit, rel=1e-12)


CURVATURES = torch.tensor([1.0, 0.3, 0.02], dtype=torch.float64)
KINDS = {
    "sgd": (optim.SGD, {}),
    "heavy ball": (optim.SGD, {"momentum": 0.9}),
    "dampened": (optim.SGD, {"momentum": 0.8, "dampening": 0.5}),
    "nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "decay in the gradient": (optim.SGD, {"momentum": 0.5, "weight_decay": 0.4}),
    "rmsprop": (optim.RMSprop, {"alpha": 1.0}),
    "rmsprop, momentum": (optim.RMSprop, {"alpha": 1.0, "momentum": 0.9}),
    "adam": (optim.Adam, {"betas": (0.9, 1 - 1e-12)}),
    "adam, decay in the gradient": (optim.Adam, {"betas": (0.9, 1 - 1e-12), "weight_decay": 0.3}),
    "adamw": (optim.AdamW, {"betas": (0.9, 1 - 1e-12), "weight_decay": 0.05}),
    "nadam": (optim.NAdam, {"betas": (0.9, 1 - 1e-12)}),
    "amsgrad": (optim.Adam, {"betas": (0.8, 1 - 1e-12), "amsgrad": True}),
}
"""Preconditioners stand still: their averages forget nothing, or next to nothing."""


def settled(kind, options, rate):
    """Return weight and optimizer with a preconditioner that stays where it is: no average moves any more."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = kind([weight], lr=rate, **options)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    if "step" in state:
        state["step"] = torch.tensor(5e3)
    if "mu_product" in state:
        state["mu_product"] = torch.tensor(0.0)
    for name in ("momentum_buffer", "exp_avg"):
        if isinstance(state.get(name), torch.Tensor):
            state[name].zero_()
    held = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for name in ("exp_avg_sq", "square_avg", "max_exp_avg_sq"):
        if name in state:
            # What 1 - beta2^t divides by: the root of the corrected average is ``held``.
            corrected = 1 if kind is optim.RMSprop else 1 - options["betas"][1] ** 5e3
            state[name] = held.square() * corrected
    return weight, optimizer


def grows(kind, options, rate, steps=1500):
    """Return whether the weights grow when the optimizer really steps on the quadratic, from near its minimum."""
    weight, optimizer = settled(kind, options, rate)
    with torch.no_grad():
        weight.copy_(1e-6 * torch.ones(3))  # so small that the averages of squares do not move
    norms = []
    for _ in range(steps):
        weight.grad = CURVATURES * weight.detach()
        held = {
            name: value.clone()
            for name, value in optimizer.state[weight].items()
            if name in ("exp_avg_sq", "square_avg", "max_exp_avg_sq", "step")
        }
        optimizer.step()
        optimizer.state[weight] |= held
        norms.append(float(weight.detach().norm()))
        if norms[-1] > 1e-2:
            return True
    return max(norms[-100:]) > max(norms[:100])


def sharpness(kind, options, rate):
    weight, optimizer = settled(kind, options, rate)
    found = step_sizes(optimizer, {"w": weight})
    return float((found.relative("w") * (CURVATURES + found.decay["w"])).max())


@pytest.mark.parametrize("name", KINDS)
def test_the_ratio_of_one_is_where_the_optimizer_of_torch_diverges(name):
    kind, options = KINDS[name]
    edge = 1 / sharpness(kind, options, 1.0)
    for _ in range(60):  # the decay of AdamW goes with the rate
        edge /= sharpness(kind, options, edge)
    assert not grows(kind, options, 0.97 * edge)
    assert grows(kind, options, 1.03 * edge)


def test_groups_have_their_own_rates():
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "momentum": 0.9}], lr=0.1)
    found = step_sizes(optimizer, {"a": first, "b": second, "c": torch.nn.Parameter(torch.zeros(1))})
    assert {name: float(found.relative(name)) for name in found.rules} == pytest.approx({"a": 0.5 / 2, "b": 0.1 / 3.8})


class Own(optim.SGD):
    pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: Own(p, lr=0.1), "Own are not known"),
        (lambda p: optim.LBFGS(p), "LBFGS are not known"),
        (lambda p: optim.SGD(p, lr=0.1, maximize=True), "ascends"),
        (lambda p: optim.Adam(p), "before the first step"),
    ],
)
def test_what_is_not_known_is_refused(make, why):
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UnknownStepError, match=why):
        step_sizes(make([weight]), {"w": weight})


def test_a_rule_that_never_forgets_has_no_limit():
    assert math.isnan(UpdateRule(a=1.0).limit)


@pytest.mark.parametrize("kind", [optim.Adam, optim.RMSprop, optim.Adagrad, optim.NAdam])
def test_a_weight_that_no_gradient_has_reached_does_not_hide_the_steps_of_the_others(kind):
    moved, cut = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = kind([moved, cut], lr=0.1)
    moved.square().sum().backward()
    optimizer.step()
    assert step_sizes(optimizer, {"moved": moved, "cut": cut}).scales.keys() == {"moved"}
    with pytest.raises(UnknownStepError, match="trains none of these weights"):
        step_sizes(optimizer, {"cut": cut})


def test_weights_that_come_without_names_are_refused():
    layer = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"parameters: .*; need weights by name, such as dict\(model.named_parameters"):
        step_sizes(optim.SGD(layer.parameters()), list(layer.parameters()))
