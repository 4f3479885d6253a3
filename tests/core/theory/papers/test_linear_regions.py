"""Linear regions: exact counts against brute force on a fine grid, the bound attained and never exceeded."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_conv.theory.papers.linear_regions import linear_regions, most_regions, typical_regions


def network(widths, outputs=1, bias=True):
    sizes, layers = [1, *widths], []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, bias=bias, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs, dtype=torch.float64))


def patterns_on_a_grid(net, grid):
    """Number of different consecutive activation patterns along a grid."""
    signs, z = [], grid[:, None]
    for layer in net[:-1]:
        z = layer(z)
        if isinstance(layer, nn.Linear):
            signs.append(z > 0)
    pattern = torch.cat(signs, 1)
    return int((pattern[1:] != pattern[:-1]).any(1).sum()) + 1


@pytest.mark.parametrize("widths", [(6,), (5, 4), (4, 4, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_counts_agree_with_a_fine_grid(widths, seed):
    torch.manual_seed(seed)
    net = network(widths)
    found = linear_regions(net)
    knots = found.activation
    # Points between neighbouring knots, and beyond: a grid as fine as it must be, and dense points on top.
    span = max(abs(knots[0]), abs(knots[-1])) + 1
    dense = torch.linspace(-span, span, 20_001, dtype=torch.float64)
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(knots)], dtype=torch.float64)
    grid = torch.cat([dense, middles]).sort().values
    assert patterns_on_a_grid(net, grid) == found.activation_regions
    assert found.pieces <= found.activation_regions <= most_regions(widths)
    assert found.criterion.verdict == "consistent"


@pytest.mark.parametrize("seed", range(3))
def test_f_is_straight_between_its_kinks_and_bent_at_each(seed):
    torch.manual_seed(seed)
    net = network((6, 5))
    kinks = torch.tensor(linear_regions(net).kinks, dtype=torch.float64)
    ends = torch.cat([kinks[:1] - 1, kinks, kinks[-1:] + 1])
    f = net(ends[:, None])[:, 0]
    slopes = (f[1:] - f[:-1]) / (ends[1:] - ends[:-1])
    for share in (0.1, 0.5, 0.9):
        inside = ends[:-1] + share * (ends[1:] - ends[:-1])
        assert torch.allclose(net(inside[:, None])[:, 0], f[:-1] + share * (f[1:] - f[:-1]), atol=1e-11)
    assert bool(((slopes[1:] - slopes[:-1]).abs() > 1e-9).all())


def test_floating_point_finds_the_same_kinks():
    for seed in range(4):
        torch.manual_seed(seed)
        net = network((7, 7))
        exact, rounded = linear_regions(net), linear_regions(net, arithmetic="float64")
        assert rounded.kinks == pytest.approx(exact.kinks, rel=1e-9, abs=1e-12)
        assert rounded.activation_regions == exact.activation_regions


def fold(depth):
    """x -> |2x - 1|, repeated: 2^depth pieces of width 2."""
    net = network((2,) * depth)
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for k, layer in enumerate(linear[:-1]):
            layer.weight.copy_(torch.tensor([[2.0], [-2.0]]).expand(2, 1 if k == 0 else 2))
            layer.bias.copy_(torch.tensor([-1.0, 1.0]))
        linear[-1].weight.fill_(1.0)
        linear[-1].bias.zero_()
    return net


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_folding_network_doubles_its_pieces_with_each_layer(depth):
    found = linear_regions(fold(depth))
    assert found.pieces == 2**depth
    assert found.kinks == tuple(k / 2**depth for k in range(1, 2**depth))  # dyadic, hence exact
    assert found.within(0, 0.5) == 2 ** (depth - 1)


def test_one_layer_attains_the_bound():
    assert linear_regions(network((9,))).pieces == most_regions((9,)) == 10


def test_units_that_switch_together_count_once():
    net = network((3,), bias=False)
    found = linear_regions(net)
    assert found.activation == (0.0,)
    assert found.pieces <= 2
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0], [0.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, -1.0, 5.0]]))  # relu(x) - relu(-x) = x: no kink
    found = linear_regions(net)
    assert (found.kinks, found.activation) == ((), (0.0,))


def test_exact_arithmetic_tells_points_apart_that_rounding_merges():
    """Kinks at 1/3 and at the reciprocal of 3's neighbour."""
    net = network((2,))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0], [math.nextafter(3.0, 4.0)]], dtype=torch.float64))
        net[0].bias.copy_(torch.tensor([-1.0, -1.0]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
    assert linear_regions(net).pieces == 3


def test_a_kink_of_any_output_counts():
    net = network((2,), outputs=2)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, -1.0]))
        net[2].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert linear_regions(net).kinks == (0.0, 1.0)


def test_typical_and_most():
    assert (most_regions((4, 2)), typical_regions((4, 2))) == (15, 7)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), "model: 2 inputs"),
        (nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)), "model: Linear, Tanh, Linear"),
        (nn.Sequential(nn.Linear(1, 3), nn.ReLU()), "need an nn.Sequential"),
        (nn.Linear(1, 1), "need an nn.Sequential"),
    ],
)
def test_other_networks_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        linear_regions(model)


def test_weights_that_are_not_finite_are_refused():
    net = network((2,))
    net[0].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        linear_regions(net)
