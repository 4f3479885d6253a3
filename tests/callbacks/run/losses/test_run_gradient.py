"""The gradient of the run's own step is compared with J^T s, whatever was in ``p.grad`` before."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_conv.callbacks import KernelStability, Probe
from lightning_conv.callbacks.run.losses.run_gradient import _depend_on_each_other


class Module(pl.LightningModule):
    """A linear network with a squared loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class NeverClears(Module):
    """Starts with gradients, which its own hook keeps."""

    def on_train_start(self):
        for each in self.parameters():
            each.grad = torch.ones_like(each)

    def optimizer_zero_grad(self, *args):
        pass


class LeftOver(Module):
    """Starts with gradients, which Lightning clears."""

    on_train_start = NeverClears.on_train_start


class Decays(Module):
    """Adds a term to the gradients after the backward pass."""

    def on_after_backward(self):
        for each in self.parameters():
            each.grad += 0.1 * each.detach()


class DecaysWithoutClearing(NeverClears):
    on_after_backward = Decays.on_after_backward


@pytest.mark.parametrize(
    ("kind", "unknown"),
    [(Module, False), (LeftOver, False), (NeverClears, False), (Decays, True), (DecaysWithoutClearing, True)],
)
def test_what_was_in_the_gradients_before_does_not_count_and_what_is_added_does(make_trainer, kind, unknown):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 4, generator=generator), torch.randn(16, 3, generator=generator)
    monitor = KernelStability(Probe(16), every_n_steps=1)
    data = DataLoader(list(zip(x, y, strict=True)), batch_size=8)
    make_trainer([monitor], max_epochs=1).fit(kind(), data)
    assert ("is not that of the observed loss" in monitor.measured) == unknown
    assert ("MSELoss" in monitor.measured) != unknown


def test_outputs_that_are_made_of_one_another_are_told_from_those_that_are_not():
    w = torch.randn(3, requires_grad=True)
    first, second = 2 * w, w.square()
    assert not _depend_on_each_other([first, second])
    assert not _depend_on_each_other([first])
    assert _depend_on_each_other([first, first.sin()])
    assert _depend_on_each_other([second.exp(), first, second])
