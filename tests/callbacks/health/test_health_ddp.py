"""Under DDP both processes find the same, and neither waits for the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceHealth, Probe


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
