"""The pages have every scalar and every paper of ConvergenceCriteria."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria, RegularizedGradientClipping
from lightning_conv.callbacks.criteria import registered_criteria
from lightning_conv.theory.networks import AllenZhuNet, BiasedTwoLayer, DuFC, LeakyTwoLayer
from lightning_conv.theory.papers.allen_zhu import unit_inputs

DOCS = Path(__file__).parents[3] / "docs"
TAGS = (DOCS / "tags.md").read_text(encoding="utf-8")
PAPERS = (DOCS / "criteria_by_paper.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "network",
    [
        AllenZhuNet(6, 20, 2, 1),
        BiasedTwoLayer(6, 20, 0.5),
        LeakyTwoLayer(6, 20),
        DuFC(6, 20, 1),
        nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 1)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_every_scalar_is_on_the_page(make_trainer, make_regression, recorder, network):
    torch.manual_seed(0)
    data = TensorDataset(unit_inputs(torch.randn(8, 5)), torch.randn(8, 1, dtype=torch.float64).sign())
    callbacks = [RegularizedGradientClipping(gamma=1.0, delta=0.5), ConvergenceCriteria(every_n_steps=1)]
    make_trainer(callbacks, max_epochs=3, logger=recorder).fit(
        make_regression(network, lr=0.01).double(), DataLoader(data, batch_size=8)
    )
    logged = {tag for tag in recorder.scalars if tag.startswith("theory/")}
    assert len(logged) > 25
    assert not {tag for tag in logged if f"`{tag}`" not in TAGS}


def test_every_paper_is_on_the_page():
    assert not {name for name in registered_criteria() if f"| `{name}`" not in PAPERS or f"\n## {name}\n" not in PAPERS}
