"""Checks that reject the runs that the guard does not support; each message says what to do instead."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_conv.callbacks.guard.certify.optimizer_copy import moves_without_gradient
from lightning_conv.callbacks.guard.settings import StepRule
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.steps import clips_values


def require_supported(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Reject a strategy, averaging or manual optimization that would break the two-phase rule.

    Args:
        trainer: Trainer of the run.
        pl_module: Module that it trains.

    Raises:
        MisconfigurationException: The strategy is neither a single device nor DDP, models or weights are averaged, or the module
            optimizes manually. The message says what to do.
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


def require_rule(step_rule: StepRule, view: GuardView) -> None:
    """Reject, before the run begins, a step rule for which no theorem applies.

    Args:
        step_rule: Requested rule.
        view: Run that is about to train, with its network split into trunk and head.

    Raises:
        MisconfigurationException: The loss is not known, not smooth, or a sum over the batch; something follows the head; the values of
            gradients are clipped; or the optimizer unscales its gradients itself.
    """
    if step_rule == "base":
        return
    rule, loss = f"ExpressivityGuard: step_rule={step_rule!r}", view.loss
    if view.head.rows > 1:
        raise MisconfigurationException(
            f"{rule}: {view.head_name!r} has {view.head.rows} rows of features per sample, and the rule is for one; use step_rule='base'"
        )
    if loss.loss_fn is None:
        raise MisconfigurationException(
            f"{rule}: {loss.found.words}; pass loss_fn=nn.CrossEntropyLoss() or whichever it is"
        )
    if not view.head.last:
        raise MisconfigurationException(
            f"{rule}: something follows the head {view.head.name!r}, so that the loss of its own outputs is not known; end the network "
            "in the head and put the rest into the loss, or use step_rule='base'"
        )
    if step_rule == "certified" and loss.kind.summed:
        raise MisconfigurationException(
            f"{rule}: {loss.kind.described} makes the gradient larger by the number of samples in a batch, while the step that is "
            "proven is for the mean over samples; use reduction='mean' (with a learning rate times the batch size in phase 1), or "
            "step_rule='base'"
        )
    if step_rule == "certified" and loss.smoothness() is None:
        raise MisconfigurationException(
            f"{rule}: {loss.kind.name} has no Lipschitz gradient that is known, so no step size is proven; use step_rule='base', or "
            "a loss such as nn.HuberLoss()"
        )
    optimizer = view.trainer.optimizers[0]
    if type(optimizer).__module__.partition(".")[0] != "torch":
        with attempted(Exception) as attempt:
            moves_without_gradient(optimizer, view.head_parameters, present=False)
        if attempt.failed:
            raise MisconfigurationException(
                f"{rule}: the rule moves the head itself and leaves no gradients, and a step of {type(optimizer).__name__} without any "
                f"fails ({attempt.reason}); use step_rule='base', or an optimizer of torch"
            )
    if step_rule == "certified" and clips_values(view.trainer):
        raise MisconfigurationException(
            f"{rule}: the rule takes the gradients away before they are clipped, and torch cannot clip the values of none; use "
            "gradient_clip_algorithm='norm', or no clipping (it does not change the steps of this rule)"
        )
    if getattr(view.trainer.optimizers[0], "_step_supports_amp_scaling", False) and view.trainer.scaler is not None:
        raise MisconfigurationException(
            f"{rule}: a fused optimizer unscales its gradients itself, so they are not there before its step; use fused=False"
        )
