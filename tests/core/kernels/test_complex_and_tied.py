"""Complex parameters count with real and imaginary parts; tied weights are found by each of their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv import NTKOperator, ntk_gram


class Spectral(nn.Module):
    """A complex matrix used directly, then real layers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head((x.to(self.w.dtype) @ self.w).abs().square())


class ComplexLinear(nn.Module):
    """A layer of torch with complex weights, twice, and a complex bias."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(6, 1)

    def forward(self, x):
        z = self.layer(x.to(self.layer.weight.dtype))
        return self.head(torch.cat([z.real, z.imag.tanh()], 1))


class OnlyComplex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 2, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(self.w.dtype) @ self.w).imag


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def by_autograd(model, x):
    """The trace kernel from one gradient per output; a complex gradient has two real numbers."""
    rows = []
    for i in range(len(x)):
        u = model(x[i : i + 1])[0]
        for each in u:
            gradients = torch.autograd.grad(each, list(model.parameters()), retain_graph=True)
            rows.append(
                torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in gradients])
            )
    jacobian = torch.stack(rows).double()
    full = (jacobian @ jacobian.T).unflatten(0, (len(x), -1)).unflatten(2, (len(x), -1))
    return full.diagonal(dim1=1, dim2=3).sum(2)


@pytest.mark.parametrize("make", [Spectral, ComplexLinear, OnlyComplex])
@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_the_kernel_counts_both_parts(make, precision, engine):
    torch.manual_seed(0)
    model = make()
    x = torch.randn(5, 4, dtype=torch.float64 if make is OnlyComplex else torch.float32)
    found, expected = ntk_gram(model, x, precision=precision, engine=engine), by_autograd(model, x)
    assert float((found.matrix - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("make", [Spectral, ComplexLinear])
def test_the_operator_has_two_numbers_per_complex_one(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 4)
    operator = NTKOperator(model, x, outputs="trace")
    assert operator.n_parameters == sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())
    expected = by_autograd(model, x)
    assert float((operator.dense() - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("pattern", ["first.*", "second.*", "second.weight", ["first.weight", "second.weight"]])
def test_a_tied_weight_is_found_by_each_of_its_names(pattern):
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(5, 4)
    alone = ntk_gram(model, x, parameters="first.weight")
    assert torch.equal(ntk_gram(model, x, parameters=pattern).matrix, alone.matrix)
    assert alone.parameters == ("first.weight",)
