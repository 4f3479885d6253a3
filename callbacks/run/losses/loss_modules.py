"""``find_loss``: the loss that a run trains, where its module tells."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn

from lightning_conv.losses.kind import LossFn, is_loss_module

__all__ = ["LossFn", "find_loss"]


def loss_modules(pl_module: pl.LightningModule) -> list[nn.Module]:
    """Return the loss modules that are attributes of the LightningModule, as in ``self.loss_fn = nn.CrossEntropyLoss()``."""
    return [module for module in pl_module.children() if is_loss_module(module)]


def find_loss(pl_module: pl.LightningModule) -> nn.Module | None:
    """Return the one loss module that is an attribute of the LightningModule; None: there is none, or several."""
    found = loss_modules(pl_module)
    return found[0] if len(found) == 1 else None
