"""Losses that are no sum over the samples only in batches that the data set's own order does not show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.utils.data import TensorDataset

from tests.callbacks.guard.certify.nets import CLASSES, Net

SAMPLES = 96


def sorted_table(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(SAMPLES, 4, generator=generator), torch.arange(CLASSES).repeat_interleave(32))


def parity(u, y):
    p = u.softmax(1)[:, 0]
    some, others = p[y == 0], p[y == 2]
    return F.cross_entropy(u, y) + ((some.mean() - others.mean()) ** 2 if len(some) and len(others) else 0.0)


def weights_of_the_batch(u, y):
    return F.cross_entropy(u, y, weight=1.0 / (1 + torch.bincount(y, minlength=CLASSES).float()))


def centred(u, y):
    targets = F.one_hot(y, CLASSES).float()
    return F.mse_loss(u, targets - targets.mean(0))


def hardest(u, y):
    return F.cross_entropy(u, y, reduction="none").topk(min(17, len(y))).values.mean()


def relabelled(u, y):
    return F.cross_entropy(u, torch.where((y == 1) & (torch.rand(len(y)) < 0.5), torch.randint_like(y, CLASSES), y))


class Pairs(_Loss):
    def forward(self, u, y):
        return parity(u, y)


STEPS = {each.__name__: each for each in (parity, weights_of_the_batch, centred, hardest, relabelled)} | {
    "a module of its own": Pairs()
}


class Own(Net):
    def __init__(self, step):
        super().__init__(step if isinstance(step, nn.Module) else None, SAMPLES + 10)
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self(batch[0]), batch[1])


@pytest.mark.parametrize("name", STEPS)
def test_sorted_samples_that_the_run_shuffles(fit, name):
    guard = fit(Own(STEPS[name]), data=sorted_table(), shuffle=True, batch=24, max_epochs=3)
    assert guard.phase == 2
    assert guard.verdict == "undecided"


def test_samples_that_belong_together_and_are_scattered(fit):
    """Three samples share a number; the loss pulls their outputs together."""

    class Views(Net):
        def training_step(self, batch, batch_idx):
            x, y, ids = batch
            u = self(x)
            alike = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
            pulled = ((u[:, None] - u) ** 2).sum(2)[alike]
            return F.cross_entropy(u, y) + 0.1 * (pulled.mean() if len(pulled) else 0.0)

    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(240, 4, generator=generator), torch.randint(0, CLASSES, (240,), generator=generator)
    ids = torch.arange(240)[torch.randperm(240, generator=generator)] % 80
    guard = fit(Views(None, 250), data=TensorDataset(x, y, ids), shuffle=True, batch=24, max_epochs=2)
    assert guard.phase == 2
    assert guard.verdict == "undecided"


HONEST = {
    "cross-entropy": F.cross_entropy,
    "class weights": lambda u, y: F.cross_entropy(u, y, weight=torch.tensor([1.0, 2.0, 3.0])),
    "focal": lambda u, y: ((1 - (p := u.softmax(1).gather(1, y[:, None])[:, 0])) ** 2 * -p.log()).mean(),
    "sum": lambda u, y: 0.01 * F.cross_entropy(u, y, reduction="sum"),
    "margin": lambda u, y: F.multilabel_soft_margin_loss(u, F.one_hot(y, CLASSES).float()),
    "absolute": lambda u, y: F.l1_loss(u, F.one_hot(y, CLASSES).float()),
}


@pytest.mark.parametrize("name", HONEST)
def test_sums_over_the_samples_are_certified(fit, name):
    guard = fit(Own(HONEST[name]), data=sorted_table(), shuffle=True, batch=20, max_epochs=3)
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])
    assert guard.phase == 2
