"""Two processes train one network (DDP over gloo, which needs no GPU), and the callback is the same line as with one.

The code is a usual classifier with `Trainer(devices=2, strategy="ddp")`. The new line is marked. What you see: one report, written by the
first process, with the samples of the probe read from the whole training set; the second process only helps with its half of each batch.
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics


class Classifier(pl.LightningModule):
    """A perceptron for two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of this process's share of the batch."""
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def rings(samples: int) -> TensorDataset:
    """Return points of the plane; the class says whether they are within a circle."""
    points = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(points, (points.norm(dim=1) < 1.18).long())


def main() -> None:
    """Train on two processes."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[ConvergenceDiagnostics(probe=16, every_n_steps=20)],  # the new line
    )
    trainer.fit(Classifier(), DataLoader(rings(256), batch_size=16, shuffle=True))


if __name__ == "__main__":
    main()
