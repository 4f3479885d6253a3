"""What a plan counts, against closed forms: flops of passes and products, samples passed again, and what reading took."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_conv.kernels import ntk_gram, plan_ntk
from lightning_conv.kernels.engine import coupled
from lightning_conv.kernels.planning.costs import Problem, samples_passed

WIDTHS = (6, 20, 16, 3)
SAMPLES = 9


def mlp(norm=False, widths=WIDTHS):
    torch.manual_seed(0)
    pairs = list(pairwise(widths))
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.Tanh())]
    return nn.Sequential(*layers[:-1]), torch.randn(SAMPLES, widths[0])


def forward_and_backward(widths=WIDTHS):
    """Of one sample: a product a layer forward; backward one for the weight and, but in the first layer, one for the input."""
    products = [2 * a * b for a, b in pairwise(widths)]
    return sum(products), 2 * sum(products) - products[0]


@pytest.mark.parametrize(("outputs", "passes"), [("trace", 3), ("full", 3), ("sum", 1)])
def test_flops_of_the_general_way_are_those_of_its_passes_and_products(outputs, passes):
    model, inputs = mlp()
    plan = plan_ntk(model, inputs, outputs=outputs, engine="jacobian")
    forward, backward = forward_and_backward()
    size = sum(p.numel() for p in model.parameters())
    pairs = SAMPLES * (SAMPLES + 1) / 2 * (passes**2 if outputs == "full" else passes)
    assert plan.flops == SAMPLES * (forward + passes * backward) + 2 * pairs * size


def test_flops_of_the_layer_rules_are_those_of_a_forward_and_backwards_without_weight_gradients():
    model, inputs = mlp()
    plan = plan_ntk(model, inputs)
    forward, backward = forward_and_backward()
    gradients_of_weights = forward
    passes = SAMPLES * (forward + 3 * (backward - gradients_of_weights))
    assert plan.flops == passes + sum(each.flops for each in plan.contributions)


@pytest.mark.parametrize(("outputs", "passes"), [("trace", 3), ("full", 3), ("sum", 1)])
@pytest.mark.parametrize("per_layer", [False, True])
def test_flops_of_coupled_samples_are_a_backward_of_the_batch_for_every_row(outputs, passes, per_layer):
    model, inputs = mlp(norm=True)
    plan = plan_ntk(model, inputs, outputs=outputs, batch_norm="batch", per_layer=per_layer)
    forward, backward = (SAMPLES * each for each in forward_and_backward())
    rows = SAMPLES * passes
    size = sum(p.numel() for p in model.parameters())
    products = 2 * SAMPLES**2 * size * (passes**2 if outputs == "full" else passes)
    layers = 6 if per_layer else 1  # with the norms
    assert plan.flops == layers * (forward + rows * backward) + products


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("memory", [1_500_000, 2_000_000, 10**9])
def test_a_coupled_kernel_in_strips_counts_the_passes_of_every_strip(memory, precision, monkeypatch):
    widths, ran = (32, 200, 100, 3), []
    model, inputs = mlp(norm=True, widths=widths)

    def counted(sizes, limit):
        ran.extend(found := list(strips(sizes, limit)))
        return found

    strips = coupled.strips
    monkeypatch.setattr(coupled, "strips", counted)
    plan = ntk_gram(model, inputs, batch_norm="batch", max_memory=memory, precision=precision).plan
    forward, backward = (SAMPLES * each for each in forward_and_backward(widths))
    found, left = divmod(plan.flops - sum(each.flops for each in plan.contributions), forward + 3 * SAMPLES * backward)
    assert left == 0
    assert found == pytest.approx(len(ran), abs=2)
    assert (found == 1) == (memory == 10**9)


@pytest.mark.parametrize("others", [None, 7, 12])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 12])
def test_samples_passed_again_are_those_of_the_engines_blocks(rows, others):
    samples, passed = 12, []
    blocks = [range(start, min(start + rows, samples)) for start in range(0, samples, rows)]
    columns = blocks if others is None else [range(s, min(s + rows, others)) for s in range(0, others, rows)]
    for first, mine in enumerate(blocks):
        passed += mine
        for second, theirs in enumerate(columns):
            if others is not None or second > first:
                passed += theirs
    counted = samples_passed(Problem(samples, others, 1, True, 4), rows)
    assert counted == pytest.approx(len(passed), rel=0.3)
    if samples % rows == 0:
        assert counted == len(passed)


def test_the_seconds_are_those_of_reading_and_of_computing():
    model, inputs = mlp()
    plan = plan_ntk(model, inputs)
    assert 0 < plan.reading_seconds < plan.seconds
    assert "of them to read the network" in str(plan)
    again = ntk_gram(model, inputs, plan=plan).plan
    assert again.reading_seconds == 0
    assert again.seconds == pytest.approx(plan.seconds - plan.reading_seconds)
    coupled = plan_ntk(*mlp(norm=True), batch_norm="batch")
    passes = 3 * SAMPLES * coupled.general_pass.backward_seconds
    assert coupled.seconds >= coupled.reading_seconds + passes > coupled.reading_seconds


def test_projections_in_groups_are_counted_group_by_group():
    model, inputs = mlp()
    groups = plan_ntk(model, inputs, outputs="projected", projections=2, engine="jacobian")
    one = plan_ntk(model, inputs, outputs="sum", engine="jacobian")
    assert groups.flops == 2 * one.flops


def test_counting_leaves_the_network_alone(snapshot):
    model, inputs = mlp(norm=True)
    before = snapshot(model)
    plan_ntk(model, inputs, batch_norm="batch")
    plan_ntk(model, inputs, engine="jacobian")
    assert snapshot(model) == before


def test_parameters_that_nothing_depends_on_cost_nothing():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x.sum(1, keepdim=True)

    assert plan_ntk(Constant(), torch.randn(4, 2), batch_norm="batch").flops == 0
