"""Inputs that are equal or far off in scale, and a signal that does not arrive, are named; normal starts are not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_conv.health.findings.of_inputs import finding_of_inputs, finding_of_signal, input_scale, is_lost
from lightning_conv.health.layers.layer_signal import LayerSignal, layer_signal

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


def stack(depth, gain, activation=nn.Tanh, width=16):
    torch.manual_seed(0)
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
        nn.init.normal_(layers[-2].weight, std=gain / math.sqrt(width))
    return nn.Sequential(*layers, nn.Linear(width, 3))


@pytest.mark.parametrize(
    "inputs",
    [
        torch.ones(8, 3),
        torch.tensor([[1, 2]]).repeat(8, 1),
        (torch.ones(8, 2), torch.zeros(8, 3)),
        {"a": torch.full((8, 2), 3.0)},
    ],
)
def test_equal_inputs_are_an_alert(inputs):
    found = finding_of_inputs(input_scale(inputs), step=0)
    assert found.level == "alert"
    assert "All 8 samples of the probe are equal" in found.sentence


def test_one_sample_or_one_tensor_that_differs_is_not_equal():
    assert not input_scale(torch.ones(1, 3)).equal
    assert not input_scale((torch.ones(8, 2), torch.arange(8.0)[:, None])).equal


@pytest.mark.parametrize(
    ("factor", "excess", "level"),
    [(1, 100, "ok"), (1000, None, "notice"), (1000, 2, "notice"), (1000, 30, "warning"), (1e-3, 30, "notice")],
)
def test_a_scale_is_a_warning_only_if_the_loss_started_far_off(factor, excess, level):
    found = finding_of_inputs(input_scale(factor * X), excess=excess, step=0)
    assert found.level == level
    assert found.value == pytest.approx(
        factor * math.sqrt(sum(float(v) ** 2 for v in X.flatten()) / X.numel()), rel=1e-6
    )


def test_tokens_have_no_scale_and_nan_is_not_judged_here():
    assert finding_of_inputs(input_scale(torch.randint(5000, (8, 4)))).level == "ok"
    assert math.isnan(input_scale(torch.tensor([[math.nan], [1.0]])).size)


def test_the_spread_is_that_of_a_double_loop():
    net = stack(2, 1.0).double()
    hidden = net[1](net[0](X.double()))
    outputs = net[2](hidden).tolist()
    total = 0.0
    for unit in range(16):
        mean = sum(row[unit] for row in outputs) / 32
        total += sum((row[unit] - mean) ** 2 for row in outputs)
    found = {each.name: each.spread for each in layer_signal(net, X.double())}
    assert list(found) == ["0", "2", "4"]
    assert found["2"] == pytest.approx(math.sqrt(total / (32 * 16)), rel=1e-12)


def test_a_bias_is_no_signal_and_the_model_is_left_alone():
    net = nn.Linear(16, 4)
    before = layer_signal(net, X)[0].spread
    nn.init.constant_(net.bias, 1e3)
    net.train()
    assert layer_signal(net, X)[0].spread == pytest.approx(before, rel=1e-3)
    assert net.training
    assert not net._forward_hooks
    with pytest.raises(ValueError, match="need at least two"):
        layer_signal(net, X[:1])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_a_signal_that_vanishes_is_a_warning_from_the_second_time_on(activation):
    layers = layer_signal(stack(16, 0.2, activation), X)
    assert is_lost(layers)
    assert finding_of_signal(layers, lost_since=0, step=0).level == "notice"
    found = finding_of_signal(layers, lost_since=0, step=5)
    assert found.level == "warning"
    assert "shrinks with depth" in found.sentence
    assert "since step 0" in found.sentence
    assert found.value == pytest.approx(max(each.spread for each in layers[-4:]) / layers[0].spread)


def test_a_signal_that_explodes_is_a_warning_only_if_the_loss_started_far_off():
    layers = layer_signal(stack(12, 5.0, nn.ReLU), X)
    assert finding_of_signal(layers, step=0).level == "notice"
    found = finding_of_signal(layers, excess=1e4, step=0)
    assert found.level == "warning"
    assert "grows with depth" in found.sentence


@pytest.mark.parametrize(
    "net",
    [
        stack(12, math.sqrt(2), nn.ReLU),
        stack(12, 1.0),
        nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()) for _ in range(20)]),
    ],
    ids=["he", "tanh", "layer norm"],
)
def test_usual_starts_are_ok_even_with_a_head_of_zeros(net):
    assert finding_of_signal(layer_signal(net, X), excess=100.0, lost_since=0, step=5).level == "ok"
    spreads = [*layer_signal(net, X), LayerSignal("head", 0.0)]
    assert finding_of_signal(spreads, lost_since=0, step=5).level == "ok"


def test_a_network_of_few_layers_or_without_a_signal_is_not_judged():
    assert finding_of_signal(layer_signal(stack(2, 1e-3), X), step=0) is None
    assert finding_of_signal([LayerSignal(str(k), 0.0) for k in range(6)], step=0) is None


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_inputs_that_a_normalisation_scales_are_neither_lost_nor_blown_up(factor):
    net = nn.Sequential(
        nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16, eps=0.0), nn.ReLU(), *stack(6, math.sqrt(2), nn.ReLU)
    )
    layers = layer_signal(net, factor * X, batch_norm="frozen")
    assert finding_of_signal(layers, excess=100.0, lost_since=0, step=9).level == "ok"
    assert not is_lost(layers)
