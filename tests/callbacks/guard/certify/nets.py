"""A wide network whose steps are unusual late in the run, and the table on which it is trained."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

SAMPLES, CLASSES, WIDTH, SWITCH, LATE = 24, 3, 30, 5, 4


class Net(pl.LightningModule):
    """A wide network; three batches make an epoch. What is unusual begins in the fifth epoch of six, in steps 12 to 17."""

    def __init__(self, loss_fn=None, width=WIDTH):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Softplus(10, 40.0), nn.Dropout(0.5))
        self.head = nn.Linear(width, CLASSES)
        self.scale = 1.0
        if loss_fn is not None:
            self.loss_fn = loss_fn

    @property
    def late(self):
        return self.current_epoch >= LATE

    def forward(self, x):
        return self.head(self.scale * self.trunk(x))

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def loss(self, u, y):
        return self.loss_fn(u, y) if hasattr(self, "loss_fn") else F.cross_entropy(u, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def table(targets=None):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 4, generator=generator)
    labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    return TensorDataset(x, labels if targets is None else targets)


LOSSES = [None, nn.CrossEntropyLoss()]


def undecided(guard, said):
    assert guard.phase == 2
    assert guard.verdict == "undecided"
    assert said in "; ".join([guard.why, *guard.caveats])
