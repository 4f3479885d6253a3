"""``dry_trainer``, ``copied_run``: a trainer and copies with which a fit can be begun, and given up without a trace."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lightning_conv.callbacks.diagnostics import ConvergenceDiagnostics
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.step.own_hooks import hooks_from_outside
from lightning_conv.callbacks.run.twin import copy_module
from lightning_conv.networks.copying import not_copied

SHAPING = (
    BaseFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
"""Callbacks of Lightning that change what is trained before the first step; the others can be seen by the check, and are not called."""

HOOKS = [
    name for name in vars(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown", "load_state_dict")
]

LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def copied_run(
    trainer: pl.Trainer, module: pl.LightningModule
) -> tuple[pl.LightningModule, list[pl.Callback], list[KernelMonitor]]:
    """Return copies of the module, of the callbacks around it, and of the monitors that are to measure.

    Without a monitor among the callbacks there are those of ``ConvergenceDiagnostics()``.

    Args:
        trainer: The user's.
        module: The user's.

    Raises:
        MisconfigurationException: The module or a callback cannot be copied.
    """
    own = module.configure_callbacks()
    listed = _merged(trainer.callbacks, own if isinstance(own, Sequence) else [own])  # type: ignore[attr-defined]
    memo: dict[int, Any] = {id(each): each for each in hooks_from_outside(module)} | not_copied(module)
    for each in (trainer, getattr(module, "_trainer", None), getattr(module, "_fabric", None)):
        if each is not None:
            memo[id(each)] = each
    with attempted(Exception) as attempt:  # whatever the module's own way to copy itself raises
        copied = copy_module(module, memo)
        for each in copied.modules():
            if isinstance(each, pl.LightningModule):
                each._trainer = None
        # In their list, so that the ones that share a Probe still do.
        callbacks: list[pl.Callback] = [
            copy.deepcopy(each, memo)
            if isinstance(each, (KernelMonitor, ConvergenceDiagnostics, *SHAPING))
            else silent(each)
            for each in listed
        ]
    if attempt.failed:
        raise MisconfigurationException(
            f"check_run: a copy of {type(module).__name__} and its callbacks, on which everything is tried, cannot be made "
            f"({attempt.reason}); give what cannot be copied a __deepcopy__, or make it in setup()"
        )
    # The check takes the place of this hook.
    vars(copied)["configure_callbacks"] = list
    groups = [each for each in callbacks if isinstance(each, ConvergenceDiagnostics)]
    monitors = [each for each in callbacks if isinstance(each, KernelMonitor)]
    if not groups and not monitors:
        groups = [ConvergenceDiagnostics()]
    present = {type(each) for each in monitors}
    monitors += [
        each
        for group in groups
        for each in group.callbacks
        if isinstance(each, KernelMonitor) and type(each) not in present
    ]
    around = [each for each in callbacks if not isinstance(each, (KernelMonitor, ConvergenceDiagnostics))]
    return copied, around, monitors


def _merged(of_trainer: Sequence[pl.Callback], of_module: Sequence[pl.Callback]) -> list[pl.Callback]:
    """Return the callbacks of a run: those of the module take the place of the trainer's of their class, as in Lightning."""
    replaced = {type(each) for each in of_trainer if any(issubclass(type(own), type(each)) for own in of_module)}
    return [*(each for each in of_trainer if type(each) not in replaced or type(each) is pl.Callback), *of_module]


def silent(callback: pl.Callback) -> pl.Callback:
    """Return a callback that is of the same class and has the same settings, and does nothing.

    Args:
        callback: Any callback; it is left alone.
    """
    made = copy.copy(callback)
    vars(made).update(dict.fromkeys(HOOKS, _nothing))
    return made


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


def dry_trainer(trainer: pl.Trainer, callbacks: list[pl.Callback], folder: str) -> pl.Trainer:
    """Return a trainer with the settings of another one that decide what is trained: on its device, in one process, without loggers.

    Args:
        trainer: The other one.
        callbacks: Of the new one.
        folder: Where Lightning may write.
    """
    device = trainer.strategy.root_device
    kind: Mapping[str, Any] = (
        {"accelerator": "gpu", "devices": [device.index or 0]}
        if device.type == "cuda"
        else {"accelerator": device.type, "devices": 1}
    )
    return pl.Trainer(
        **kind,
        precision=trainer.precision,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        limit_train_batches=trainer.limit_train_batches,
        overfit_batches=trainer.overfit_batches,  # type: ignore[attr-defined]
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        callbacks=callbacks,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep what Lightning and the callbacks say in the block from the terminal, and yield their warnings."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield said
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
