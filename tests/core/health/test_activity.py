"""Dead, saturated and constant units are found, whatever computes them, and living ones are not accused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_conv.health.layers.activity import unit_activity
from lightning_conv.health.layers.layer_signal import layer_signal

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(1))


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 5), nn.Linear(5, 2), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def sequential(activation):
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 2))


RECTIFIED = [lambda: sequential(nn.ReLU()), lambda: sequential(nn.ReLU(inplace=True)), lambda: Functional(F.relu)]
RECTIFIED += [
    lambda: Functional(torch.relu),
    lambda: Functional(lambda h: h.clamp(min=0)),
    lambda: Functional(lambda h: F.relu_(h)),
]


@pytest.mark.parametrize("make", RECTIFIED)
def test_a_unit_that_is_zero_for_all_samples_is_dead(make):
    model = make()
    first = next(model.children())
    with torch.no_grad():
        first.weight.normal_(generator=torch.Generator().manual_seed(2))
        first.bias.zero_()
        first.bias[[1, 3]] = -100.0
    (layer,) = unit_activity(model, X)
    assert (layer.units, layer.dead, layer.saturated, layer.constant) == (5, (1, 3), (), ())
    assert not layer.is_out
    with torch.no_grad():
        first.bias.fill_(-100.0)
    assert unit_activity(model, X)[0].is_out


@pytest.mark.parametrize(
    "make", [lambda: sequential(nn.Tanh()), lambda: Functional(torch.sigmoid), lambda: sequential(nn.Hardtanh())]
)
def test_a_unit_at_its_ends_is_saturated(make):
    model = make()
    first = next(model.children())
    with torch.no_grad():
        first.weight.fill_(0.1)
        first.weight[2] = 1e4
        first.bias.zero_()
    (layer,) = unit_activity(model, X)
    assert (layer.dead, layer.saturated, layer.constant) == ((), (2,), ())


def test_a_unit_that_ignores_its_inputs_is_constant():
    model = sequential(nn.GELU())
    with torch.no_grad():
        model[0].weight[4] = 0
        model[0].bias[4] = 1.0
    (layer,) = unit_activity(model, X)
    assert (layer.dead, layer.saturated, layer.constant) == ((), (), (4,))


def test_units_of_convolutions_are_channels():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(6, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 2),
    )
    with torch.no_grad():
        model[1].weight[5], model[1].bias[5] = 0.0, -1.0
        model[4].bias[0] = -50.0
    first, second = unit_activity(model, IMAGES, batch_norm="frozen")
    assert (first.name, first.units, first.dead) == ("2", 6, (5,))
    assert (second.name, second.units, second.dead) == ("5", 3, (0,))


def test_units_of_tokens_are_features():
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Flatten(), nn.Linear(42, 2))
    with torch.no_grad():
        model[0].bias[0] = -100.0
    (layer,) = unit_activity(model, IMAGES[:, 0])
    assert (layer.units, layer.dead) == (7, (0,))


def test_an_activation_that_is_called_twice_is_two_layers():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 5), relu, nn.Linear(5, 6), relu, nn.Linear(6, 2))
    assert [(each.name, each.units) for each in unit_activity(model, X)] == [("1", 5), ("1 (2)", 6)]


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2)).train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    unit_activity(model, X)
    assert model.training
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_one_sample_tells_nothing():
    with pytest.raises(ValueError, match="1 sample; need at least two"):
        unit_activity(sequential(nn.ReLU()), X[:1])


@pytest.mark.parametrize("function", [unit_activity, layer_signal])
@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "says"),
    [
        (None, torch.zeros(3, 2), {}, TypeError, "model: None; need a torch.nn.Module"),
        (
            nn.Linear(2, 2),
            None,
            {},
            TypeError,
            "inputs: expected a tensor, a tuple or a mapping of tensors, got NoneType",
        ),
        (
            nn.Linear(2, 2),
            torch.full((3, 2), torch.nan),
            {},
            ValueError,
            "inputs: tensor 0 of shape (3, 2) contains NaN",
        ),
        (nn.Linear(2, 2), torch.zeros(3, 2), {"batch_norm": "train"}, ValueError, "batch_norm: 'train' is not one of"),
    ],
)
def test_a_bad_argument_of_a_forward_pass_is_named(function, model, inputs, options, error, says):
    with pytest.raises(error) as raised:
        function(model, inputs, **options)
    assert str(raised.value).startswith(says)
