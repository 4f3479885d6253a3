"""The kernel layer by layer: against kernels of the layers alone, and the bound that they give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv import Bounded, kernel_spectrum, ntk_gram
from lightning_conv.kernels.layers import lambda_min_from_layers, layer_spectra, layer_table, trace_shares


def network(seed=0, outputs=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 30), nn.Softplus(10), nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, outputs))


@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
def test_every_layers_interval_holds_the_eigenvalue_of_its_own_jacobian(outputs, precision, naive_gram):
    model, inputs = network(outputs=2), torch.randn(9, 6)
    spectra = layer_spectra(ntk_gram(model, inputs, outputs=outputs, precision=precision, per_layer=True))
    assert set(spectra) == {"0", "2", "4"}
    for name, spectrum in spectra.items():
        model.requires_grad_(False)
        model.get_submodule(name).requires_grad_(True)
        exact = torch.linalg.eigvalsh(naive_gram(model, inputs, outputs))
        assert spectrum.lambda_min.lower <= float(exact[0]) + 1e-12
        assert float(exact[0]) <= spectrum.lambda_min.upper
        assert spectrum.lambda_max.lower <= float(exact[-1]) <= spectrum.lambda_max.upper


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), samples=st.integers(2, 12))
def test_the_layers_bound_lambda_min_of_the_sum_from_below(seed, samples):
    model = network(seed).double()
    inputs = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = ntk_gram(model, inputs, precision="certified", per_layer=True)
    spectra = layer_spectra(gram)
    bound = lambda_min_from_layers(spectra)
    assert 0 <= bound <= kernel_spectrum(gram).lambda_min.upper
    assert bound >= max(each.lambda_min.lower for each in spectra.values()) * (1 - 1e-12)


def test_the_bound_by_layers_is_attained_by_layers_that_share_their_eigenvectors():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x)

    inputs = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    spectra = layer_spectra(ntk_gram(Twice(), inputs, precision="certified", per_layer=True))
    assert lambda_min_from_layers(spectra) == pytest.approx(2.0, rel=1e-9)
    assert {name: each.lambda_min.value for name, each in spectra.items()} == pytest.approx({"a": 1.0, "b": 1.0})


def test_shares_are_those_of_the_squared_jacobian(naive_jacobian):
    model, inputs = network(outputs=3), torch.randn(5, 6)
    shares = trace_shares(ntk_gram(model, inputs))
    whole = float(naive_jacobian(model, inputs).square().sum())
    assert sum(shares.values()) == pytest.approx(1.0)
    for name, share in shares.items():
        model.requires_grad_(False)
        model.get_submodule(name).requires_grad_(True)
        assert share == pytest.approx(float(naive_jacobian(model, inputs).square().sum()) / whole, rel=1e-5)


def test_a_kernel_without_its_layers_is_refused_with_a_hint():
    with pytest.raises(ValueError, match="per_layer=True"):
        layer_spectra(ntk_gram(network(), torch.randn(4, 6)))


def test_a_layer_without_a_share_is_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1, bias=False))
    nn.init.zeros_(model[1].weight)  # no gradient reaches the first layer
    spectra = layer_spectra(ntk_gram(model, torch.randn(3, 3), per_layer=True))
    assert set(spectra) == {"1"}


def test_the_table_names_every_layer_and_marks_the_best():
    smallest = {"0": Bounded(1e-3, 9e-4, 1.1e-3, True, "given"), "2": Bounded(2e-3, 1.9e-3, 2.1e-3, True, "given")}
    table = layer_table({"0": 0.25, "2": 0.5, "": 0.25}, smallest)
    assert table.splitlines() == [
        "| layer | share of the trace | lambda_min | bounds |",
        "|---|---|---|---|",
        "| 0 | 2.500e-01 | 1.000e-03 | 9.000e-04 to 1.100e-03 |",
        "| **2** | 5.000e-01 | 2.000e-03 | 1.900e-03 to 2.100e-03 |",
        "| (the model) | 2.500e-01 | 0.000e+00 | 0.000e+00 to 0.000e+00 |",
    ]
    assert layer_table({"0": 1.0}, {}).splitlines()[-1] == "| 0 | 1.000e+00 |"
