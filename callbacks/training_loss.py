"""Loss and gap on the whole training set: which loss it is, what its infimum is, and what it is now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from lightning_conv.callbacks.training_set import TrainingSet
from lightning_conv.evaluation import StatelessModule, sample_count, undisturbed
from lightning_conv.two_phase import loss_infimum

LossFn: TypeAlias = Callable[[Tensor, Any], Tensor]
TargetFn: TypeAlias = Callable[[Any], Any]

TARGET_KEYS = ("y", "target", "targets", "label", "labels")


class TrainingLoss:
    """L(w) = (1/n) sum_i ell(u_i, y_i) over the training set, and its distance to inf L = (1/n) sum_i inf_q ell(q, y_i).

    Args:
        pl_module: of the run; searched for its loss module if ``loss_fn`` is None.
        loss_fn: ``loss_fn(outputs, targets)`` of the training step.
        infimum: of the mean loss; None: looked up for the usual losses.
        target_fn: takes the targets out of a batch; None: ``batch[1]`` or the keys y, target(s), label(s) of a dict.

    Warns:
        UserWarning: the loss or its infimum is not known, and what to pass.
    """

    def __init__(
        self, pl_module: pl.LightningModule, loss_fn: LossFn | None, infimum: float | None, target_fn: TargetFn | None
    ) -> None:
        self._target_fn = target_fn
        self._loss_fn = loss_fn if loss_fn is not None else find_loss(pl_module)
        self._infimum = infimum if infimum is not None else loss_infimum(self._loss_fn)
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

        The network runs in eval mode and its own precision; the loss of its outputs is taken in float64.
        """
        if self._loss_fn is None:
            return {}
        total, count = 0.0, 0
        for inputs, batch in data.batches():
            with undisturbed(network), torch.no_grad():
                module = StatelessModule(network)
                outputs = module.call({}, module.convert(inputs))
                assert isinstance(outputs, Tensor)
                targets = self._targets(batch)
                if isinstance(targets, Tensor):
                    dtype = torch.float64 if targets.is_floating_point() else targets.dtype
                    targets = targets.to(outputs.device, dtype)
                loss = self._loss_fn(outputs.double(), targets)
            samples = sample_count(inputs)
            summed = getattr(self._loss_fn, "reduction", "mean") == "sum"
            total += float(loss) if summed else float(loss.mean()) * samples
            count += samples
        mean = total / count
        return {"loss": mean} if self._infimum is None else {"loss": mean, "gap": mean - self._infimum}

    def _targets(self, batch: Any) -> Any:
        if self._target_fn is not None:
            return self._target_fn(batch)
        if isinstance(batch, dict):
            found = [key for key in TARGET_KEYS if key in batch]
            if found:
                return batch[found[0]]
        elif isinstance(batch, (list, tuple)) and len(batch) > 1:
            return batch[1]
        raise MisconfigurationException(
            f"batch: found no targets (looked for batch[1] or one of the keys {', '.join(TARGET_KEYS)}), so the loss on the "
            "training set is unknown; pass target_fn=lambda batch: ..."
        )


def find_loss(pl_module: pl.LightningModule) -> nn.Module | None:
    """The one loss module that hangs on the LightningModule (``self.loss_fn = nn.CrossEntropyLoss()``), or None."""
    found = [module for module in pl_module.children() if isinstance(module, _Loss)]
    return found[0] if len(found) == 1 else None
