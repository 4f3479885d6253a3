"""Under DDP both processes find the same, and neither waits for the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceHealth, KernelStability, Probe


class Own(torch.optim.SGD):
    """An optimizer of one's own, whose step no copy may take."""


def two_processes(make_trainer, make_regression):
    health = ConvergenceHealth(Probe(16), every_n_steps=2)
    torch.manual_seed(0)
    x = torch.randn(32, 5)
    module = make_regression(nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)), lr=0.05)
    trainer = make_trainer([health], max_epochs=3)
    trainer.fit(module, DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8))
    return [health._record.scalars, [each.sentence for each in health.findings if each.name != "not_finite"]]


def test_both_processes_find_the_same(run_on_two_processes):
    (scalars, sentences), (others, other_sentences) = run_on_two_processes(two_processes)
    assert "health/critical_ratio" in scalars
    assert scalars == pytest.approx(others)
    assert sentences == other_sentences
    assert any("in the training set" in each for each in sentences)


def budgeted(make_trainer, make_regression):
    """Within the budget both processes have to decide alike; the trunk is frozen, and the optimizer is not torch's."""
    probe = Probe(16)
    health = ConvergenceHealth(probe, max_overhead=1.0)
    torch.manual_seed(0)
    x = torch.randn(32, 5)
    net = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    module = make_regression(net, lr=0.05)
    module.configure_optimizers = lambda: Own([each for each in module.parameters() if each.requires_grad], lr=0.05)
    trainer = make_trainer([KernelStability(probe, max_overhead=1.0), health], max_epochs=20)
    trainer.fit(module, DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8))
    found = {each.name: each.sentence for each in health.findings if each.name != "not_finite"}
    return [health._record.scalars, found, trainer.callback_metrics["health/critical_ratio"].item()]


def test_both_processes_watch_the_same_steps(run_on_two_processes):
    (scalars, found, ratio), (others, other_found, other_ratio) = run_on_two_processes(budgeted)
    assert "health/linearisation_error" in scalars
    assert scalars == pytest.approx(others, nan_ok=True)
    assert found == other_found
    assert {"frozen_trunk", "stability"} <= found.keys()
    assert ratio == pytest.approx(other_ratio)
