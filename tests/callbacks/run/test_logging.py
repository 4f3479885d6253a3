"""A logger that fails takes no run down."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_conv.callbacks import ConvergenceDiagnostics, ExpressivityGuard


@pytest.mark.slow
@pytest.mark.parametrize("method", ["add_scalar", "add_text", "add_figure"])
def test_a_full_disk_is_one_warning_and_the_run_goes_on(make_trainer, make_regression, tmp_path, monkeypatch, method):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    data = TensorDataset(torch.randn(8, 4), torch.randn(8, 1))
    module = make_regression(nn.Sequential(nn.Linear(4, 12), nn.Softplus(), nn.Linear(12, 1)), lr=0.01)
    guard = ExpressivityGuard(switch_at=2)
    callbacks = [ConvergenceDiagnostics(every_n_steps=1), guard]
    trainer = make_trainer(callbacks, max_epochs=4, logger=TensorBoardLogger(tmp_path), log_every_n_steps=100)
    monkeypatch.setattr(SummaryWriter, method, full)
    with pytest.warns(UserWarning, match="TensorBoardLogger: something is not logged"):
        trainer.fit(module, DataLoader(data, batch_size=8))
    assert trainer.global_step == 4
    assert guard.phase == 2
    assert "guard/phase" in trainer.callback_metrics
