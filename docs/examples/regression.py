"""Regression of a smooth function of eight numbers, with two callbacks: one that watches, one that trains with a guarantee.

The code is a usual LightningModule with a squared loss and SGD. The new line is marked. What you see: halfway through the guard certifies
that the last layer alone can fit all 200 samples, and trains that layer only; the report says where the loss can come down to. Without
the guard, leave it out of the list: the rest stays as it is.
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics, ExpressivityGuard


class Regression(pl.LightningModule):
    """A perceptron whose last hidden layer has more units than there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the squared loss of a batch."""
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.02)


def smooth(samples: int) -> TensorDataset:
    """Return random points and the sum of their sines."""
    inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))


def main() -> None:
    """Train the perceptron in two phases."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=30,
        accelerator="cpu",
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[
            ExpressivityGuard(switch_at=0.5),
            ConvergenceDiagnostics(probe=64, every_n_steps=12),
        ],  # the new line
    )
    trainer.fit(Regression(), DataLoader(smooth(200), batch_size=50, shuffle=True))


if __name__ == "__main__":
    main()
