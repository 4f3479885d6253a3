"""Bounds over a ball of weights against brute force in that ball: sampling never gets outside them."""

import math
from itertools import pairwise

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv.losses.objective import Objective
from lightning_conv.theory.tools.ball_bounds import ball_bounds
from lightning_conv.theory.tools.running_error import outputs_with_error
from lightning_conv.theory.tools.smooth_mlp import read_mlp, smooth_activation, spectral_norm_bound

ACTIVATIONS = (nn.Tanh(), nn.Sigmoid(), nn.Softplus(beta=2.0, threshold=40), nn.Identity())


def network(widths, activation, *, bias=True, positive=True, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for place, (wide, narrow) in enumerate(pairwise(widths)):
        layer = nn.Linear(wide, narrow, bias=bias).double()
        draw = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(scale * (0.5 + draw.abs() if positive and place else 0.3 * draw))
            if bias:
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator, dtype=torch.float64))
        modules += [layer, activation]
    return nn.Sequential(*modules[:-1])


def in_the_ball(centre, radius, count, seed):
    """Random points, half of them on its surface, and points that move one weight by all of the radius."""
    generator = torch.Generator().manual_seed(seed)
    for k in range(count):
        direction = torch.randn(centre.shape, generator=generator, dtype=torch.float64)
        if k % 3 == 0:
            direction = torch.zeros_like(centre)
            direction[int(torch.randint(len(centre), (), generator=generator))] = (-1.0) ** k
        share = 1.0 if k % 2 else float(torch.rand((), generator=generator))
        yield centre + direction * (share * radius / direction.norm())


def gain(objective, x, width, features):
    """min_i |du_i / dz_1| by autograd: the derivative with respect to the first bias is that with respect to z_1."""
    parameters = objective.unflatten(x)
    position = 0
    for name, value in parameters.items():
        if name == "0.bias":
            break
        position += value.numel()
    return float(objective.jacobian(x)[:, position : position + width].norm(dim=1).min())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    kind=st.integers(0, 3),
    radius=st.floats(0.0, 0.6),
    seed=st.integers(0, 2**16),
    positive=st.booleans(),
)
def test_no_point_of_the_ball_breaks_a_bound(hidden, kind, radius, seed, positive):
    model = network([3, *hidden, 1], ACTIVATIONS[kind], seed=seed, positive=positive)
    inputs = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    objective = Objective(model, inputs, torch.zeros(3), nn.MSELoss())
    bounds = ball_bounds(read_mlp(model), inputs, radius)
    for x in in_the_ball(objective.start, radius, 12, seed):
        assert gain(objective, x, hidden[0], 3) >= bounds.first_layer_gain * (1 - 1e-12)
        assert float(torch.linalg.matrix_norm(objective.jacobian(x), 2)) <= bounds.jacobian_norm * (1 + 1e-12)
        for hessian in torch.func.hessian(lambda p: objective.outputs(p)[:, 0])(x):
            assert float(torch.linalg.matrix_norm(hessian, 2)) <= bounds.curvature * (1 + 1e-12)


@settings(max_examples=15, deadline=None)
@given(depth=st.integers(2, 4), frozen=st.integers(0, 15), bias=st.booleans(), seed=st.integers(0, 2**16))
def test_frozen_layers_and_missing_biases_keep_the_bounds(depth, frozen, bias, seed):
    model = network([3, *[2] * (depth - 1), 1], nn.Tanh(), bias=bias, seed=seed)
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place == 0 or not frozen >> (place % 4) & 1)
    inputs = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    objective = Objective(model, inputs, torch.zeros(3), nn.MSELoss())
    bounds = ball_bounds(read_mlp(model), inputs, 0.3)
    for x in in_the_ball(objective.start, 0.3, 8, seed):
        assert float(torch.linalg.matrix_norm(objective.jacobian(x), 2)) <= bounds.jacobian_norm
        for hessian in torch.func.hessian(lambda p: objective.outputs(p)[:, 0])(x):
            assert float(torch.linalg.matrix_norm(hessian, 2)) <= bounds.curvature


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    share=st.floats(0.0, 0.95),
    seed=st.integers(0, 2**16),
)
def test_the_gain_is_at_least_the_product_of_the_smallest_weights(widths, share, seed):
    """sqrt(m_1) (A - r) (kappa - r)^(L-2) m_2 ... m_{L-1} prod s', the simpler bound that it improves on."""
    model = network([4, *widths, 1], nn.Identity(), seed=seed)
    weights = [module.weight for module in model if isinstance(module, nn.Linear)]
    smallest = [float(weight.detach().min()) for weight in weights[1:]]
    radius = share * min(smallest)
    simple = math.sqrt(widths[0]) * math.prod(least - radius for least in smallest) * math.prod(widths[1:])
    found = ball_bounds(read_mlp(model), torch.randn(2, 4).double(), radius).first_layer_gain
    assert found >= simple * (1 - 1e-6)


