"""Write the checkpoints of this folder: runs of 8 full-batch steps, stopped in phase 1, in phase 2, and on a network of Du et al.

Run with the version whose checkpoints are to be kept: ``python tests/callbacks/checkpoints/old_run.py FOLDER``.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria, ExpressivityGuard, KernelStability, LambdaMin, Probe
from lightning_conv.theory.networks import DuFC

STEPS, SWITCH = 8, 4
KEPT = {"phase_one": ("mlp", 2), "phase_two": ("mlp", 6), "du": ("du", 5)}
"""Name of a checkpoint -> the run that it is of, and the step that it was written after."""


class Squares(pl.LightningModule):
    """A small network in float64, trained by plain SGD on the squared error of five samples."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        plain = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).double()
        self.network = plain if kind == "mlp" else DuFC(6, width=20, depth=2)
        self.loss_fn = nn.MSELoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def samples(kind: str) -> DataLoader[Any]:
    torch.manual_seed(2)
    inputs, targets = torch.eye(5, 6, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    return DataLoader(TensorDataset(inputs, targets if kind == "mlp" else targets.flatten()), batch_size=5)


def run(kind: str, folder: Path | None = None, ckpt_path: Path | None = None) -> tuple[pl.Trainer, ConvergenceCriteria]:
    """Train from the start, or go on from a checkpoint; with ``folder`` write a checkpoint after every step."""
    criteria = ConvergenceCriteria(probe=Probe(5), every_n_steps=1, radius=1.0)
    callbacks = [KernelStability(Probe(5), every_n_steps=1), LambdaMin(Probe(5), every_n_steps=1), criteria]
    if kind == "mlp":
        callbacks.append(ExpressivityGuard(switch_at=SWITCH))
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_epochs=1))
    trainer = pl.Trainer(
        max_epochs=STEPS,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Squares(kind), samples(kind), ckpt_path=ckpt_path)
    return trainer, criteria


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as written:
        for kind in ("mlp", "du"):
            run(kind, Path(written) / kind)
        for name, (kind, step) in KEPT.items():
            shutil.copyfile(Path(written) / kind / f"step={step}.ckpt", Path(sys.argv[1]) / f"{name}.ckpt")
