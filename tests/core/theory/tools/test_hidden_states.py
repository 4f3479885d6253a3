"""Hidden states against the start: units that switch, states that move, in parts of the samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv.theory.tools.hidden_states import SAMPLES_AT_ONCE, activity


def named(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in network.named_parameters()}


def test_units_are_counted_over_all_parts_by_a_naive_loop():
    torch.manual_seed(0)
    now, then = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
    x = torch.randn(SAMPLES_AT_ONCE + 7, 3)
    found = activity(now, x, named(then))
    active = changed = 0
    drift = 0.0
    for row in x:
        z, z_0 = (network[0](row) for network in (now, then))
        active += sum(bool(v > 0) for v in z)
        changed += sum(bool(v >= 0) != bool(w >= 0) for v, w in zip(z, z_0, strict=True))
        drift = max(drift, float((z.clamp(min=0) - z_0.clamp(min=0)).norm()))
    assert (found.units, found.active, found.changed) == (4 * len(x), active, pytest.approx(changed))
    assert found.drift == pytest.approx(drift, rel=1e-6)
    size = float(then[0](x).clamp(min=0).norm(dim=1).max())
    inputs = float(x.norm(dim=1).max())  # of the first layer, which does not move
    assert found.drifts == [0.0, found.drift]
    assert found.sizes == pytest.approx([inputs, size], rel=1e-6)
    assert found.relative_drift == pytest.approx(drift / size, rel=1e-6)


def test_at_the_start_nothing_has_moved_and_smooth_units_are_not_counted():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    found = activity(network, x, named(network)).quantities()
    norms = network[:2](x).norm(dim=1)
    assert found.pop("hidden_norm_min") == pytest.approx(float(norms.min().detach()))
    assert found.pop("hidden_norm_max") == pytest.approx(float(norms.max().detach()))
    assert found == {"forward_drift": 0.0, "forward_drift_relative": 0.0}


def test_convolutions_and_functions_are_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3 * 16, 2)

        def forward(self, x):
            return self.head(nn.functional.leaky_relu(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    now, then, x = Net(), Net(), torch.randn(4, 1, 6, 6)
    z, z_0 = now.conv(x), then.conv(x)
    found = activity(now, x, named(then)).quantities()
    assert found["active_fraction"] == pytest.approx(float((z > 0).double().mean()))
    assert found["sign_changes"] == pytest.approx(float(((z >= 0) != (z_0 >= 0)).double().mean()))
    leaky = nn.functional.leaky_relu
    assert found["forward_drift"] == pytest.approx(
        float((leaky(z) - leaky(z_0)).flatten(1).norm(dim=1).max()), rel=1e-6
    )
