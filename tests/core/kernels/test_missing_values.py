"""Samples with NaN are measured where the network knows them, as missing values; they are refused where its outputs are NaN, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from lightning_conv.health.labels.label_audit import label_audit
from lightning_conv.health.layers.activity import unit_activity
from lightning_conv.kernels import NTKOperator
from lightning_conv.kernels.gram import ntk_gram

LABELS = torch.arange(12) % 2


class Imputing(nn.Module):
    """Takes NaN for a missing value, and tells the network where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x):
        missing = torch.isnan(x)
        return self.net(torch.cat([torch.nan_to_num(x), missing.to(x.dtype)], 1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Imputing().double()


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    x[torch.rand(12, 3, generator=generator) < 0.3] = torch.nan
    assert torch.isnan(x).any()
    return x


@pytest.fixture
def jacobian(network, samples):
    """The Jacobian, (n C, P), by torch alone."""
    weights = {name: each.detach() for name, each in network.named_parameters()}
    parts = jacrev(lambda given: functional_call(network, given, (samples,)))(weights)
    return torch.cat([each.flatten(2) for each in parts.values()], 2).flatten(0, 1)


def test_the_kernel_is_that_of_the_gradients(network, samples, jacobian):
    gram = ntk_gram(network, samples, outputs="full", precision="certified")
    torch.testing.assert_close(gram.matrix.flatten(), (jacobian @ jacobian.T).flatten(), rtol=1e-10, atol=1e-12)


def test_the_operator_takes_them(network, samples, jacobian):
    vector = torch.randn(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = NTKOperator(network, samples) @ vector
    torch.testing.assert_close(found.flatten(), jacobian @ (jacobian.T @ vector), rtol=1e-9, atol=1e-11)


def test_health_takes_them(network, samples):
    assert [each.name for each in unit_activity(network, samples)] == ["net.1"]
    assert len(label_audit(network, samples, LABELS).top(2)) == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda net, x: ntk_gram(net, x),
        lambda net, x: NTKOperator(net, x),
        lambda net, x: unit_activity(net, x),
        lambda net, x: label_audit(net, x, LABELS),
    ],
    ids=["kernel", "operator", "units", "labels"],
)
def test_they_are_refused_where_the_outputs_are_not_finite(network, samples, use):
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    with pytest.raises(ValueError, match=r"inputs: tensor 0 of shape \(12, 3\) contains NaN or infinity; clean the"):
        use(plain, samples)
    samples[0, 0] = torch.inf  # which ``nan_to_num`` makes the largest number
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        use(plain, samples)
