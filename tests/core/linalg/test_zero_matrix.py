"""A kernel of zeros: every number that is defined has its value, and none is NaN."""

import math
from dataclasses import fields

import pytest
import torch
from torch import nn

from lightning_conv import NTKOperator, kernel_spectrum, ntk_gram, resolved_spectrum
from lightning_conv.linalg.estimates import spectral_entropy
from lightning_conv.linalg.spectrum import Bounded
from lightning_conv.metrics import EffectiveRank, MinEigenvalue
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import expressivity_facts


def numbers(spectrum):
    """All numbers of a spectrum: its fields, the ends of its intervals, and its ratios."""
    found = [spectrum.condition_number, spectrum.stable_rank]
    if spectrum.eigenvalues is not None:
        found.append(spectrum.effective_rank)
    for each in fields(spectrum):
        value = getattr(spectrum, each.name)
        if isinstance(value, Bounded):
            found += [value.value, value.lower, value.upper]
        elif isinstance(value, torch.Tensor):
            found += value.tolist()
        elif value is not None:
            found.append(value)
    return found


def silent_network():
    """Its kernel is zero: each layer's derivative has the other layer's zero weights as a factor."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 1, bias=False))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("method", ["dense", "extremes", "auto"])
@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
def test_spectrum_of_a_network_with_a_zero_kernel(precision, method):
    spectrum = kernel_spectrum(ntk_gram(silent_network(), torch.randn(5, 4), precision=precision), method=method)
    assert not any(map(math.isnan, numbers(spectrum)))
    assert spectrum.lambda_min.lower <= 0 <= spectrum.lambda_min.upper
    assert spectrum.lambda_max.lower <= 0 <= spectrum.lambda_max.upper
    assert spectrum.stable_rank == 0
    if method != "extremes":
        assert spectrum.effective_rank == 0


@pytest.mark.parametrize("size", [1, 6, 600])
def test_spectrum_of_a_zero_matrix(size):
    spectrum = kernel_spectrum(torch.zeros(size, size, dtype=torch.float64), method="dense")
    assert not any(map(math.isnan, numbers(spectrum)))
    assert (spectrum.effective_rank, spectrum.stable_rank, spectrum.lambda_min.value) == (0, 0, 0)


def test_resolved_spectrum_and_operator_of_a_zero_kernel():
    model, inputs = silent_network(), torch.randn(5, 4)
    smallest = resolved_spectrum(model, inputs)[1].lambda_min
    assert smallest.lower <= 0 <= smallest.upper
    operator = NTKOperator(model, inputs, outputs="sum")
    for found in (operator.trace(), operator.frobenius_norm(), operator.lambda_max(), operator.effective_rank()):
        assert (found.value, found.standard_error) == (0, 0)


def test_metrics_of_a_zero_kernel():
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    assert float(EffectiveRank()(matrix)) == 0
    assert float(MinEigenvalue()(matrix)) == 0


def test_facts_of_features_that_are_all_zero():
    facts = expressivity_facts(torch.zeros(4, 3, dtype=torch.float64), bias=False)
    assert (facts.stable_rank, facts.effective_rank) == (0, 0)


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1.0, 1e300])
def test_entropy_does_not_depend_on_the_scale(scale):
    weights = torch.full((16,), scale, dtype=torch.float64)
    assert float(spectral_entropy(weights).exp()) == pytest.approx(16, rel=1e-12)
