"""Loss and gap on the whole training set: which loss it is, what its infimum is, and what it is now."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from lightning_conv.callbacks.batch import TARGET_KEYS, TargetFn, take_targets
from lightning_conv.callbacks.training_set import TrainingSet
from lightning_conv.evaluation import StatelessModule, undisturbed
from lightning_conv.two_phase import loss_infimum

LossFn: TypeAlias = Callable[[Tensor, Any], Tensor]

ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


class TrainingLoss:
    """L(w) = (1/n) sum_i ell(u_i, y_i) over the training set, and its distance to inf L = (1/n) sum_i inf_q ell(q, y_i).

    Args:
        pl_module: of the run; searched for its loss module if ``loss_fn`` is None.
        loss_fn: ``loss_fn(outputs, targets)`` of the training step.
        infimum: of the mean loss; None: looked up for the usual losses; NaN: not known.
        target_fn: takes the targets out of a batch; None: ``batch[1]`` or the keys y, target(s), label(s) of a dict.

    Warns:
        UserWarning: the loss or its infimum is not known, and what to pass.
    """

    def __init__(
        self, pl_module: pl.LightningModule, loss_fn: LossFn | None, infimum: float | None, target_fn: TargetFn | None
    ) -> None:
        self._target_fn, self._given = target_fn, infimum is not None
        self._loss_fn = loss_fn if loss_fn is not None else find_loss(pl_module)
        known = infimum if infimum is not None else loss_infimum(self._loss_fn)
        self._infimum = None if known is None or math.isnan(known) else known
        if self._loss_fn is None:
            rank_zero_warn(
                "ExpressivityGuard: found no loss module on the LightningModule, so the gap is not logged; pass "
                "loss_fn=nn.MSELoss() or what the training step uses"
            )
        elif self._infimum is None:
            rank_zero_warn(
                f"ExpressivityGuard: the infimum of {type(self._loss_fn).__name__} is not known, so the gap is not logged; "
                "pass infimum=..."
            )

    def measure(self, network: nn.Module, data: TrainingSet) -> dict[str, float]:
        """``loss``, and ``gap`` where the infimum is known; empty if the loss itself is not known.

        The network runs in eval mode and its own precision; the loss of all its outputs is taken at once, in float64. For
        cross-entropy with soft targets there is no gap: its infimum is not 0.
        """
        if self._loss_fn is None:
            return {}
        parts: list[tuple[Tensor, Tensor]] = []
        module = StatelessModule(network)
        for inputs, batch in data.batches():
            with undisturbed(network), torch.no_grad():
                outputs = module.call({}, module.convert(inputs))
            assert isinstance(outputs, Tensor)
            parts.append((outputs.double(), self._targets(batch).to(outputs.device)))
        outputs, targets = (torch.cat(side) for side in zip(*parts, strict=True))
        if targets.is_floating_point():
            targets = targets.double()
        if isinstance(self._loss_fn, ELEMENTWISE):
            # (n, 1) against (n,) would broadcast to n x n.
            targets = targets.reshape(outputs.shape)
        exact = copy.deepcopy(self._loss_fn).to(outputs) if isinstance(self._loss_fn, nn.Module) else self._loss_fn
        with torch.no_grad():
            loss = exact(outputs, targets)
        mean = float(loss) / len(outputs) if getattr(exact, "reduction", "mean") == "sum" else float(loss.mean())
        soft = isinstance(self._loss_fn, nn.CrossEntropyLoss) and targets.is_floating_point() and not self._given
        return {"loss": mean} if self._infimum is None or soft else {"loss": mean, "gap": mean - self._infimum}

    def _targets(self, batch: Any) -> Tensor:
        found = take_targets(batch, self._target_fn)
        if found is not None:
            return found
        raise MisconfigurationException(
            f"batch: found no tensor of targets (looked for batch[1] or one of the keys {', '.join(TARGET_KEYS)}), so the loss on the "
            "training set is unknown; pass target_fn=lambda batch: ..."
        )


def find_loss(pl_module: pl.LightningModule) -> nn.Module | None:
    """The one loss module that hangs on the LightningModule (``self.loss_fn = nn.CrossEntropyLoss()``), or None."""
    found = [module for module in pl_module.children() if isinstance(module, _Loss)]
    return found[0] if len(found) == 1 else None
