"""Some of the parameters bound lambda_min of the whole kernel from below, on their own samples and on no larger set."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import pytest
import torch
from torch import nn

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.health.kernel.subset_bound import subset_bound
from lightning_conv.linalg.eigenvalues.bounded import Bounded

PARTS = [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2)).double()


def kernel_of(model, x, parameters=None, **options):
    return ntk_gram(model, x, outputs="full", parameters=parameters, precision="certified", **options)


def smallest(gram):
    return kernel_spectrum(gram).lambda_min


def exact_smallest(model, x):
    """The smallest eigenvalue of J J^T by 40 digits, from a Jacobian of its own."""
    names = list(dict(model.named_parameters()))
    values = [each.detach() for each in model.parameters()]

    def outputs(*weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)).flatten()

    jacobian = torch.autograd.functional.jacobian(outputs, tuple(values))
    flat = torch.cat([each.reshape(len(each), -1) for each in jacobian], 1).tolist()
    with mpmath.workdps(40):
        matrix = mpmath.matrix(flat)
        return float(min(mpmath.eigsy(matrix * matrix.T, eigvals_only=True)))


@pytest.mark.parametrize("chosen", [[2], [1], [0, 2], [0, 1, 2]])
def test_the_sum_over_subsets_is_below_the_exact_value(chosen):
    for seed in range(3):
        model = network(seed)
        x = torch.randn(5, 6, dtype=torch.float64)
        kernels = [kernel_of(model, x, PARTS[each]) for each in chosen]
        bounds = [smallest(each) for each in kernels]
        found = subset_bound(kernels, bounds)
        assert found.probe.certified
        assert 0 < found.probe.lower <= exact_smallest(model, x)
        assert found.probe.lower == pytest.approx(sum(each.lower for each in bounds), rel=1e-14)
        assert len(found.parameters) == 2 * len(chosen)
        assert found.probe.upper == math.inf


def test_the_probe_says_nothing_of_the_training_set_from_below():
    model = network()
    x = torch.randn(8, 6, dtype=torch.float64)
    everything = torch.cat([x, x[:1] + 1e-3])  # one sample more, close to another
    kernel = kernel_of(model, x, PARTS[2])
    found = subset_bound([kernel], [smallest(kernel)], whole=smallest(kernel_of(model, x)))
    whole = exact_smallest(model, everything)
    assert found.probe.lower > whole  # taken for the whole set it would be false
    assert found.training_set.lower == 0
    assert whole <= found.training_set.upper
    assert math.isnan(found.training_set.value)
    assert found.training_set.certified
    assert "from above only" in found.training_set.reason


def test_the_kernel_on_all_training_samples_bounds_it():
    model, x = network(), torch.randn(6, 6, dtype=torch.float64)
    kernel = kernel_of(model, x, PARTS[2])
    found = subset_bound([kernel], [smallest(kernel)], on_training_set=True)
    assert found.training_set == found.probe
    assert found.on_training_set


def test_without_an_upper_end_nothing_is_certified_of_the_training_set():
    model, x = network(), torch.randn(6, 6, dtype=torch.float64)
    kernel = kernel_of(model, x, PARTS[2])
    found = subset_bound([kernel], [smallest(kernel)])
    assert not found.training_set.certified
    assert found.training_set.upper == math.inf
    estimate = replace(smallest(kernel_of(model, x)), certified=False)
    assert subset_bound([kernel], [smallest(kernel)], whole=estimate).probe.upper == math.inf


def test_what_is_not_certified_stays_so():
    model, x = network(), torch.randn(6, 6, dtype=torch.float64)
    kernels = [kernel_of(model, x, each) for each in PARTS[1:]]
    bounds = [smallest(each) for each in kernels]
    assert not subset_bound(kernels, [bounds[0], replace(bounds[1], certified=False)]).probe.certified
    nothing = Bounded(-1e-9, -1e-8, 1e-8, True, "rounding")
    found = subset_bound(kernels[:1], [nothing])
    assert found.probe.lower == 0
    assert not found.probe.certified


def test_what_is_no_sum_is_refused():
    model, x = network(), torch.randn(6, 6, dtype=torch.float64)
    kernel = kernel_of(model, x, PARTS[2])
    bound = smallest(kernel)
    other = kernel_of(model, x[:4], PARTS[1])
    for kernels, bounds, why in (
        ([], [], "at least one"),
        ([kernel], [], "each with its bound"),
        ([kernel, kernel], [bound, bound], "more than one"),
        ([kernel, other], [bound, smallest(other)], "n_samples"),
        ([ntk_gram(model, x, outputs="projected")], [bound], "projections"),
        ([ntk_gram(model, x, x)], [bound], "two sets"),
        (
            [
                ntk_gram(model, x, cotangents=torch.ones(6, 2, dtype=torch.float64), parameters=PARTS[each])
                for each in (1, 2)
            ],
            [bound, bound],
            "contracted",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            subset_bound(kernels, bounds)
    with pytest.raises(ValueError, match="another kernel"):
        subset_bound([kernel], [bound], whole=Bounded(0.0, 0.0, bound.lower / 2, True, "of something else"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"whole": 3.0}, "whole: 3.0 (float); need lambda_min with its bounds"),
        ({"on_training_set": 1}, "on_training_set: 1 (int); need True or False"),
        ({"smallest": [3.0]}, "smallest: 3.0 (float); need lambda_min with its bounds"),
        ({"kernels": [torch.eye(3)]}, "kernels: a tensor of shape (3, 3); need what ntk_gram returns"),
        ({"kernels": None}, "kernels: None; need a list of KernelGram"),
    ],
)
def test_a_bound_of_other_things_than_kernels_is_refused_by_name(change, says):
    model, x = network(), torch.randn(6, 6, dtype=torch.float64)
    kernel = kernel_of(model, x, PARTS[2])
    with pytest.raises(TypeError) as raised:
        subset_bound(**{"kernels": [kernel], "smallest": [smallest(kernel)], **change})
    assert str(raised.value).startswith(says)