def test_the_gain_of_two_layers_is_the_closed_form():
    model = network([4, 5, 1], nn.Tanh(), positive=False, seed=1)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    inputs = torch.randn(3, 4, dtype=torch.float64)
    radius = 0.1
    largest = radius * float((inputs.square().sum(1) + 1).max()) ** 0.5
    expected = (float(model[2].weight.norm()) - radius) / math.cosh(largest) ** 2
    assert ball_bounds(read_mlp(model), inputs, radius).first_layer_gain == pytest.approx(expected, rel=1e-7)


def test_the_curvature_of_two_layers_is_nearly_attained():
    """One unit, one sample: the Hessian of a tanh(w x) is known, and the bound loses little."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    a, w = 3.0, math.atanh(1 / math.sqrt(3))  # where |tanh''| is largest
    with torch.no_grad():
        model[0].weight.fill_(w)
        model[2].weight.fill_(a)
    slope, bend = 2 / 3, 4 / (3 * math.sqrt(3))
    exact = float(torch.linalg.matrix_norm(torch.tensor([[-a * bend, slope], [slope, 0.0]]).double(), 2))
    found = ball_bounds(read_mlp(model), torch.ones(1, 1).double(), 0.0).curvature
    assert exact <= found <= 1.25 * exact


def test_weights_that_can_change_sign_give_no_gain_and_a_reason():
    deep = ball_bounds(read_mlp(network([3, 2, 2, 2, 1], nn.Tanh())), torch.ones(2, 3), 5.0)
    assert deep.first_layer_gain == 0
    assert "negative" in deep.reason
    flat = ball_bounds(read_mlp(network([3, 2, 1], nn.Tanh())), torch.ones(2, 3), 50.0)
    assert flat.first_layer_gain == 0
    assert "zero" in flat.reason


def test_torch_softplus_is_bounded_only_below_its_threshold():
    model = network([3, 2, 1], nn.Softplus(threshold=1.0))
    assert math.isfinite(ball_bounds(read_mlp(model), 0.01 * torch.ones(2, 3), 0.01).curvature)
    far = ball_bounds(read_mlp(model), torch.ones(2, 3), 2.0)
    assert far.first_layer_gain == 0
    assert math.isinf(far.curvature)
    assert "softplus" in far.reason


IN_MANY_DIGITS = {
    nn.Tanh: mpmath.tanh,
    nn.Sigmoid: lambda z: 1 / (1 + mpmath.exp(-z)),
    nn.Softplus: lambda z: mpmath.log(1 + mpmath.exp(2 * z)) / 2,
    nn.Identity: lambda z: z,
}


@pytest.mark.parametrize("module", ACTIVATIONS)
def test_activation_facts_agree_with_many_digits(module):
    s = smooth_activation(module)
    exact = IN_MANY_DIGITS[type(module)]
    with mpmath.workdps(40):
        slopes = {z: mpmath.diff(exact, z) for z in mpmath.linspace(-12, 12, 97)}
        for reach in (0.25, 1, 3, 12):
            least = min(slope for z, slope in slopes.items() if abs(z) <= reach)
            assert s.least_slope(reach) <= least
            assert s.least_slope(reach) >= least * (1 - mpmath.mpf(10) ** -8)
        assert max(slopes.values()) <= s.most_slope
        bends = [abs(mpmath.diff(exact, z, 2)) for z in mpmath.linspace(-2, 2, 401)]
        assert 0.999 * s.most_bend <= max(bends) <= s.most_bend
        assert max(abs(exact(z)) for z in slopes) <= s.limit
        assert abs(exact(0) - s.at_zero) <= 1e-9


@pytest.mark.parametrize("module", ACTIVATIONS)
def test_the_running_error_of_the_forward_covers_many_digits(module):
    model = network([5, 4, 3, 1], module, positive=False, scale=3.0)
    inputs = torch.randn(3, 5, dtype=torch.float64)
    computed, error = outputs_with_error(read_mlp(model), inputs)
    exact = IN_MANY_DIGITS[type(module)]
    layers = [m for m in model if isinstance(m, nn.Linear)]
    with mpmath.workdps(40):
        for i in range(3):
            h = mpmath.matrix(inputs[i].tolist())
            for place, layer in enumerate(layers):
                h = mpmath.matrix(layer.weight.tolist()) * h + mpmath.matrix(layer.bias.tolist())
                h = h.apply(exact) if place < len(layers) - 1 else h
            assert abs(h[0] - mpmath.mpf(float(computed[i]))) <= float(error[i]) < 1e-12


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 2**16), power=st.integers(-20, 20))
def test_the_spectral_norm_is_bounded_from_above(rows, columns, seed, power):
    matrix = 2.0**power * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with mpmath.workdps(30):
        exact = max(mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False))
    assert exact <= spectral_norm_bound(matrix) <= exact * (1 + mpmath.mpf(10) ** -5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), "ReLU"),
        (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), "2 outputs"),
        (nn.Linear(2, 1), "1 modules in a row"),
        (nn.Sequential(nn.Conv1d(1, 1, 1), nn.Tanh(), nn.Linear(3, 1)), "Conv1d"),
    ],
)
def test_other_networks_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        read_mlp(model)
