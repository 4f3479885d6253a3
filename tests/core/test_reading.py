"""What is found in a network on a handful of samples, and how exact its Jacobian is said to be."""

import copy

import pytest
import torch
from torch import nn

from lightning_conv import ntk_gram, plan_ntk
from lightning_conv.evaluation import StatelessModule, undisturbed
from lightning_conv.kernels import discovery


class Tied(nn.Module):
    """A convolution, a layer that is called twice, and a layer at every position."""

    def __init__(self):
        super().__init__()
        self.convolution, self.twice = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.convolution(x)).flatten(2).mT
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))).mean(1))


@pytest.fixture(name="network")
def network_fixture():
    return Tied(), torch.randn(6, 2, 5, 5)


def true_error(model, inputs, samples):
    """|v^T J_32 - v^T J_64| / |v^T J_64| for the combination of outputs that reading takes."""
    mixture = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))[:samples]
    found = []
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        (twin(inputs[:samples].to(dtype)) * mixture.to(dtype)).sum().backward()
        found.append(torch.cat([p.grad.flatten().double() for p in twin.parameters()]))
    return float((found[0] - found[1]).norm() / found[1].norm())


@pytest.mark.parametrize("large", [False, True])
def test_the_error_of_the_jacobian_is_measured(network, large, monkeypatch):
    model, inputs = network
    if large:
        monkeypatch.setattr(discovery, "LARGE", 0)
    said = ntk_gram(model, inputs, precision="fast").jacobian_error
    true = true_error(model, inputs, samples=1 if large else 3)
    assert true > 2.0**-24, "the rounding of this test is not there"
    # Four times what was measured; where layers are compared by their factors, what is measured is a bound.
    assert 3.9 * true <= said <= 8 * true


def test_a_large_network_is_read_on_one_sample_and_found_the_same(network, monkeypatch):
    model, inputs = network
    before = plan_ntk(model, inputs, precision="fast").reading
    monkeypatch.setattr(discovery, "LARGE", 0)
    after = plan_ntk(model, inputs, precision="fast").reading
    assert (after.sites, after.general, after.signature) == (before.sites, before.general, before.signature)


def test_samples_that_couple_are_all_read_however_large_they_are(monkeypatch):
    monkeypatch.setattr(discovery, "LARGE", 0)
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 4)
    # One sample normalised by itself has no gradient, and no rounding error either.
    gram = ntk_gram(model, inputs, batch_norm="batch")
    assert gram.jacobian_error > 4 * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_in_another_precision_has_the_frozen_statistics_of_the_first(dtype):
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 4)
    with undisturbed(model):
        module = StatelessModule(model, batch_norm="frozen", statistics_of=inputs)
        twin = module.twin(dtype)
        outputs = twin.outputs({}, twin.convert(inputs))
        assert outputs.dtype == dtype
        hidden = model[0](inputs)
        plain = model[3](torch.tanh((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + model[1].eps).sqrt()))
    assert torch.allclose(outputs, plain.to(dtype), rtol=1e-5, atol=1e-6)
    assert torch.equal(twin.buffers["1.running_mean"], module.buffers["1.running_mean"].to(dtype))
    twin.buffers["1.running_mean"].add_(1)
    assert not torch.equal(twin.buffers["1.running_mean"], module.buffers["1.running_mean"].to(dtype))


class Antisymmetric(nn.Module):
    """Two equal halves whose outputs cancel: zero up to rounding, as starts of "lazy training" are."""

    def __init__(self, share=0.0):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(7, 301), nn.Tanh(), nn.Linear(301, 1))
        self.other, self.share = copy.deepcopy(self.one), share

    def forward(self, x):
        return self.one(x) - self.other(x.flip(0)).flip(0) + self.share * x.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_cancel_are_not_taken_for_coupled_samples(dtype, naive_gram):
    model, inputs = Antisymmetric().to(dtype), torch.randn(20, 7, dtype=dtype)
    gram = ntk_gram(model, inputs, precision="certified")
    naive = naive_gram(model, inputs, "trace")
    assert float((gram.matrix - naive).norm()) <= 1e-9 * float(naive.norm())
    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(Antisymmetric(0.05).to(dtype), inputs)
