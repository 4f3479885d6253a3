"""What the guard works with in Lightning, and what to do about the rest; said in ``setup``, before anything is trained."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from lightning_conv.callbacks.guard.head.training_loss import TrainingLoss
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.run.probe import cannot_call
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.networks.evaluation import Inputs
from lightning_conv.networks.head import Head, find_head


def require_supported(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse what would break the two-phase rule.

    Raises:
        MisconfigurationException: another strategy than a single device or DDP, model averaging, manual optimization, weight
            averaging; says what to do.
    """
    strategy = trainer.strategy
    single = isinstance(strategy, SingleDeviceStrategy) and trainer.world_size == 1
    if not single and type(strategy) is not DDPStrategy:
        raise MisconfigurationException(
            f"ExpressivityGuard: {type(strategy).__name__} on {trainer.world_size} devices; the trunk is certified and frozen as a "
            'whole, which works with whole copies of it: use Trainer(strategy="ddp"), or Trainer(devices=1)'
        )
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise MisconfigurationException(
            "ExpressivityGuard: model_averaging_period lets the ranks hold different weights, and one certificate cannot be about "
            'all of them; use Trainer(strategy="ddp") without it'
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "ExpressivityGuard: the module optimizes manually, so it may step what is frozen, and several optimizers may pull at the head; "
            "use automatic optimization with one optimizer (its parameter groups give parts of the network their own settings)"
        )
    averaging = [c for c in trainer.callbacks if isinstance(c, (StochasticWeightAveraging, WeightAveraging))]  # type: ignore[attr-defined]
    if averaging:
        raise MisconfigurationException(
            f"ExpressivityGuard: {type(averaging[0]).__name__} replaces the trunk by an average over both phases, which no "
            "certificate is about; remove one of the two"
        )


def usable_head(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, inputs: Inputs, name: str | None
) -> Head:
    """The head that phase 2 trains.

    Raises:
        MisconfigurationException: several optimizers, no usable linear head, a network that cannot be called, or a head that
            the optimizer does not have.
    """
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"ExpressivityGuard: {len(trainer.optimizers)} optimizers, but phase 2 is one problem, the head's, for one of them; return one "
            "from configure_optimizers, with a parameter group for each part of the network that needs its own settings"
        )
    try:
        head = find_head(network, inputs, name)
    except ValueError as error:
        raise MisconfigurationException(f"ExpressivityGuard: {error}") from error
    except (TypeError, NotImplementedError) as error:
        raise MisconfigurationException(f"ExpressivityGuard: {cannot_call(pl_module, error)}") from error
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    if not head.module.weight.requires_grad or id(head.module.weight) not in optimized:
        raise MisconfigurationException(
            f"head: {head.name!r} is frozen or not in the optimizer, so phase 2 would train nothing; let the optimizer have it"
        )
    return head


def require_rule(
    settings: GuardSettings, loss: TrainingLoss, head: Head, trainer: pl.Trainer, data: TrainingSet
) -> None:
    """Refuse a step rule that has no theorem in this run, before it begins.

    Raises:
        MisconfigurationException: no loss, or none that is smooth, or a sum over the batch; something behind the head; an optimizer
            that unscales its gradients itself.
    """
    rule = f"step_rule={settings.step_rule!r}"
    if loss.loss_fn is None:
        raise MisconfigurationException(
            f"{rule}: the loss is not known; pass loss_fn=nn.CrossEntropyLoss() or whichever it is"
        )
    if not head.last:
        raise MisconfigurationException(
            f"{rule}: something follows the head {head.name!r}, so that the loss of its own outputs is not known; end the network in the "
            "head and put the rest into the loss, or use step_rule='base'"
        )
    if settings.step_rule == "certified" and getattr(loss.loss_fn, "reduction", "mean") == "sum":
        raise MisconfigurationException(
            f"{rule}: {loss.name}(reduction='sum') makes the gradient larger by the number of samples in a batch, while the step that is "
            "proven is for the mean over samples; use reduction='mean' (with a learning rate times the batch size in phase 1), or "
            "step_rule='base'"
        )
    if settings.step_rule == "certified" and loss.smoothness(data, head.module.out_features) is None:
        raise MisconfigurationException(
            f"{rule}: {loss.name} has no Lipschitz gradient that is known, so no step size is proven; use step_rule='base', or "
            "a loss such as nn.HuberLoss()"
        )
    if getattr(trainer.optimizers[0], "_step_supports_amp_scaling", False) and trainer.scaler is not None:
        raise MisconfigurationException(
            f"{rule}: a fused optimizer unscales its gradients itself, so they are not there before its step; use fused=False"
        )


def forget_directions(optimizer: torch.optim.Optimizer) -> None:
    """Clear what an optimizer remembers of all parameters at once: the curvature pairs of LBFGS would move the trunk."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()
