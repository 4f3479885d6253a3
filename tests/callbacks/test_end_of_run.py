"""The block with which a run ends: once, with the verdict, the findings and the files."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics, ConvergenceHealth, ConvergenceReport, Probe


class Net(pl.LightningModule):
    def __init__(self, breaks=False):
        super().__init__()
        self.net, self.breaks = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)), breaks

    def training_step(self, batch, batch_idx):
        if self.breaks and self.global_step == 2 and not torch.is_inference_mode_enabled() and self.trainer.training:
            raise KeyError("broken")
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def run(callbacks, tmp_path, caplog, x=None, **net):
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) if x is None else x
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=tmp_path,
    )
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer.fit(Net(**net), data)


def blocks(caplog):
    return [each.getMessage() for each in caplog.records if each.getMessage().startswith("In plain words")]


def test_it_names_verdict_findings_and_files(tmp_path, caplog):
    run([ConvergenceDiagnostics(Probe(12), every_n_steps=1)], tmp_path, caplog)
    (block,) = blocks(caplog)
    assert block.splitlines()[0].startswith("In plain words: the run completed after 6 steps; ")
    for ending in ("html", "md", "json"):
        path = tmp_path / f"convergence.{ending}"
        assert path.is_file()
        assert str(path) in block
    assert "step 6: " in block
    assert "\x1b" not in block


def test_without_a_report_the_health_says_it(tmp_path, caplog):
    run([ConvergenceHealth(Probe(12), every_n_steps=1)], tmp_path, caplog)
    (block,) = blocks(caplog)
    assert "convergence.html" not in block
    assert "after 6 steps" in block


def test_without_health_the_report_names_its_files(tmp_path, caplog):
    run([ConvergenceReport()], tmp_path, caplog)
    assert blocks(caplog) == []
    assert str(tmp_path / "convergence.html") in caplog.text


def test_a_run_that_fails_ends_in_it_too(tmp_path, caplog):
    with pytest.raises(KeyError, match="broken"):
        run([ConvergenceDiagnostics(Probe(12), every_n_steps=1)], tmp_path, caplog, breaks=True)
    (block,) = blocks(caplog)
    assert "the run failed (KeyError) after 2 steps" in block


def test_a_run_that_cannot_be_measured_leaves_nothing_and_names_the_entry_of_the_list(tmp_path, caplog, lenient):
    samples = torch.full((12, 3), float("nan"))
    with pytest.raises(MisconfigurationException) as failed:
        run([ConvergenceDiagnostics(Probe(12))], tmp_path, caplog, x=samples)
    assert "contains NaN or infinity; clean the samples" in str(failed.value)
    assert 'ConvergenceDiagnostics(on_error="warn") trains without measuring' in str(failed.value)
    assert "forward_fn" not in str(failed.value)
    assert list(tmp_path.iterdir()) == []
    run([ConvergenceDiagnostics(Probe(12), on_error="warn")], tmp_path, caplog, x=samples)
    (block,) = blocks(caplog)
    said = " ".join(block.split())
    assert "whether units are switched off" in said
    assert "no measurement was made" in said


def test_a_sample_that_is_not_finite_is_the_cause_of_the_rise(tmp_path, caplog, lenient):
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    x[10] = float("inf")
    run([ConvergenceDiagnostics(Probe(4), every_n_steps=1)], tmp_path, caplog, x=x)
    (block,) = blocks(caplog)
    assert "the input became infinite" in " ".join(block.split())
    assert "the cause is open" not in " ".join(block.split())
