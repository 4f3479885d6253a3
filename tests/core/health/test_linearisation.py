"""The error of the network linearised at the start is what finite differences say, 0 for linear models, and falls with the width."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_conv.health.kernel.linearisation import linearisation_error

X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

NETWORKS = {
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 3)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)),
    "normalised": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)
    ),
    "transformer": lambda: nn.Sequential(
        nn.Flatten(1, 2),
        nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(36, 3),
    ),
}


def start_of(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def train(model, steps=20, rate=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()


def by_differences(model, start, mode):
    """The error with J_0 (w - w_0) from a central difference of the network itself."""
    model = copy.deepcopy(model).train(mode == "batch")
    now = start_of(model)

    def outputs(weights):
        with torch.no_grad():
            for name, each in model.named_parameters():
                each.copy_(weights[name])
            return model(X).flatten(1)

    def along(h):
        return outputs({name: each + h * (now[name] - each) for name, each in start.items()})

    h = 1e-4
    pushed = (along(h) - along(-h)) / (2 * h)
    change = outputs(now) - outputs(start)
    return float((change - pushed).norm() / change.norm())


@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_what_finite_differences_say(name, mode):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    start = start_of(model)
    train(model)
    before = copy.deepcopy(model.state_dict())
    found = linearisation_error(model, X, start, batch_norm=mode)
    assert found.error == pytest.approx(by_differences(model, start, mode), rel=1e-5)
    assert found.error > 0.01
    assert found.rounding < 1e-10
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


def test_float32_is_off_by_no_more_than_its_rounding():
    torch.manual_seed(0)
    model = NETWORKS["perceptron"]()
    start = start_of(model)
    train(model.double())
    model.float()
    exact = linearisation_error(model, X, start, dtype=torch.float64)
    rounded = linearisation_error(model, X.float(), start)
    assert abs(rounded.error - exact.error) <= rounded.rounding < 1e-3


def test_a_model_that_is_linear_in_its_weights_has_no_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    start = start_of(model)
    with torch.no_grad():
        for each in model[3].parameters():
            each.normal_()
    head = {name: each for name, each in start.items() if name.startswith("3.")}
    assert linearisation_error(model, X, head).error < 1e-14


class Wide(nn.Module):
    """A perceptron in the parametrisation of the tangent kernel."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(width, 36)), nn.Parameter(torch.randn(3, width))
        self.double()

    def forward(self, x):
        h = torch.tanh(x.flatten(1) @ self.a.T / 6)
        return h @ self.b.T / math.sqrt(len(self.a))


def test_it_falls_with_the_width_where_the_kernel_has_a_limit():
    errors = []
    for width in (16, 16 * 64):
        torch.manual_seed(0)
        model = Wide(width)
        start = start_of(model)
        train(model, steps=40, rate=0.3)
        errors.append(linearisation_error(model, X, start).error)
    narrow, wide = errors
    assert narrow > 0.1 > wide
    assert narrow / wide > 4  # by theory at least 8, the root of 64, up to a constant


def test_outputs_that_have_not_moved_have_no_error_and_bad_input_is_named():
    model = NETWORKS["perceptron"]().double()
    start = start_of(model)
    found = linearisation_error(model, X, start)
    assert math.isnan(found.error)
    assert found.moved == 0
    for given, mode, why in (
        ({}, "eval", "no weights"),
        ({"9.weight": Y}, "eval", "missing in the model"),
        ({"1.weight": Y}, "eval", "has the shape"),
        (start, "frozen", "frozen"),
    ):
        with pytest.raises(ValueError, match=why):
            linearisation_error(model, X, given, batch_norm=mode)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": None}, TypeError, "model: None; need a torch.nn.Module"),
        ({"inputs": 3.0}, TypeError, "inputs: expected a tensor, a tuple or a mapping of tensors, got float"),
        ({"start": [1]}, TypeError, "start: [1] (list); need weights of the start by name"),
        ({"start": {"weight": 3.0}}, TypeError, "start['weight']: 3.0 (float); need a tensor of the shape"),
        ({"batch_norm": "train"}, ValueError, "batch_norm: 'train' is not one of 'eval', 'batch'"),
    ],
)
def test_a_bad_argument_is_named(change, error, says):
    layer = nn.Linear(2, 1)
    given = {"model": layer, "inputs": torch.eye(2), "start": {"weight": torch.zeros(1, 2)}} | change
    with pytest.raises(error) as raised:
        linearisation_error(**given)
    assert str(raised.value).startswith(says)
