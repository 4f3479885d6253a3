"""A run with all monitors, criteria, health and the guard, alone or as one of the processes of torchrun; see test_equal_runs.py."""

import json
import os
import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import (
    ConvergenceCriteria,
    ConvergenceHealth,
    ExpressivityGuard,
    KernelStability,
    LambdaMin,
    Probe,
)
from lightning_conv.callbacks.run import budget, observe_run, schedule
from lightning_conv.callbacks.run.guarded import set_strict

SAMPLES = 32


class Kept(Logger):
    """Keeps what is logged: {tag: {step: value}}."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.scalars = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for tag, value in metrics.items():
            self.scalars.setdefault(tag, {})[str(int(step or 0))] = float(value)


class Net(pl.LightningModule):
    """In float64, so that the order of sums is not seen."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 48), nn.Softplus(100), nn.Linear(48, 2))
        self.double()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(folder):
    set_strict(True)
    # What is measured must not depend on how fast the machine is.
    budget.LEAST_SECONDS = schedule.FIRST_SECONDS = schedule.SHORT_RUN_SECONDS = observe_run.SLOW = 1e4
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    pl.seed_everything(0, verbose=False)
    inputs, targets = torch.rand(SAMPLES, 6, dtype=torch.float64), torch.rand(SAMPLES, 2, dtype=torch.float64)
    probe = Probe(inputs=inputs[:12])
    guard = ExpressivityGuard()
    callbacks = [
        LambdaMin(probe, every_n_steps=2),
        KernelStability(probe, every_n_steps=2),
        ConvergenceCriteria(probe=Probe(SAMPLES), every_n_steps=2),
        ConvergenceHealth(probe=Probe(SAMPLES), every_n_steps=2),
        guard,
    ]
    kept = Kept()
    trainer = pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        strategy="ddp" if world > 1 else "auto",
        callbacks=callbacks,
        logger=kept,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    # All samples in one step, whatever the number of processes: each has its share, and the mean of the gradients is that of one.
    data = DataLoader(TensorDataset(inputs, targets), batch_size=SAMPLES // world)
    trainer.fit(Net(), data)
    found = {"logged": kept.scalars, "phase": guard.phase, "reason": guard.reason}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
