"""On two processes the monitors measure the same everywhere, and the guard declines what it would decline on one."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_conv.callbacks import ExpressivityGuard, KernelStability, LambdaMin, Probe

torch.set_num_threads(1)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Softplus(100), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


pl.seed_everything(0, verbose=False)
data = DataLoader(TensorDataset(torch.rand(64, 8), torch.randint(0, 3, (64,))), batch_size=8, shuffle=True)
options = dict(max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False)
options |= dict(enable_checkpointing=False, enable_model_summary=False)
trainer = pl.Trainer(callbacks=[KernelStability(max_overhead=0.9), LambdaMin(max_overhead=0.9)], **options)
trainer.fit(Net(), data)
values = [float(trainer.callback_metrics[name]) for name in ("kernel/lambda_min", "kernel/relative_frobenius_change")]
gathered = trainer.strategy.all_gather(torch.tensor(values))
assert torch.equal(gathered[0], gathered[1]), gathered
assert values[0] > 0 and values[1] > 0, values


class Squared(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)
        self.loss_fn = nn.MSELoss()

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])


data = DataLoader(TensorDataset(torch.rand(64, 8), torch.rand(64, 3)), batch_size=32)  # both ranks: the whole set
follow = LambdaMin(Probe(64, outputs="full"), every_n_steps=2, per_layer="spectra")
trainer = pl.Trainer(callbacks=[follow], **options)
trainer.fit(Squared(), data)
names = ("kernel/contraction_predicted", "kernel/contraction_measured", "kernel/lambda_min_layers")
values = [float(trainer.callback_metrics[name]) for name in names]
gathered = trainer.strategy.all_gather(torch.tensor(values))
assert torch.equal(gathered[0], gathered[1]), gathered
assert abs(values[0] - values[1]) < 1e-4 * values[1] < 1e-4, values
guard = ExpressivityGuard()
data = DataLoader(TensorDataset(torch.rand(64, 8), torch.randint(0, 3, (64,))), batch_size=8)
pl.Trainer(callbacks=[guard], **options).fit(Net(), data)
assert guard.phase == 1 and "too narrow" in guard.reason, guard.reason
print("rank", trainer.global_rank, "ok")
"""


def test_monitors_and_guard_agree_on_both_ranks(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 2, done.stdout  # the ranks may print into one another's lines
