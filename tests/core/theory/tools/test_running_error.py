"""The Jacobian's smallest singular value is inside its proven interval, and proves alpha where weights have any sign."""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from lightning_conv.losses.objective import Objective
from lightning_conv.theory.papers.chatterjee import (
    alpha_ratio,
    certify_alpha,
    certify_descent,
    judge_path,
    sampled_alpha,
)
from lightning_conv.theory.papers.chatterjee.certificate import LIPSCHITZ
from lightning_conv.theory.papers.oymak import certify_hypotheses
from lightning_conv.theory.tools.descent import gradient_descent
from lightning_conv.theory.tools.running_error import jacobian_sigma_min
from lightning_conv.theory.tools.smooth_mlp import read_mlp

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(beta=3.0),
    "identity": nn.Identity,
}
SLOPES = {
    "tanh": lambda z: mpmath.sech(z) ** 2,
    "sigmoid": lambda z: 1 / (2 + 2 * mpmath.cosh(z)),
    "softplus": lambda z: 1 / (1 + mpmath.exp(-3 * z)),
    "identity": lambda z: mpmath.mpf(1),
}
VALUES = {
    "tanh": mpmath.tanh,
    "sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)),
    "softplus": lambda z: mpmath.log(1 + mpmath.exp(3 * z)) / 3,
    "identity": lambda z: z,
}


