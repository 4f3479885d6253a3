"""A measurement of a sharded run that fails on one of its processes ends the run on both, in time."""

import os
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from on_ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import KernelStability, Probe
from lightning_conv.callbacks.run import ranks

pytestmark = pytest.mark.slow


class Sharded(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Tanh(), nn.Linear(16, 3))

    def configure_model(self):
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data():
    torch.manual_seed(2)
    return DataLoader(TensorDataset(torch.rand(64, 8), torch.rand(64, 3)), batch_size=8)


def one_fails(rank, world):
    """Fit with a network that fails on the second process, in a measurement alone; return how the fit ends, and when."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "TORCHELASTIC_RUN_ID": "one"}
    ranks.all_processes.__defaults__ = (4.0,)
    module, steps = Sharded(), []

    def fail(layer, given):
        if rank == 1 and not layer.training and len(steps) == 2:
            raise ValueError("only here")

    class Fails(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.net[2].register_forward_pre_hook(fail)

        def on_train_batch_end(self, *_):
            steps.append(1)

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        callbacks=[Fails(), KernelStability(Probe(8), every_n_steps=1)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    begun = time.monotonic()
    try:
        trainer.fit(module, data())
    except BaseException as error:
        said = f"{type(error).__name__}: {error}", len(steps), time.monotonic() - begun
        if rank == 1:
            return said
        time.sleep(1)
        return said
    return "ended", len(steps), 0.0


def test_a_measurement_that_fails_on_one_process_ends_the_run_on_both(tmp_path):
    first, second = run(2, one_fails, tmp_path)
    assert "PartedError" in second[0]
    assert "only here" in second[0]
    assert second[1] == 2
    assert "PartedError" in first[0]
    assert first[1] == 2
    assert max(first[2], second[2]) < 60
