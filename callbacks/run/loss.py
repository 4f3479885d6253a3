"""Which loss a run trains, where its module tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

LossFn: TypeAlias = Callable[[Tensor, Any], Tensor]


def find_loss(pl_module: pl.LightningModule) -> nn.Module | None:
    """The one loss module that hangs on the LightningModule (``self.loss_fn = nn.CrossEntropyLoss()``), or None."""
    found = [module for module in pl_module.children() if isinstance(module, _Loss)]
    return found[0] if len(found) == 1 else None
