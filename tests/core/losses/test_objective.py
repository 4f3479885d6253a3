"""The loss as a function of a flat vector, and descent on it, against loops and finite differences."""

import copy

import pytest
import torch
from torch import nn

from lightning_conv.losses.objective import Objective
from lightning_conv.theory.tools.descent import gradient_descent


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))


@pytest.fixture
def data():
    return torch.randn(5, 3), torch.randn(5, 2)


def test_the_gradient_is_autograd_s_and_the_model_stays_as_it_is(model, data, snapshot):
    before = snapshot(model)
    objective = Objective(model, *data, nn.MSELoss())
    value, gradient = objective.value_and_gradient(objective.start)
    objective.hessian_product(objective.start, gradient)
    objective.jacobian(objective.start)
    assert snapshot(model) == before
    twin = copy.deepcopy(model).double().eval()
    loss = nn.MSELoss()(twin(data[0].double()), data[1].double())
    own = torch.autograd.grad(loss, list(twin.parameters()))
    assert value == pytest.approx(float(loss), rel=1e-14)
    assert torch.allclose(gradient, torch.cat([g.flatten() for g in own]), rtol=1e-12)


def test_second_derivatives_agree_with_differences(model, data):
    objective = Objective(model, *data, nn.MSELoss())
    x, v = objective.start, torch.randn(objective.size, dtype=torch.float64)
    near = [objective.value_and_gradient(x + sign * 1e-5 * v)[1] for sign in (1, -1)]
    assert torch.allclose(objective.hessian_product(x, v), (near[0] - near[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_the_jacobian_is_that_of_the_double_loop(model, data, naive_jacobian):
    objective = Objective(model, *data, nn.MSELoss())
    assert torch.allclose(objective.jacobian(objective.start), naive_jacobian(model, data[0]), rtol=1e-10)
    residual = objective.residual(objective.start)
    gradient = 2 / 10 * objective.jacobian(objective.start).T @ residual
    assert torch.allclose(objective.value_and_gradient(objective.start)[1], gradient, rtol=1e-10)


def test_frozen_parameters_are_no_coordinates(model, data):
    model[0].weight.requires_grad_(False)
    objective = Objective(model, *data, nn.MSELoss())
    assert objective.size == 4 + 10
    assert set(objective.unflatten(objective.start)) == {"0.bias", "3.weight", "3.bias"}


def test_descent_is_the_naive_loop(model, data):
    objective = Objective(model, *data, nn.MSELoss())
    seen = []
    path = gradient_descent(objective, 0.1, steps=30, observe=lambda t, x: seen.append((t, x.clone())))
    twin = copy.deepcopy(model).double().eval()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    start = torch.cat([p.detach().flatten() for p in twin.parameters()])
    length = 0.0
    for t in range(31):
        loss = nn.MSELoss()(twin(data[0].double()), data[1].double())
        optimizer.zero_grad()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
        here = torch.cat([p.detach().flatten() for p in twin.parameters()])
        assert float(path.losses[t]) == pytest.approx(float(loss), rel=1e-10)
        assert float(path.gradient_norms[t]) == pytest.approx(float(gradient.norm()), rel=1e-10)
        assert float(path.distances[t]) == pytest.approx(float((here - start).norm()), rel=1e-9, abs=1e-14)
        assert float(path.lengths[t]) == pytest.approx(length, rel=1e-9, abs=1e-14)
        assert torch.allclose(seen[t][1], here, rtol=1e-10)
        length += 0.1 * float(gradient.norm())
        optimizer.step()
    assert path.taken == 30
    assert torch.equal(path.final, seen[-1][1])


def test_on_a_quadratic_the_step_s_curvature_is_the_hessian_s():
    """f = (w^2 + ...): curvature along the gradient is exact on a quadratic, so 2 (1 - e) / h is a Rayleigh quotient."""
    objective = Objective(nn.Linear(3, 1, bias=False), torch.randn(4, 3), torch.randn(4), nn.MSELoss())
    path = gradient_descent(objective, 0.05, steps=5)
    x = objective.start.clone()
    for t in range(5):
        _, g = objective.value_and_gradient(x)
        curvature = float(g @ objective.hessian_product(x, g) / (g @ g))
        assert float(path.smoothness[t]) == pytest.approx(curvature, rel=1e-9)
        assert float(path.efficiencies[t]) == pytest.approx(1 - 0.05 * curvature / 2, rel=1e-9)
        x = x - 0.05 * g


def test_it_stops_at_the_loss_that_is_asked_for_and_refuses_to_diverge(data):
    objective = Objective(nn.Linear(3, 2), *data, nn.MSELoss())
    path = gradient_descent(objective, 0.1, steps=10_000, until=objective.value(objective.start) / 2)
    assert path.losses[-1] <= path.losses[0] / 2 < path.losses[-2]
    with pytest.raises(FloatingPointError, match="smaller step"):
        gradient_descent(objective, 1e6, steps=500)
    with pytest.raises(ValueError, match="step: -1"):
        gradient_descent(objective, -1.0, steps=5)


def test_a_loss_with_weights_of_its_own_is_taken_in_float64_too():
    model, classes, weight = nn.Linear(3, 2), torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 3.0])
    inputs, loss_fn = torch.randn(4, 3), nn.CrossEntropyLoss(weight)
    objective = Objective(model, inputs, classes, loss_fn)
    expected = nn.functional.cross_entropy(copy.deepcopy(model).double()(inputs.double()), classes, weight.double())
    assert objective.value(objective.start) == pytest.approx(float(expected), rel=1e-14)
    assert loss_fn.weight.dtype == torch.float32
