"""Linear networks: conservation against autograd and finite differences, modes against a numerical solution."""

import pytest
import torch
from scipy.integrate import solve_ivp

from lightning_conv.theory.networks import LinearNetwork
from lightning_conv.theory.papers.linear_networks import (
    balancedness,
    balancedness_step,
    drift_bound,
    end_to_end,
    mode_strength,
    stays_balanced,
)

SIZES = (5, 4, 6, 3)


@pytest.fixture
def setting():
    net = LinearNetwork(SIZES, std=0.5, seed=3)
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    return net, x, y


def gradients(net, x, y):
    """Of a loss that is no square, so that nothing leans on one."""
    loss = torch.nn.functional.smooth_l1_loss(net(x), y)
    return list(torch.autograd.grad(loss, [layer.weight for layer in net.layers]))


def test_the_flow_conserves_the_balancedness(setting):
    net, x, y = setting
    w, g = net.weights, gradients(net, x, y)
    for k in range(2):
        speed = -(g[k + 1].T @ w[k + 1] + w[k + 1].T @ g[k + 1] - g[k] @ w[k].T - w[k] @ g[k].T)
        assert float(speed.norm()) < 1e-14
        assert float((w[k + 1].T @ g[k + 1]).norm()) > 1e-3  # the terms themselves are not zero


def test_a_step_changes_it_by_the_second_order_term_exactly(setting):
    net, x, y = setting
    g, eta = gradients(net, x, y), 0.7
    then = [w.clone() for w in net.weights]
    now = [w - eta * part for w, part in zip(then, g, strict=True)]
    added = balancedness_step(g, eta)
    for after, before, part in zip(balancedness(now), balancedness(then), added, strict=True):
        assert torch.allclose(after - before, part, atol=1e-14)
    bound = drift_bound(g, eta)
    assert stays_balanced(now, then, bound).verdict == "consistent"
    assert max(float(torch.linalg.matrix_norm(part, 2)) for part in added) <= bound
    assert stays_balanced([w + 0.1 for w in then], then, bound).verdict == "refuted"


def test_balancedness_is_its_formula_and_the_product_its_product(setting):
    net, x, _ = setting
    w = net.weights
    for k, d in enumerate(balancedness(w)):
        assert torch.allclose(d, w[k + 1].T @ w[k + 1] - w[k] @ w[k].T)
    assert torch.allclose(x @ end_to_end(w).T, net(x), rtol=1e-12)
    with pytest.raises(ValueError, match=r"weights: shapes \[\(4, 5\)\]"):
        balancedness(w[:1])
    with pytest.raises(ValueError, match="weights: shapes"):
        end_to_end([w[0], w[0]])


def test_a_balanced_start_is_balanced_with_the_singular_values_that_were_asked_for():
    net = LinearNetwork((7, 5, 6, 4), std=0.3, balanced=True)
    assert max(float(d.norm()) for d in balancedness(net.weights)) < 1e-15
    assert torch.allclose(torch.linalg.svdvals(end_to_end(net.weights)), torch.full((4,), 0.027, dtype=torch.float64))
    with pytest.raises(ValueError, match="balanced needs hidden sizes of 4 or more"):
        LinearNetwork((7, 3, 4), balanced=True)
    with pytest.raises(ValueError, match=r"sizes\[1\]: 0"):
        LinearNetwork((7, 0, 4))


@pytest.mark.parametrize("layers", [1, 2])
def test_modes_solve_their_differential_equation(layers):
    times = torch.linspace(0, 4, 9, dtype=torch.float64)

    def speed(_, a):
        return layers * a ** (2 - 2 / layers) * (1.7 - a)

    solved = solve_ivp(speed, (0, 4), [0.01], t_eval=times.numpy(), rtol=1e-10, atol=1e-12).y[0]
    assert torch.allclose(mode_strength(times, 0.01, 1.7, layers=layers), torch.from_numpy(solved), rtol=1e-7)
    with pytest.raises(ValueError, match="layers: 3"):
        mode_strength(times, 0.01, 1.7, layers=3)
    with pytest.raises(ValueError, match="positive"):
        mode_strength(times, 0.0, 1.7)


def test_small_steps_of_an_aligned_network_follow_the_closed_form():
    target = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    net = LinearNetwork((2, 2, 2))
    weights, eta = [0.1 * torch.eye(2, dtype=torch.float64)] * 2, 1e-3
    for layer, weight in zip(net.layers, weights, strict=True):
        layer.weight.data.copy_(weight)
    for _ in range(1500):
        loss = (net(torch.eye(2, dtype=torch.float64)) - target.T).square().sum() / 2
        for layer, g in zip(net.layers, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            layer.weight.data -= eta * g
    found = end_to_end(net.weights).diagonal()
    wanted = [float(mode_strength(torch.tensor(1.5), 0.01, s)) for s in (2.0, 1.0)]
    assert found.tolist() == pytest.approx(wanted, rel=0.01)
