"""A run trains a paper's network where it trains that network, exactly, and nothing beside it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_conv.callbacks.criteria.networks import Found, find_network
from lightning_conv.callbacks.criteria.papers.allen_zhu.states import find_setting
from lightning_conv.callbacks.criteria.papers.du.kernel import papers_network
from lightning_conv.callbacks.criteria.papers.frei import FreiTracker
from lightning_conv.losses.kind import loss_kind
from lightning_conv.theory.networks import AllenZhuNet, DuFC, DuResNet, DuTwoLayer, LeakyTwoLayer
from lightning_conv.theory.papers.allen_zhu import unit_inputs

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Scaled(nn.Module):
    """Its child at the start, whatever the child's weights are, and another function after one step."""

    def __init__(self, net: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.net(x)


class Doubled(LeakyTwoLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def leaky(kind=LeakyTwoLayer):
    return kind(4, 8).double()


def trained(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def test_a_network_is_found_in_what_hands_its_inputs_to_it():
    alone, inside = leaky(), Scaled(leaky())
    inside.scale.requires_grad_(False)
    for network, place in ((alone, ""), (inside, "net")):
        found = find_network(network, INPUTS, LeakyTwoLayer, trained(network))
        assert isinstance(found, Found)
        assert found.place == place
        assert found.trained == {"hidden.weight"}


def test_with_a_trained_parameter_beside_it_the_run_trains_another_network():
    network = Scaled(leaky())
    found = find_network(network, INPUTS, LeakyTwoLayer, trained(network))
    assert found == "the theorem is about LeakyTwoLayer, and the run trains another network (scale is trained too)"
    targets = torch.tensor([1.0, -1, 1, -1, 1, -1])
    frei, measurement = FreiTracker(), SimpleNamespace(parameters=trained(network))
    run = SimpleNamespace(
        network=network, inputs=INPUTS, targets=targets, loss=loss_kind(nn.SoftMarginLoss()), measurement=measurement
    )
    frei.begin(run)
    assert "scale is trained too" in str(frei.slope)
    run.targets = None
    assert "numerical_rank" not in frei.measure(run, None, None)
    rows = unit_inputs(INPUTS)
    deep = Scaled(AllenZhuNet(5, 8, 2, 1))
    assert "scale is trained too" in find_setting(deep, rows, trained(deep))
    unit = INPUTS / INPUTS.norm(dim=1, keepdim=True)
    for own in (DuFC(4, width=8, depth=2), DuResNet(4, 8, 2), DuTwoLayer(4, width=8)):
        assert papers_network(own, unit, trained(own)) == ""
        assert papers_network(Scaled(own), unit, trained(Scaled(own))) is None


def test_a_fixed_factor_makes_another_network_too():
    network = Scaled(leaky(), scale=2.0)
    network.scale.requires_grad_(False)
    assert "is not its child 'net' alone" in find_network(network, INPUTS, LeakyTwoLayer, trained(network))


@pytest.mark.parametrize("wrap", [lambda own: own, nn.Sequential])
def test_a_subclass_may_compute_something_else(wrap):
    network = wrap(leaky(Doubled))
    found = find_network(network, INPUTS, LeakyTwoLayer, trained(network))
    assert "trains another network (Doubled, a subclass" in found


def test_two_of_them_are_another_network_and_several_kinds_are_named():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = leaky(), leaky()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    both = Both()
    assert "another network" in find_network(both, INPUTS, LeakyTwoLayer, trained(both))
    assert "about DuFC or DuTwoLayer, " in find_network(both, INPUTS, (DuFC, DuTwoLayer), trained(both))
    assert "another network" in find_network(leaky(), INPUTS.long(), LeakyTwoLayer, ["hidden.weight"])
