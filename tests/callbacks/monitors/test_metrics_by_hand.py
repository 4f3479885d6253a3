"""The metrics where they are meant to be logged: in a LightningModule's own validation_step."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torchmetrics import MetricCollection

from lightning_conv import (
    certify_expressivity,
    find_head,
    kernel_drift,
    kernel_spectrum,
    last_hidden_features,
    ntk_gram,
)
from lightning_conv.metrics import EffectiveRank, ExpressivityRank, KernelAlignment, KernelDrift, MinEigenvalue

PROBE = 12
EPOCHS = 3


@pytest.fixture
def make_logging(make_module, make_loader):
    """The small network of these tests, logging by hand, and its own account of every validation."""
    base = type(make_module())

    class Logging(base):
        def __init__(self):
            super().__init__(dropout=0.0)  # a resumed run would draw other masks
            self.kernel = MetricCollection(
                {"drift": KernelDrift(), "alignment": KernelAlignment(), "effective_rank": EffectiveRank()},
                prefix="kernel/",
            )
            self.lambda_min = MinEigenvalue()
            self.rank = ExpressivityRank()
            self.grams, self.features = [], []

        def validation_step(self, batch, batch_idx):
            if batch_idx == 0:
                gram = ntk_gram(self, batch[0][:PROBE], batch_norm="frozen")
                self.kernel.update(gram)
                self.lambda_min.update(gram)
                self.grams.append(gram)
                self.features.append([])
            h = last_hidden_features(self, find_head(self, batch[0]), batch[0], dtype=torch.float64)
            self.rank.update(h)
            self.features[-1].append(h)
            self.log_dict(self.kernel)
            self.log("rank", self.rank)

        def on_validation_epoch_end(self):
            bounds = self.lambda_min.bounds()
            self.log_dict({"lambda_min": bounds.value, "lambda_min_lower": bounds.lower})
            self.lambda_min.reset()

    def make():
        pl.seed_everything(0, verbose=False)
        return Logging()

    return make


class Account(pl.Callback):
    """What reaches trainer.callback_metrics after each validation."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(make_trainer, module, loader, tmp_path, **kwargs):
    account = Account()
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, monitor="lambda_min", mode="max")
    callbacks = [account, keep, EarlyStopping("kernel/alignment", mode="max", patience=100)]
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = make_trainer(callbacks, enable_checkpointing=True, **kwargs)
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return account.seen


def test_every_validation_logs_the_kernel_against_the_one_at_the_start(
    make_trainer, make_logging, make_loader, tmp_path
):
    module = make_logging()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(before the ``update``|needs to be floating|reset).*")
        seen = fit(make_trainer, module, make_loader, tmp_path, max_epochs=EPOCHS, num_sanity_val_steps=1)
    assert len(seen) == len(module.grams) == EPOCHS + 1  # the sanity check sees the network before its first step
    assert seen[-1]["kernel/drift"] > 1e-3
    for found, gram, features in list(zip(seen, module.grams, module.features, strict=True))[1:]:
        drift, spectrum = kernel_drift(gram, module.grams[0]), kernel_spectrum(gram)
        assert found["kernel/drift"] == pytest.approx(drift.relative_frobenius, rel=1e-6)
        assert found["kernel/alignment"] == pytest.approx(drift.alignment, rel=1e-6)
        assert found["kernel/effective_rank"] == pytest.approx(spectrum.effective_rank, rel=1e-6)
        assert found["lambda_min"] == pytest.approx(spectrum.lambda_min.value, rel=1e-6)
        assert found["lambda_min_lower"] == pytest.approx(spectrum.lambda_min.lower, rel=1e-6)
        assert found["rank"] == certify_expressivity(torch.cat(features)).rank_lower  # of this validation alone


def test_resumed_run_measures_against_the_kernel_at_the_start(make_trainer, make_logging, make_loader, tmp_path):
    whole = fit(make_trainer, make_logging(), make_loader, tmp_path / "whole", max_epochs=EPOCHS)
    fit(make_trainer, make_logging(), make_loader, tmp_path / "cut", max_epochs=1)
    resumed = fit(
        make_trainer,
        make_logging(),
        make_loader,
        tmp_path / "cut",
        max_epochs=EPOCHS,
        ckpt_path=tmp_path / "cut" / "last.ckpt",
    )
    for name in ("kernel/drift", "kernel/alignment", "lambda_min", "rank"):
        assert resumed[-1][name] == pytest.approx(whole[-1][name], rel=1e-9), name


def test_validation_alone_and_a_low_precision_module_keep_float64(make_trainer, make_logging, make_loader):
    """trainer.validate runs in inference mode; what it leaves in the metrics serves the fit that follows."""
    module = make_logging()
    trainer = make_trainer(max_epochs=1)
    trainer.validate(module, make_loader(), verbose=False)
    reference = module.kernel["drift"].reference.clone()
    assert torch.equal(reference, module.grams[0].matrix)
    trainer.fit(module, make_loader(), make_loader())
    assert torch.equal(module.kernel["drift"].reference, reference)
    assert 1e-3 < float(trainer.callback_metrics["kernel/drift"]) < math.inf
    module.to(torch.bfloat16)
    assert torch.equal(module.kernel["drift"].reference, reference)
