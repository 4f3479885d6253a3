"""``observe_run``: the network and the loss that the training step of a run has, observed on a copy of its module."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_conv.callbacks.run.data.batch import take_targets
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated, seed_all
from lightning_conv.callbacks.run.losses.loss_modules import loss_modules
from lightning_conv.callbacks.run.losses.run_loss import RunLoss, find_run_loss
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.step.observation import observe
from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.step.optimizers import find_optimizer
from lightning_conv.callbacks.run.step.samples_of_batch import rows_of
from lightning_conv.callbacks.run.twin import Twin

FEW, SLOW = 16, 0.04
"""Samples on which a step is observed first, and the seconds from which it is observed, and measured, on no more than these."""


class Found(NamedTuple):
    """What was observed, on which samples."""

    observed: Observed
    loss: RunLoss
    batch: Any
    samples: int


def observe_run(
    trainer: pl.Trainer,
    probe: Probe,
    parameters: Sequence[str],
    batch: Any,
    samples: int,
    *,
    may_be_few: bool = False,
) -> Found:
    """Observe the network and the loss of the training step on a copy of the run's module; the arguments are those of ``network_of``."""
    prefix = "" if probe.forward_fn is None else "module."
    names = [name.removeprefix(prefix) for name in parameters]
    with isolated(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # what the step warns of, it does in the run itself; a loss that is tried may not fit
        seed_all(probe.seed)
        twin, observed = _watched_copy(trainer, probe, names), None
        if may_be_few and samples > FEW:
            with attempted(Exception):  # a step that wants more samples gets them
                few, begun = rows_of(batch, samples, torch.arange(FEW)), time.perf_counter()
                observed = observe(twin, few, FEW)
                is_slow = time.perf_counter() - begun > SLOW
                if trainer.strategy.broadcast(is_slow) if trainer.world_size > 1 else is_slow:
                    batch, samples = few, FEW
                else:
                    twin, observed = _watched_copy(trainer, probe, names), None
        observed = observed or observe(twin, batch, samples)

        def take(some: Any) -> Tensor | None:
            return take_targets(some, probe.target_fn)

        own = loss_modules(trainer.lightning_module)
        loss = find_run_loss(trainer, twin, observed, batch, own, take, names)
        return Found(observed, loss, batch, samples)


def _watched_copy(trainer: pl.Trainer, probe: Probe, parameters: Sequence[str]) -> Twin:
    """Return a copy of the module for which it is said whose loss is observed, and over which parameters."""
    twin = copy_of(trainer, trainer.lightning_module)
    if probe.optimizer is not None:
        twin.watched = find_optimizer(trainer, probe.optimizer).number
    elif len(trainer.optimizers) == 1:
        twin.watched = 0
    named = dict(twin.module.named_parameters())
    for name in parameters:
        named[name].requires_grad_()
    return twin


def copy_of(trainer: pl.Trainer, module: pl.LightningModule) -> Twin:
    """Return a copy of the module in eval mode, on which things are measured."""
    twin = Twin(trainer, module)
    twin.module.eval()
    return twin
