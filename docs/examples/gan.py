"""A GAN that draws points on a circle: two optimizers, two networks, one callback.

The code is Lightning's usual pattern of manual optimization. The new line is marked. What you see: the generator and the discriminator
each have a network and a kernel of their own, with the name in the tags of the charts (`kernel/generator/lambda_min`), sentences and a
figure on the page. The loss draws noise, so what would need to know it is left out, and says so.
"""

import math

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics


def network(*widths: int) -> nn.Sequential:
    """Return a perceptron with two hidden layers."""
    first, hidden, last = widths
    return nn.Sequential(
        nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, last)
    )


class GAN(pl.LightningModule):
    """A generator that turns noise into points, and a discriminator that tells them from real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = network(4, 32, 2), network(2, 32, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Take a step of the discriminator, then one of the generator."""
        (real,) = batch
        of_generator, of_discriminator = self.optimizers()
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        judged = nn.functional.binary_cross_entropy_with_logits

        drawn = self.generator(torch.randn(len(real), 4)).detach()
        loss = judged(self.discriminator(real), ones) + judged(self.discriminator(drawn), zeros)
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()

        loss = judged(self.discriminator(self.generator(torch.randn(len(real), 4))), ones)
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return an optimizer for each network."""
        return [torch.optim.Adam(each.parameters(), lr=2e-3) for each in (self.generator, self.discriminator)]


def circle(samples: int) -> TensorDataset:
    """Return points near the unit circle."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(samples, generator=generator)
    points = torch.stack([angle.cos(), angle.sin()], 1)
    return TensorDataset(points + 0.05 * torch.randn(samples, 2, generator=generator))


def main() -> None:
    """Train both networks."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=10,
        accelerator="cpu",
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[ConvergenceDiagnostics(probe=16, every_n_steps=20)],  # the new line
    )
    trainer.fit(GAN(), DataLoader(circle(256), batch_size=32, shuffle=True))


if __name__ == "__main__":
    main()
