"""What a run begins with: its inputs, the signal, the weights that never move, the sign of its loss."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceHealth, Probe

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3


class Net(pl.LightningModule):
    """Two layers; ``first`` has a group of its own whose rate may be set at a step."""

    def __init__(self, *, rate=0.1, thaw_at=None, loss=F.cross_entropy):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.rate, self.thaw_at, self.loss = rate, thaw_at, loss

    def forward(self, x):
        return self.head(torch.relu(self.first(x)))

    def training_step(self, batch, batch_idx):
        if self.global_step == self.thaw_at:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.1
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        groups = [{"params": self.first.parameters(), "lr": self.rate}, {"params": self.head.parameters()}]
        return torch.optim.SGD(groups, lr=0.1)


@pytest.fixture
def judged(make_trainer):
    def run(module, x=X, y=Y, steps=24):
        health = ConvergenceHealth(Probe(32), every_n_steps=4)
        trainer = make_trainer([health], max_epochs=steps)
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32))
        return {each.name: each for each in health.findings}

    return run


def test_units_are_not_accused_where_all_inputs_are_equal(judged):
    found = judged(Net(), X[:1].repeat(32, 1))
    assert found["inputs"].level == "alert"
    assert "units" not in found


def test_a_group_with_the_rate_0_is_named_until_it_moves(judged):
    frozen = judged(Net(rate=0.0))["movement"]
    assert frozen.level == "warning"
    assert frozen.sentence == "The weights of first have not moved from step 0 to step 24: it has the rate 0."
    assert judged(Net(rate=0.0, thaw_at=16))["movement"].level == "ok"
    assert judged(Net())["movement"].level == "ok"


def test_weights_that_require_no_gradients_are_not_looked_at(judged):
    module = Net()
    module.first.requires_grad_(False)
    found = judged(module)["movement"]
    assert (found.level, found.sentence) == ("ok", "The only trained layer moved from step 0 to step 24.")


def test_a_wrong_sign_is_named_and_no_ratio_is_given_for_it(judged):
    found = judged(Net(loss=lambda u, y: -F.cross_entropy(u, y)))
    assert found["descent"].severity >= 2
    assert "stability" not in found
    assert "descent" not in judged(Net(loss=lambda u, y: F.cross_entropy(u, y) - 5.0))  # below zero, but convex
