"""What the network of the recipe `wide_fc` is."""

import pytest
import torch
from torch import nn

from lightning_conv.networks.wide_layer import wide_layer_width
from lightning_conv.recipes import wide_fc


@pytest.mark.parametrize(("n", "factor", "width"), [(1437, 1.1, 1581), (10, 1.1, 11), (100, 1.1, 110), (7, 0.5, 4)])
def test_the_wide_layer_has_the_width_factor_times_n_rounded_up(n, factor, width):
    assert wide_layer_width(n, factor) == width


def test_the_network_is_a_narrow_softplus_trunk_and_one_linear_head():
    network = wide_fc(64, 10, width=200, hidden=[128, 96])
    assert [name for name, _ in network.named_children()] == ["trunk", "head"]
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert [module.out_features for module in linear] == [128, 96, 200, 10]
    assert network.head is linear[-1]
    assert all(isinstance(module, nn.Linear | nn.Softplus | nn.Flatten) for module in [*network.trunk, network.head])


def test_the_softplus_is_the_analytic_formula_in_float64():
    activation = wide_fc(1, 1, width=1).trunk[2]
    z = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert torch.allclose(activation(z), torch.logaddexp(100 * z, torch.zeros(())) / 100, rtol=1e-15, atol=0)


@pytest.mark.parametrize("argument", ["in_features", "num_classes", "width", "beta"])
def test_sizes_that_are_not_positive_are_refused_by_name(argument):
    sizes = {"in_features": 4, "num_classes": 2, "width": 8, "beta": 100.0}
    with pytest.raises(ValueError, match=f"{argument}: 0; need "):
        wide_fc(**{**sizes, argument: 0})
