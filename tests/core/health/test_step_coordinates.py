"""The sizes of the steps stand in the order of the operator's weights, and what is no size is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv import NTKOperator
from lightning_conv.health.kernel.kernel_modes import KernelModes, step_kernel
from lightning_conv.health.step.sharpness import sharpness
from lightning_conv.health.step.step_coordinates import flat_sizes

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def operator(**options):
    torch.manual_seed(0)
    return NTKOperator(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), X, **options)


def test_the_sizes_are_in_the_order_of_the_weights_and_absent_ones_are_zero():
    each = torch.arange(12.0).reshape(4, 3)
    found = flat_sizes(operator(), {"2.bias": torch.tensor(0.5), "0.weight": each})
    assert found.dtype == torch.float64
    assert found.tolist() == [*each.flatten().tolist(), *[0.0] * 4, *[0.0] * 8, 0.5, 0.5]


@pytest.mark.parametrize("function", [flat_sizes, step_kernel, lambda o, s: sharpness(o, lambda v: v, s)])
@pytest.mark.parametrize(
    ("sizes", "error", "says"),
    [
        (None, TypeError, "sizes: None; need step sizes by the name of the weight"),
        (
            {},
            ValueError,
            "sizes: nothing; none of them is a weight of the operator (0.bias, 0.weight, 2.bias and 1 more)",
        ),
        ({"w": torch.ones(())}, ValueError, "sizes: w; none of them is a weight of the operator"),
        ({"0.bias": 0.1}, TypeError, "sizes['0.bias']: 0.1 (float); need a tensor of the shape (4,), or of one number"),
        (
            {"0.bias": torch.ones(3)},
            ValueError,
            "sizes['0.bias']: shape (3,); need that of the weight, (4,), or one number",
        ),
        ({"0.bias": torch.tensor(-1.0)}, ValueError, "sizes['0.bias']: negative or not finite"),
        ({"0.bias": torch.tensor(torch.nan)}, ValueError, "sizes['0.bias']: negative or not finite"),
    ],
)
def test_what_is_no_size_is_refused_by_the_name_of_its_weight(function, sizes, error, says):
    with pytest.raises(error) as raised:
        function(operator(), sizes)
    assert str(raised.value).startswith(says)


@pytest.mark.parametrize("function", [step_kernel, lambda o, s: sharpness(o, lambda v: v, s)])
def test_an_operator_of_other_outputs_is_refused_with_what_it_has(function):
    sizes = {"0.bias": torch.tensor(0.1)}
    with pytest.raises(ValueError, match=r'operator: it has cotangents=; need outputs="full", as NTKOperator\('):
        function(operator(cotangents=torch.ones(6, 2)), sizes)
    with pytest.raises(ValueError, match="operator: it has outputs='sum'"):
        function(operator(outputs="sum"), sizes)
    with pytest.raises(TypeError, match="operator: None; need NTKOperator"):
        function(None, sizes)
    function(operator(), sizes)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"curvature": 3}, TypeError, "curvature: 3 (int) cannot be called; need a function v -> S v"),
        ({"curvature": lambda v: None}, TypeError, "curvature: returned None; need S v, of the shape of v"),
        ({"curvature": lambda v: v[:2]}, TypeError, "curvature: returned a tensor of shape (2, 2); need S v"),
        ({"decay": 3}, TypeError, "decay: 3 (int); need what weight_decay adds by the name of the weight, or None"),
        ({"decay": {"0.bias": "a"}}, TypeError, "decay['0.bias']: 'a' (str); need a finite number"),
        ({"start": "a"}, TypeError, "start: 'a' (str); need the vector of an earlier search, or None"),
        ({"start": torch.ones(3)}, ValueError, "start: 3 numbers for 26 weights; need a vector over the same ones"),
        ({"products": 0}, ValueError, "products: 0; need a whole number of at least 1"),
        ({"products": "a"}, TypeError, "products: 'a' (str); need a whole number of at least 1"),
        ({"tolerance": torch.nan}, ValueError, "tolerance: nan; need a finite number of at least 0"),
        ({"tolerance": "a"}, TypeError, "tolerance: 'a' (str); need a finite number of at least 0"),
        ({"seed": "a"}, TypeError, "seed: 'a' (str); need a whole number, such as 0"),
    ],
)
def test_a_bad_argument_of_the_sharpness_is_named(options, error, says):
    given = {"operator": operator(), "curvature": lambda v: v, "sizes": {"0.bias": torch.tensor(0.1)}}
    with pytest.raises(error) as raised:
        sharpness(**given | options)
    assert str(raised.value).startswith(says)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"product": 3}, TypeError, "product: 3 (int) cannot be called; need a function of a vector (N,)"),
        ({"start": None}, TypeError, "start: None; need the gradient of the loss in the outputs"),
        ({"products": 0}, ValueError, "products: 0; need a whole number of at least 1"),
        ({"products": "a"}, TypeError, "products: 'a' (str); need a whole number of at least 1"),
    ],
)
def test_a_bad_argument_of_modes_is_named(options, error, says):
    with pytest.raises(error) as raised:
        KernelModes.of_products(**{"product": lambda v: v, "start": torch.ones(3)} | options)
    assert str(raised.value).startswith(says)
    with pytest.raises(TypeError, match=r"kernel: None; need a matrix \(N, N\)"):
        KernelModes.of_matrix(None)
