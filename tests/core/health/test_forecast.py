"""The forecast is the run itself where the network is linear in its weights, and close to it where the kernel hardly changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_conv import ntk_gram
from lightning_conv.health.kernel.forecast import MOST, LinearisedRun, forecast_losses
from lightning_conv.health.kernel.kernel_modes import KernelModes, step_kernel
from lightning_conv.health.step.optimizer_rules import step_sizes
from lightning_conv.kernels.operator import NTKOperator

N, C = 6, 3
LOSSES = {
    "mse": lambda u, y: F.mse_loss(u, torch.eye(C, dtype=u.dtype)[y]),
    "sum of squares": lambda u, y: F.mse_loss(u, torch.eye(C, dtype=u.dtype)[y], reduction="sum"),
    "cross-entropy": F.cross_entropy,
    "huber": lambda u, y: F.huber_loss(u, torch.eye(C, dtype=u.dtype)[y], delta=0.3),
    "binary": lambda u, y: F.binary_cross_entropy_with_logits(u, torch.eye(C, dtype=u.dtype)[y]),
}
CURVATURES = {"mse": 2 / (N * C), "sum of squares": 2.0}
OPTIMIZERS = {
    "plain": {"lr": 0.05},
    "heavy ball": {"lr": 0.02, "momentum": 0.9},
    "dampened": {"lr": 0.05, "momentum": 0.8, "dampening": 0.3},
    "nesterov": {"lr": 0.02, "momentum": 0.7, "nesterov": True},
}


def linear(seed=0, features=10):
    torch.manual_seed(seed)
    model = nn.Linear(features, C).double()
    return model, torch.randn(N, features, dtype=torch.float64), torch.arange(N) % C


def train(model, x, loss, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(x))
        value.backward()
        losses.append(value.item())
        optimizer.step()
    return [*losses, loss(model(x)).item()]


def momentum_in_outputs(model, x, optimizer):
    """J D m by finite differences, which are exact for a linear model."""
    sizes = step_sizes(optimizer, dict(model.named_parameters()))
    with torch.no_grad():
        before = model(x)
        for name, parameter in model.named_parameters():
            parameter += sizes.scales[name] * optimizer.state[parameter]["momentum_buffer"]
        after = model(x)
        for name, parameter in model.named_parameters():
            parameter -= sizes.scales[name] * optimizer.state[parameter]["momentum_buffer"]
    return after - before


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_run_of_a_linear_model_begun_in_its_middle(name, options):
    model, x, y = linear()
    optimizer = torch.optim.SGD(model.parameters(), **options)

    def loss(u):
        return LOSSES[name](u, y)

    train(model, x, loss, optimizer, 5)
    sizes = step_sizes(optimizer, dict(model.named_parameters()))
    run = LinearisedRun(
        KernelModes.of_matrix(options["lr"] * ntk_gram(model, x, outputs="full").matrix),
        model(x),
        loss,
        rule=sizes.rules["weight"],
        velocity=momentum_in_outputs(model, x, optimizer) if options.get("momentum") else None,
        curvature=CURVATURES.get(name),
    )
    predicted = forecast_losses(run, [1, 2, 7, 40])
    real = train(model, x, loss, optimizer, 40)
    assert predicted == pytest.approx([real[k] for k in (1, 2, 7, 40)], rel=1e-8)
    assert abs(real[40] / real[0] - 1) > 0.01


@pytest.mark.parametrize("name", ["mse", "cross-entropy"])
def test_outputs_that_share_one_kernel(name):
    model, x, y = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shared = x @ x.T + 1
    run = LinearisedRun(
        KernelModes.of_matrix(0.05 * shared), model(x), lambda u: LOSSES[name](u, y), curvature=CURVATURES.get(name)
    )
    assert run.advance(30) == pytest.approx(train(model, x, lambda u: LOSSES[name](u, y), optimizer, 30)[30], rel=1e-8)


@pytest.mark.parametrize("name", ["mse", "cross-entropy"])
def test_a_schedule_and_rates_of_groups(name):
    model, x, y = linear()
    groups = [{"params": [model.weight], "lr": 0.05}, {"params": [model.bias], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    sizes = step_sizes(optimizer, dict(model.named_parameters()))
    product = step_kernel(NTKOperator(model, x), sizes.scales)
    matrix = torch.stack([product(row) for row in torch.eye(N * C, dtype=torch.float64)])
    run = LinearisedRun(
        KernelModes.of_matrix(matrix),
        model(x),
        lambda u: LOSSES[name](u, y),
        curvature=CURVATURES.get(name),
        scale=lambda number: 0.5 ** (number // 4),
    )
    predicted = forecast_losses(run, [3, 6, 15])
    real = []
    for _ in range(15):
        real += train(model, x, lambda u: LOSSES[name](u, y), optimizer, 1)[1:]
        schedule.step()
    assert predicted == pytest.approx([real[k - 1] for k in (3, 6, 15)], rel=1e-6)


def test_a_step_of_the_outputs_by_the_product_is_that_of_the_optimizer():
    model, x, y = linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, x, lambda u: F.cross_entropy(u, y), optimizer, 3)
    sizes = step_sizes(optimizer, dict(model.named_parameters())).scales
    v = torch.randn(N * C, dtype=torch.float64)
    found = step_kernel(NTKOperator(model, x), sizes)(v)
    jacobian = torch.autograd.functional.jacobian(
        lambda w, b: F.linear(x, w, b).flatten(), (model.weight.detach(), model.bias.detach())
    )
    flat = torch.cat([each.reshape(N * C, -1) for each in jacobian], 1)
    d = torch.cat([sizes[name].flatten() for name in ("weight", "bias")])
    assert torch.allclose(found, flat @ (d * (flat.T @ v)), rtol=1e-6)


def test_few_products_reproduce_as_many_steps_of_a_squared_loss():
    model, x, y = linear(features=30)
    kernel = 0.02 * ntk_gram(model, x, outputs="full").matrix

    def loss(u):
        return LOSSES["mse"](u, y)

    outputs = model(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(outputs), outputs)
    few = KernelModes.of_products(lambda v: kernel @ v, gradient, products=5)
    assert few.values.numel() == 5
    whole = LinearisedRun(KernelModes.of_matrix(kernel), outputs, loss, curvature=CURVATURES["mse"])
    part = LinearisedRun(few, outputs, loss, curvature=CURVATURES["mse"])
    assert forecast_losses(part, [1, 2, 3, 4]) == pytest.approx(forecast_losses(whole, [1, 2, 3, 4]), rel=1e-10)
    assert part.advance(56) == pytest.approx(whole.advance(56), rel=0.05)


@pytest.mark.parametrize("curvature", [None, 2 / 64])
def test_the_present_kernel_predicts_a_network(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 1)).double()
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 1, dtype=torch.float64)

    def loss(u):
        return F.mse_loss(u, y)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    start = KernelModes.of_matrix(0.05 * ntk_gram(model, x, outputs="full").matrix)
    first = LinearisedRun(start, model(x), loss, curvature=curvature)
    before = train(model, x, loss, optimizer, 300)
    run = LinearisedRun(
        KernelModes.of_matrix(0.05 * ntk_gram(model, x, outputs="full").matrix), model(x), loss, curvature=curvature
    )
    predicted = run.advance(100)
    real = train(model, x, loss, optimizer, 100)
    assert real[100] < 0.9 * real[0]
    assert abs(predicted - real[100]) < 0.25 * abs(real[0] - real[100])
    assert abs(first.advance(400) / real[100] - 1) > abs(predicted / real[100] - 1)
    assert before[0] > real[0]


def test_both_ways_to_continue_a_squared_loss_agree_and_both_overflow():
    modes = KernelModes.of_matrix(torch.diag(torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)))
    outputs = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    known, unknown = (
        LinearisedRun(modes, outputs, lambda u: u.square().sum() / 2, curvature=each) for each in (1.0, None)
    )
    for _ in range(3):
        assert known.advance(7) == pytest.approx(unknown.advance(7), rel=1e-10)
    assert known.steps == unknown.steps == 21
    assert known.advance(1900) == unknown.advance(1900) == math.inf


def test_no_steps_leave_the_loss():
    model, x, y = linear()
    modes = KernelModes.of_matrix(ntk_gram(model, x, outputs="full").matrix)
    for name, curvature in itertools.product(["mse"], [None, CURVATURES["mse"]]):
        run = LinearisedRun(modes, model(x), lambda u, name=name: LOSSES[name](u, y), curvature=curvature)
        assert run.advance(0) == pytest.approx(LOSSES[name](model(x), y).item(), rel=1e-12)


def test_what_cannot_be_continued_is_refused():
    modes = KernelModes.of_matrix(torch.eye(4, dtype=torch.float64))
    outputs = torch.ones(2, 2)
    with pytest.raises(ValueError, match="vectors of 4 numbers"):
        LinearisedRun(modes, torch.ones(3, 2), torch.sum)
    with pytest.raises(ValueError, match="curvature"):
        LinearisedRun(modes, outputs, torch.sum, curvature=0.0)
    with pytest.raises(ValueError, match="at most"):
        LinearisedRun(modes, outputs, torch.sum).advance(MOST + 1)
    with pytest.raises(ValueError, match="steps: -1"):
        LinearisedRun(modes, outputs, torch.sum).advance(-1)
    for ahead in ([0], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="ahead"):
            forecast_losses(LinearisedRun(modes, outputs, torch.sum), ahead)
    with pytest.raises(ValueError, match="kernel"):
        KernelModes.of_matrix(torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="start"):
        KernelModes.of_products(lambda v: v, torch.zeros(3))
    with pytest.raises(ValueError, match='outputs="full"'):
        step_kernel(NTKOperator(nn.Linear(2, 2), torch.ones(2, 2), outputs="sum"), {"weight": torch.ones(())})
    with pytest.raises(ValueError, match="none of them"):
        step_kernel(NTKOperator(nn.Linear(2, 2), torch.ones(2, 2)), {"other": torch.ones(())})


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"modes": None}, TypeError, "modes: None; need KernelModes.of_matrix(...), or of_products"),
        ({"outputs": None}, TypeError, "outputs: None; need the present outputs, (n, ...)"),
        ({"outputs": torch.ones(3).long()}, TypeError, "outputs: torch.int64; need a floating type, such as float64"),
        ({"loss": 3}, TypeError, "loss: 3 (int) cannot be called; need a function of the outputs"),
        ({"loss": lambda u: u}, TypeError, "loss: returned a tensor of shape (3, 1); need a tensor of one number"),
        ({"loss": lambda u: 1.0}, TypeError, "loss: returned 1.0 (float); need a tensor of one number"),
        ({"rule": "sgd"}, TypeError, "rule: 'sgd' (str); need an UpdateRule, or None for plain descent"),
        ({"velocity": "a"}, TypeError, "velocity: 'a' (str); need a tensor of the shape of the outputs, or None"),
        ({"velocity": torch.ones(5)}, ValueError, "velocity: shape (5,); need that of the outputs, (3, 1)"),
        ({"curvature": "a"}, ValueError, "curvature: 'a' (str); need a positive number, or None"),
        (
            {"scale": 3},
            TypeError,
            "scale: 3 (int) cannot be called; need a function of the number of the step, or None",
        ),
    ],
)
def test_a_bad_argument_of_a_linearised_run_is_named(options, error, says):
    given = {
        "modes": KernelModes.of_matrix(torch.eye(3)),
        "outputs": torch.ones(3, 1),
        "loss": lambda u: u.square().sum(),
    }
    with pytest.raises(error) as raised:
        LinearisedRun(**given | options)
    assert str(raised.value).startswith(says)


@pytest.mark.parametrize("steps", ["a", 1.5, None])
def test_steps_are_whole_numbers(steps):
    run = LinearisedRun(KernelModes.of_matrix(torch.eye(3)), torch.ones(3, 1), lambda u: u.square().sum())
    with pytest.raises(TypeError, match=r"steps: .*; need a whole number of at least 0"):
        run.advance(steps)
    with pytest.raises(TypeError, match=r"ahead: .*; need a whole number of at least 1"):
        forecast_losses(run, [steps])
    with pytest.raises(TypeError, match=r"ahead: 3 \(int\); need a list of numbers of steps"):
        forecast_losses(run, 3)
