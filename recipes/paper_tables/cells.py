"""One run of the tables: train a recipe, certify rank [h, 1] at the start and at the switch, test the last weights."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_conv import RankCertificate, certify_expressivity, find_head
from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.run.callbacks import find_callback
from lightning_conv.expressivity.singular import feature_rounding, narrow_rounding
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.hidden_features import watched_features
from lightning_conv.networks.narrowing import Narrowing, coarsest
from lightning_conv.networks.undisturbed import undisturbed
from lightning_conv.recipes.bn_resnet_module import BNResNet
from lightning_conv.recipes.data import DigitsDataModule, InMemoryDataModule
from lightning_conv.recipes.paper_tables.ledger import Cell
from lightning_conv.recipes.torchvision_data import TorchvisionDataModule
from lightning_conv.recipes.wide_classifier import WideClassifier
from lightning_conv.recipes.wide_fc_module import WideFC
from lightning_conv.reporting.json_values import json_values

RECIPES: dict[str, type[WideClassifier]] = {"bn_resnet": BNResNet, "wide_fc": WideFC}

STATISTICS = 2048
"""Largest number of samples over which BatchNorm's statistics are taken at the start."""


def open_data(name: str, root: str, n_test: int | None = None, **options: Any) -> InMemoryDataModule:
    """Build the data module of a data set of the tables.

    Args:
        name: `digits`, or a torchvision data set.
        root: folder of the torchvision data sets.
        n_test: test samples of a torchvision data set; None: all.
        options: arguments that both data modules accept, such as `n_train` and `batch_size`.

    Returns:
        The module, before its `setup`.
    """
    if name == "digits":
        return DigitsDataModule(**options)
    return TorchvisionDataModule(name, root=root, n_test=n_test, **options)


def run_cell(cell: Cell, root: str, accelerator: str, report: Callable[[float], None]) -> dict[str, Any]:
    """Train one cell and measure it.

    Args:
        cell: description of the run.
        root: folder of the torchvision data sets.
        accelerator: `accelerator` of Lightning's trainer.
        report: called with the share of the training that is done.

    Returns:
        `test_error`, `train_error` (shares in [0, 1]), `train_loss` (mean cross-entropy on the training set without
        augmentation, in eval mode), `n`, `n_test`, `width` (m_H), `steps`, `seconds` (of the training); with the guard
        `switch` (certificate at the switch, None if there was none), `phase`, `reason`, `losses` (training-set losses
        since the switch), and without augmentation `start` (certificate at the initial weights).
    """
    with _quiet():
        seed_everything(cell.seed, verbose=False)
        options = {"n_train": cell.n, "batch_size": cell.batch_size, "augment": cell.augment, "seed": cell.seed}
        data = open_data(cell.data, root, cell.n_test, **options)
        module = RECIPES[cell.recipe](**{**cell.settings, "guard": cell.guard, "diagnostics": False})
        measured = _Course(report, certifies=cell.guard and not cell.augment)
        trainer = Trainer(
            max_epochs=cell.epochs,
            accelerator=accelerator,
            devices=1,
            callbacks=[measured],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        test_loss, test_error = _loss_and_error(module, data.splits.test, cell.batch_size)
        train_loss, train_error = _loss_and_error(module, data.splits.train, cell.batch_size)
        result: dict[str, Any] = {
            "test_error": test_error,
            "test_loss": test_loss,
            "train_error": train_error,
            "train_loss": train_loss,
            "n": data.n_train,
            "n_test": len(data.splits.test),
            "width": int(module.hparams["width"]),
            "steps": trainer.global_step,
            "seconds": measured.seconds,
        }
        if measured.start is not None:
            result["start"] = certificate_facts(measured.start)
        if (guard := find_callback(trainer, ExpressivityGuard)) is not None:
            result |= {
                "phase": guard.phase,
                "reason": guard.reason,
                "switch": certificate_facts(guard.certificate),
                "losses": [float(entry["loss"]) for entry in guard.history],
            }
    return result


def certificate_at_start(network: nn.Module, inputs: Tensor) -> RankCertificate:
    """Certify rank [h, 1] at the weights as they are, with BatchNorm's statistics taken from the samples themselves.

    At the start of a run BatchNorm's running statistics are still (0, 1), so in eval mode the network differs from the
    one that is trained.

    Args:
        network: network with a linear head.
        inputs: the training set, shape (n, ...).

    Returns:
        The certificate.
    """
    head = find_head(network, inputs[:2])

    def features(dtype: torch.dtype) -> tuple[Tensor, Narrowing | None]:
        with undisturbed(network), torch.no_grad():
            frozen = StatelessModule(network, dtype=dtype, batch_norm="frozen", statistics_of=inputs[:STATISTICS])
        parts = [watched_features(frozen, head, some) for some in torch.split(inputs, 256)]
        return torch.cat([part.cpu() for part, _ in parts]), coarsest([found for _, found in parts])

    coarse, (exact, cast) = features(torch.float32)[0], features(torch.float64)
    error = feature_rounding(coarse, exact) if cast is None else narrow_rounding(coarse, exact, cast.unit)
    narrow = "" if cast is None else str(cast)
    return certify_expressivity(exact, bias=head.has_bias, feature_error=error, narrow=narrow, progress=False)


def certificate_facts(certificate: RankCertificate | None) -> dict[str, Any] | None:
    """Return a certificate as plain types: verdict, n, width, method, reason, rank, sigma_min and sigma_max with bounds."""
    if certificate is None:
        return None
    names = ("verdict", "n", "width", "method", "reason")
    facts = {name: getattr(certificate, name) for name in names} | {"rank": certificate.rank_lower}
    for name in ("sigma_min", "sigma_max"):
        bound = getattr(certificate, name)
        facts[name] = bound and json_values({key: getattr(bound, key) for key in ("value", "lower", "upper")})
    return facts


class _Course(Callback):
    """Takes the certificate at the start, reports the progress of the training, and measures its time."""

    def __init__(self, report: Callable[[float], None], certifies: bool) -> None:
        self._report, self._certifies = report, certifies
        self.start: RankCertificate | None = None
        self.seconds = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._certifies:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self.start = certificate_at_start(pl_module, data.splits.train.tensors[0])
        self._began = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report((trainer.current_epoch + 1) / (trainer.max_epochs or 1))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._began


def _loss_and_error(module: WideClassifier, split: Any, batch_size: int) -> tuple[float, float]:
    """Return mean loss and share of wrong answers on a split, in eval mode."""
    loss, wrong = 0.0, 0
    module.eval()
    with torch.no_grad():
        for inputs, labels in DataLoader(split, batch_size=4 * batch_size):
            logits, targets = module(inputs.to(module.device)), labels.to(module.device)
            loss += float(module.loss_fn(logits, targets)) * len(labels)
            wrong += int((logits.argmax(1) != targets).sum())
    return loss / len(split), wrong / len(split)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's messages and the guard's warnings; `reason` in the result already contains the latter."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
