"""Lightning's transformer demo on sequences of numbers that repeat, watched by one callback.

The code is that of `lightning.pytorch.demos`: `LightningTransformer` as it is, with a small data set in place of the one that it would
download. The new line is marked. What you see: the network and its loss are found in the demo's own training step, whose
outputs have a row for each word; at the end there are sentences, among them how far the step is from its limit.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos import LightningTransformer, Transformer
from torch.utils.data import DataLoader, Dataset

from lightning_conv.callbacks import ConvergenceDiagnostics

VOCABULARY, LENGTH = 12, 4


class Counting(Dataset):
    """Sequences that count up from a random number, and the same moved on by one."""

    def __init__(self, samples: int) -> None:
        self.starts = torch.randint(VOCABULARY, (samples, 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a sequence and what follows each of its members."""
        row = (self.starts[index] + torch.arange(LENGTH + 1)) % VOCABULARY
        return row[:-1], row[1:]


class Demo(LightningTransformer):
    """The demo, narrower so that it takes seconds; it downloads nothing here."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCABULARY)
        self.model = Transformer(VOCABULARY, ninp=16, nhead=2, nhid=16, nlayers=1)

    def prepare_data(self) -> None:
        """Do nothing: the data are made in memory."""


def main() -> None:
    """Train the demo for a few epochs."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[ConvergenceDiagnostics(probe=4, every_n_steps=16)],  # the new line
    )
    trainer.fit(Demo(), DataLoader(Counting(64), batch_size=8, shuffle=True))


if __name__ == "__main__":
    main()
