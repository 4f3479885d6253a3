"""Dead layers are named the second time they are seen; the first value that is not finite is named at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_conv.health.findings.of_units import (
    NotFinite,
    finding_of_layers,
    finding_of_not_finite,
    finding_of_units,
)
from lightning_conv.health.layers.activity import LayerActivity, unit_activity


def network(bias=0.0, activation=nn.ReLU):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), activation(), nn.Linear(16, 8), activation(), nn.Linear(8, 2))
    nn.init.constant_(model[0].bias, bias)
    return model


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("since", "constant", "level"),
    [(None, True, "notice"), (8, True, "notice"), (4, False, "warning"), (4, True, "alert"), (0, True, "alert")],
)
def test_a_dead_layer(since, constant, level):
    found = finding_of_units(
        unit_activity(network(-50.0), X), samples=32, step=8, since=since, outputs_constant=constant
    )
    assert found.level == level
    assert "All 16 units of 1" in found.sentence
    assert "are dead (zero) and all 8 units of 3 are constant on the 32 samples" in found.sentence
    assert ("returns the same" in found.sentence) == constant
    assert bool(found.advice) == (since == 0)
    assert found.value == 1.0


@pytest.mark.parametrize(("constant", "level"), [(True, "warning"), (False, "notice")])
def test_a_layer_that_went_out_in_training(constant, level):
    layers = unit_activity(network(-50.0), X)
    found = finding_of_units(layers, samples=32, step=8, were_on=True, outputs_constant=constant)
    assert found.level == level
    assert ("at an earlier measurement they were not out" in found.sentence) == constant
    assert bool(found.advice) == constant


def test_a_saturated_layer():
    found = finding_of_units(unit_activity(network(50.0, nn.Tanh), X), samples=32, step=8, since=0)
    assert found.level == "warning"
    assert "are saturated" in found.sentence


def test_a_healthy_network_is_not_accused():
    found = finding_of_units(unit_activity(network(), X), samples=32, step=8)
    assert (found.level, found.advice) == ("ok", "")
    assert "of 24 units are switched off" in found.sentence
    assert finding_of_units([], samples=32, step=8).level == "ok"


def test_half_of_a_layer_is_a_notice():
    half = LayerActivity("act", 8, (0, 1), (2,), (3, 0))
    found = finding_of_units([half, LayerActivity("other", 8, (), (), ())], samples=32, step=8)
    assert found.level == "notice"
    assert found.sentence.startswith("4 of 8 units of act")
    assert finding_of_units([LayerActivity("act", 8, (0, 1, 2), (), ())], samples=32, step=8).level == "ok"


def test_a_layer_without_a_gradient_must_have_been_so_before():
    now = {"first": 0.0, "last": 1.0}
    assert finding_of_layers(now, None, step=0).level == "ok"
    assert finding_of_layers(now, {"first": 0.5, "last": 0.5}, step=4).level == "ok"
    found = finding_of_layers(now, now, step=4)
    assert found.level == "warning"
    assert found.sentence.startswith("The outputs do not depend on the weights of first at two measurements")
    assert finding_of_layers({"first": 0.5, "last": 0.5}, now, step=8).level == "ok"
    assert finding_of_layers({"first": math.nan}, None, step=0) is None
    assert finding_of_layers({}, None, step=0) is None


def test_the_first_value_that_is_not_finite():
    found = finding_of_not_finite(
        NotFinite(kind="gradient", name="net.0.weight", step=5, moment="before"), step=9, inputs_checked=True
    )
    assert found.level == "alert"
    assert found.sentence == "At step 5 the gradient of net.0.weight became NaN, before the step of the optimizer."
    assert "backward" in found.advice
    assert found.step == 5


@pytest.mark.parametrize("kind", ["input", "output", "loss", "gradient", "weight", "buffer"])
def test_a_cause_is_named_only_if_everything_before_was_looked_at(kind):
    first = NotFinite(kind=kind, step=2, moment="after", value="infinite")
    assert finding_of_not_finite(first, step=2).advice == ""
    assert bool(finding_of_not_finite(first, step=2, inputs_checked=True).advice) == (kind not in ("weight", "buffer"))


def test_a_skipped_step_and_a_finite_run_are_no_alert():
    skipped = NotFinite(kind="gradient", step=2, moment="before", value="infinite", skipped=True)
    assert finding_of_not_finite(skipped, step=2).level == "notice"
    found = finding_of_not_finite(None, step=7)
    assert (found.level, found.value) == ("ok", 0.0)


def test_a_share_that_is_tiny_but_not_zero_is_not_called_no_dependence():
    found = finding_of_layers({"first": 1e-14, "last": 1.0}, {"first": 0.0}, step=10)
    assert found.level == "warning"
    assert "move the outputs by at most 1e-14 of the kernel's trace" in found.sentence
    assert "do not depend" not in found.sentence
    assert "hardly depend" in finding_of_layers({"first": 1e-14, "last": 1.0}, None, step=0).sentence


@pytest.mark.parametrize(
    ("dead", "saturated", "constant", "words"),
    [
        ((0, 1, 2), (), (), "are dead (zero)"),
        ((), (0, 1, 2), (), "are saturated"),
        ((0, 1), (), (2,), "are constant"),
        ((0,), (1, 2), (), "are dead, saturated or constant"),
    ],
)
def test_what_is_said_of_units_is_true_of_all_of_them(dead, saturated, constant, words):
    found = finding_of_units([LayerActivity("act", 3, dead, saturated, constant)], samples=8, step=0)
    assert found.sentence == f"All 3 units of act {words} on the 8 samples of the probe."


def test_layers_that_are_out_in_other_ways_are_not_said_to_be_the_same():
    dead, constant = LayerActivity("a", 3, (0, 1, 2), (), ()), LayerActivity("b", 3, (0,), (), (1, 2))
    found = finding_of_units([dead, constant], samples=8, since=0, step=4, outputs_constant=True)
    assert found.sentence.startswith(
        "All 3 units of a are dead (zero) and all 3 units of b are constant on the 8 samples"
    )
    assert finding_of_units([dead, dead], samples=8, step=0).sentence.startswith("All 3 units of a and a are dead")


def test_a_single_layer_is_not_said_to_be_the_least_of_all():
    found = finding_of_layers({"layer": 1.0}, None, step=3)
    assert (found.level, found.sentence) == ("ok", "The only layer, layer, moves the outputs.")