def network(*widths, activation="tanh", seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = []
        for wide, narrow in pairwise(widths):
            modules += [nn.Linear(wide, narrow, bias=bias), ACTIVATIONS[activation]()]
        return nn.Sequential(*modules[:-1]).double()


def exact_jacobian(model, x, activation):
    """A row du/dtheta in 40 digits, by the chain rule written out: W_1, b_1, W_2, ... as ``named_parameters``."""
    layers = [module for module in model if isinstance(module, nn.Linear)]
    h = [mpmath.mpf(float(value)) for value in x]
    entering, slopes = [], []
    for place, layer in enumerate(layers):
        weight, offset = (
            layer.weight.tolist(),
            [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist(),
        )
        entering.append(h)
        z = [
            sum(mpmath.mpf(w) * v for w, v in zip(row, h, strict=True)) + b
            for row, b in zip(weight, offset, strict=True)
        ]
        slopes.append([SLOPES[activation](value) for value in z])
        h = [VALUES[activation](value) for value in z] if place < len(layers) - 1 else z
    g, parts = [mpmath.mpf(1)], []
    for place in range(len(layers) - 1, -1, -1):
        layer = layers[place]
        own = [gk * v for gk in g for v in entering[place]] if layer.weight.requires_grad else []
        own += list(g) if layer.bias is not None and layer.bias.requires_grad else []
        parts.insert(0, own)
        if place:
            weight = layer.weight.tolist()
            down = [sum(weight[k][j] * g[k] for k in range(len(g))) for j in range(layer.in_features)]
            g = [a * s for a, s in zip(down, slopes[place - 1], strict=True)]
    return [value for part in parts for value in part]


@settings(max_examples=20, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    frozen=st.booleans(),
    scale=st.floats(0.1, 5.0),
    seed=st.integers(0, 2**16),
)
def test_the_interval_holds_the_singular_value_in_forty_digits(hidden, activation, bias, frozen, scale, seed):
    model = network(3, *hidden, 1, activation=activation, seed=seed, bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model[0].weight.requires_grad_(not frozen)
    inputs = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
    bound = jacobian_sigma_min(read_mlp(model), inputs)
    with mpmath.workdps(40):
        rows = mpmath.matrix([exact_jacobian(model, x, activation) for x in inputs])
        smallest = mpmath.eigsy(rows * rows.T, eigvals_only=True)[0]
        sigma = mpmath.sqrt(max(smallest, 0))
        assert bound.lower <= sigma <= bound.upper
    assert bound.certified or math.isinf(bound.upper)  # where softplus is linear nothing is said
    top = float(
        torch.linalg.matrix_norm(Objective(model, inputs, torch.zeros(3), nn.MSELoss()).jacobian(_start(model)), 2)
    )
    assert bound.reason or bound.upper - bound.lower <= 1e-6 * top  # squares: half of the digits


def _start(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_computed_slopes_err_by_no_more_than_is_allowed(activation):
    s = read_mlp(network(1, 1, 1, activation=activation)).activations[0]
    z = torch.cat([torch.linspace(-6, 6, 301), torch.tensor([-30.0, 30.0, 1e-9])]).double()
    with mpmath.workdps(40):
        exact = [SLOPES[activation](mpmath.mpf(float(value))) for value in z]
        worst = max(abs(mpmath.mpf(float(a)) - b) for a, b in zip(s.slope(z), exact, strict=True))
    assert worst <= 2.0**-47


def lazy(width=2048, seed=0):
    """A wide network with output weights of both signs, in pairs, so that it is zero at the start."""
    model = network(6, width, 1, seed=seed)
    half = width // 2
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].bias.zero_()
        model[0].weight[half:] = model[0].weight[:half]
        weight = torch.randn(half, generator=torch.Generator().manual_seed(seed)).double()
        model[2].weight.copy_(3.0 * torch.cat([weight, -weight])[None])
    inputs = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double())[0][:3]
    return model, inputs, torch.tensor([0.3, -0.3, 0.3]).double()


@settings(max_examples=8, deadline=None)
@given(
    hidden=st.lists(st.integers(2, 6), min_size=1, max_size=2), radius=st.floats(1e-4, 0.05), seed=st.integers(0, 2**16)
)
def test_no_adversary_undercuts_the_alpha_of_a_lipschitz_jacobian(hidden, radius, seed):
    model = network(5, *hidden, 1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(3, 5, generator=generator).double(), torch.randn(3, generator=generator).double()
    bound = certify_alpha(model, inputs, radius)
    found = sampled_alpha(
        Objective(model, inputs, targets, nn.MSELoss()), radius, points=8, descents=1, steps=20, seed=seed
    )
    assert bound.lower <= found.ratio * (1 + 1e-9)


def test_at_radius_zero_it_is_the_weakest_direction_of_the_kernel():
    """Targets along the last left singular vector attain the bound: alpha >= (4/n) sigma_min^2 with equality there."""
    model, inputs, _ = lazy(width=64)
    objective = Objective(model, inputs, torch.zeros(3), nn.MSELoss())
    left, sizes, _ = torch.linalg.svd(objective.jacobian(objective.start), full_matrices=False)
    worst = Objective(model, inputs, -left[:, -1], nn.MSELoss())
    value, gradient = worst.value_and_gradient(worst.start)
    bound = certify_alpha(model, inputs, 1e-9)
    assert bound.method == LIPSCHITZ
    assert bound.lower == pytest.approx(4 / 3 * float(sizes[-1]) ** 2, rel=1e-5)
    assert bound.lower == pytest.approx(alpha_ratio(value, float(gradient.norm())), rel=1e-5)


def test_a_wide_network_with_weights_of_both_signs_is_certified_and_keeps_its_promises():
    model, inputs, targets = lazy()
    certificate = certify_descent(model, inputs, targets)
    assert certificate.holds
    assert certificate.alpha.method == LIPSCHITZ
    path = gradient_descent(Objective(model, inputs, targets, nn.MSELoss()), certificate.step, steps=300, until=1e-12)
    assert {criterion.verdict for criterion in judge_path(path, certificate=certificate)} == {"consistent"}
    assert path.losses[5] <= (1 - certificate.rate) ** 5 * path.losses[0]


def test_with_a_frozen_first_layer_only_this_bound_is_left():
    model, inputs, targets = lazy()
    model[0].requires_grad_(False)
    assert certify_alpha(model, inputs, 1e-6).method == LIPSCHITZ
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        certify_descent(model, inputs, targets)


def test_equal_inputs_give_nothing():
    model, inputs, _ = lazy(width=16)
    inputs[1] = inputs[0]
    bound = jacobian_sigma_min(read_mlp(model), inputs)
    assert bound.lower == 0
    assert not math.isnan(bound.value)


def refused(model, message):
    inputs, targets = torch.eye(2).double(), torch.full((2,), 0.01).double()
    with pytest.raises(ValueError, match=message):
        read_mlp(model)
    with pytest.raises(ValueError, match=message):
        certify_hypotheses(model, inputs, targets)


def test_tied_layers_are_refused_whose_gradient_can_vanish_away_from_a_minimum():
    shared = nn.Linear(2, 2, bias=False)
    last = nn.Linear(2, 1, bias=False)
    model = nn.Sequential(shared, nn.Identity(), shared, nn.Identity(), last).double()
    with torch.no_grad():
        shared.weight.copy_(torch.diag(torch.tensor([1.0, -1.0])))
        last.weight.copy_(torch.tensor([[1.0, 0.0]]))
    last.requires_grad_(False)
    loss = (model(torch.tensor([[0.0, 1.0]]).double()) - 0.01).square().mean()
    (gradient,) = torch.autograd.grad(loss, shared.weight)
    assert loss.detach() > 0
    assert not gradient.any()
    refused(model, "that of another layer")
    same = nn.Linear(2, 2)
    twin = nn.Linear(2, 2)
    twin.weight = same.weight
    refused(nn.Sequential(same, nn.Tanh(), twin, nn.Tanh(), nn.Linear(2, 1)).double(), "that of another layer")


def test_weights_that_are_computed_from_others_and_hooks_are_refused():
    def plain():
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    pruned = plain()
    prune.random_unstructured(pruned[0], "weight", amount=0.5)
    refused(pruned, "pruning")
    hooked = plain()
    hooked[2].register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    refused(hooked, "forward hooks")
    hooked = plain()
    hooked.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    refused(hooked, "forward hooks")
    normed = plain()
    nn.utils.parametrizations.weight_norm(normed[0])
    refused(normed, "computed from others")


def test_where_softplus_is_linear_nothing_is_claimed():
    model = nn.Sequential(nn.Linear(2, 3), nn.Softplus(threshold=1.0), nn.Linear(3, 1)).double()
    with torch.no_grad():
        model[0].bias.add_(2.0)
    inputs = torch.eye(2).double()
    bound = jacobian_sigma_min(read_mlp(model), inputs)
    assert (bound.lower, bound.upper) == (0.0, math.inf)
    certified = certify_hypotheses(model, inputs, torch.zeros(2).double())
    assert certified.criterion.verdict == "undecided"
    assert "softplus is linear" in certified.criterion.reason
    with torch.no_grad():  # |r_0| = 0 and nothing bounds the curvature
        model[2].weight.zero_()
        model[2].bias.zero_()
    assert certify_hypotheses(model, inputs, torch.zeros(2).double()).criterion.verdict == "undecided"


def test_one_target_for_several_samples_is_refused():
    with pytest.raises(ValueError, match="targets: 1 for 3 samples"):
        certify_hypotheses(lazy(width=8)[0], lazy(width=8)[1], torch.zeros(1))
