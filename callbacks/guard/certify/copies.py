"""Copies of the module on which the training step is tried: in eval mode, as phase 2 has them, at the end of the run."""

from __future__ import annotations

import math

import lightning.pytorch as pl

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.twin import Twin


def last_moment(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the run's last step and epoch; far ones where they are not known.

    Args:
        trainer: Trainer of the run.
    """
    last, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
    step = int(last) - 1 if 1 <= last < math.inf else trainer.global_step + 10**6
    return step, epochs - 1 if epochs is not None and epochs > 0 else trainer.current_epoch + 10**3


def frozen_twin(view: GuardView, step: int | None = None, epoch: int | None = None) -> Twin:
    """Return a copy of the module as phase 2 has it: in eval mode, only the head with gradients.

    Args:
        view: The run.
        step: Optimizer steps that the copy is told of; None: those of the run.
        epoch: Epoch that the copy is told of; None: that of the run.
    """
    twin = in_eval_mode(view, step, epoch)
    for name, parameter in twin.module.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name.startswith(f"{view.head_name}."))
    return twin


def in_eval_mode(view: GuardView, step: int | None = None, epoch: int | None = None) -> Twin:
    """Return a copy of the module in eval mode, with all gradients.

    Args:
        view: The run.
        step: Optimizer steps that the copy is told of; None: those of the run.
        epoch: Epoch that the copy is told of; None: that of the run.
    """
    twin = Twin(view.trainer, view.module, step=step, epoch=epoch)
    twin.module.eval()
    return twin
