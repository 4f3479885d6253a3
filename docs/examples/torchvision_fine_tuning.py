"""Fine-tuning of a torchvision ResNet: the trunk is frozen, and a new head learns two kinds of pictures.

This is the usual recipe of transfer learning, with random weights so that nothing is downloaded. The new line is marked. What you see:
the only trained layer has the whole kernel, and how near its steps are to their limit. A frozen trunk is a choice here, and no finding
accuses you of it; what cannot be judged is named with its reason.
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_conv.callbacks import ConvergenceDiagnostics


class FineTuned(pl.LightningModule):
    """A ResNet whose last layer is new, and the only one that is trained."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.model = resnet18(weights=None)  # yours: ResNet18_Weights.DEFAULT
        self.model.requires_grad_(False)
        self.model.fc = nn.Linear(self.model.fc.in_features, classes)

    def on_train_epoch_start(self) -> None:
        """Keep the running statistics of BatchNorm as they are."""
        self.model.eval()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that has the new layer only."""
        return torch.optim.Adam(self.model.fc.parameters(), lr=3e-4)


def pictures(samples: int) -> TensorDataset:
    """Return pictures of noise; those of the second class have horizontal stripes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (samples,), generator=generator)
    stripes = torch.arange(32).div(4, rounding_mode="floor").remainder(2).float()[:, None].expand(32, 32)
    noise = torch.randn(samples, 3, 32, 32, generator=generator)
    return TensorDataset(noise + 2 * labels[:, None, None, None] * stripes, labels)


def main() -> None:
    """Train the new layer for a few epochs."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[ConvergenceDiagnostics(probe=8, every_n_steps=8)],  # the new line
    )
    trainer.fit(FineTuned(2), DataLoader(pictures(64), batch_size=16, shuffle=True))


if __name__ == "__main__":
    main()
