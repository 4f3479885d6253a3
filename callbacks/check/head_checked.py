"""``head_checked``: the last linear layer that an ``ExpressivityGuard`` would take in a run, or why there is none."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_conv.callbacks.check.run_check import HeadCheck
from lightning_conv.callbacks.guard.callback import ExpressivityGuard
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.support import require_rule, require_supported
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.callbacks import find_callback
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated


def head_checked(trainer: pl.Trainer, pl_module: pl.LightningModule) -> HeadCheck:
    """Return the head that a guard with the settings of the run's guard, or with its defaults, finds.

    Args:
        trainer: Trainer of the run, which is about to train.
        pl_module: The module.

    Cost: that of ``GuardView.of``: the step is observed on a few samples, and a few forward passes are made.
    """
    guard = find_callback(trainer, ExpressivityGuard)
    settings, asked = GuardSettings() if guard is None else guard.settings, guard is not None
    with attempted(Exception) as attempt, isolated():  # the module is any code of the user's
        require_supported(trainer, pl_module)
        view = GuardView.of(trainer, pl_module, settings)
        require_rule(settings.step_rule, view)
    if attempt.failed:
        return HeadCheck(refused=str(attempt.error), asked=asked)
    head = view.head
    return HeadCheck(
        name=view.head_name,
        features=head.width,
        columns=head.width + head.has_bias,
        rows=view.rows,
        asked=asked,
    )
