"""A small GPT that learns to write sums such as 12+34=46, watched by one callback.

The model is plain torch.nn: embeddings, a causal transformer and a head that gives the next character. The new line is marked. What you
see: the loss of every character is recognised as cross-entropy over the sequence, and the report says how noisy a batch is. The two
summands are random, so the loss cannot come down to 0, and nothing accuses the run of that.
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics

CHARACTERS = "0123456789+="
LENGTH = 7


class GPT(pl.LightningModule):
    """A causal transformer of two blocks on characters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(CHARACTERS), width)
        self.positions = nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(CHARACTERS)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next character at every place."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=self.positions.dtype)
        return self.head(self.blocks(self.tokens(tokens) + self.positions, mask=mask, is_causal=True))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the mean loss of all characters of the batch."""
        tokens, following = batch
        loss = nn.functional.cross_entropy(self(tokens).flatten(0, 1), following.flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, as for most GPTs."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def sums(samples: int) -> TensorDataset:
    """Return sums as numbers of their characters, and the same moved on by one."""
    first, second = torch.randint(10, 50, (2, samples), generator=torch.Generator().manual_seed(0)).tolist()
    words = [f"{a}+{b}={a + b}" for a, b in zip(first, second, strict=True)]
    rows = torch.tensor([[CHARACTERS.index(each) for each in word] for word in words])
    return TensorDataset(rows[:, :-1], rows[:, 1:])


def main() -> None:
    """Train the GPT for a few epochs."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[ConvergenceDiagnostics(probe=8, every_n_steps=16)],  # the new line
    )
    trainer.fit(GPT(), DataLoader(sums(256), batch_size=32, shuffle=True))


if __name__ == "__main__":
    main()
