"""On two processes one page is written, with the values that the module reduces over both of them."""

from __future__ import annotations

import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_conv.callbacks import ConvergenceReport, LambdaMin


def train_with_a_reduced_metric(make_trainer, make_regression):
    class Reduced(make_regression):
        def __init__(self):
            super().__init__(nn.Linear(8, 3), 0.05)
            self.mean = MeanMetric()

        def training_step(self, batch, batch_idx):
            rank = float(torch.distributed.get_rank())
            self.mean.update(rank)
            self.log("mean_rank", self.mean, on_epoch=True, on_step=False)
            self.log("summed_rank", rank, on_epoch=True, sync_dist=True, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    report = ConvergenceReport()
    trainer = make_trainer([LambdaMin(16, every_n_steps=2), report], max_epochs=2)
    folder = trainer.default_root_dir
    trainer = make_trainer([LambdaMin(16, every_n_steps=2), report], max_epochs=2, logger=CSVLogger(folder))
    data = DataLoader(TensorDataset(torch.rand(32, 8), torch.rand(32, 3)), batch_size=8)
    trainer.fit(Reduced(), data)
    pages = sorted(path.name for path in report.folder_of(trainer).glob("convergence*"))
    return {tag: [series.steps, series.values] for tag, series in report.series.items()}, pages


def test_the_first_process_writes_and_all_take_part_in_reductions(run_on_two_processes):
    (found, pages), (other, _) = run_on_two_processes(train_with_a_reduced_metric)
    assert pages == ["convergence.html", "convergence.json", "convergence.md", "convergence.png"]
    assert other == {}
    assert found["mean_rank"] == [[2, 4], [0.5, 0.5]]
    assert found["summed_rank"][0] == [2, 4]
    assert found["kernel/lambda_min"][0] == [0, 2, 4]
