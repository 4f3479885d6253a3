"""Is a step of the run plain gradient descent, w <- w - eta grad L, and with which eta?"""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

OWN_STEPS = ("optimizer_step", "configure_gradient_clipping")
"""Hooks of a LightningModule that may change what a step does."""


class NotPlainError(Exception):
    """The run's step is no plain gradient descent; the message says why."""


class ChangesSteps(pl.Callback):
    """Base of callbacks after which a step is no longer w <- w - eta grad L."""


class PlainDescent:
    """Plain SGD on exactly the parameters that a kernel is over.

    Args:
        network: whose kernel it is.
        parameters: names, in ``network``, that the kernel is over.
    """

    def __init__(self, network: nn.Module, parameters: Iterable[str]) -> None:
        chosen = set(parameters)
        self._network = [(name, parameter, name in chosen) for name, parameter in network.named_parameters()]

    def rate(self, trainer: pl.Trainer, *, clipped: bool = False) -> float:
        """The learning rate that is set now.

        Args:
            trainer: of the run.
            clipped: whether ``ChangesSteps`` callbacks are allowed, which scale the step of this rate.

        Raises:
            NotPlainError: a step is something else than w <- w - eta grad L on the kernel's parameters.
        """
        module = trainer.lightning_module
        if not module.automatic_optimization:
            raise NotPlainError("the module optimizes manually")
        if own := [name for name in OWN_STEPS if is_overridden(name, module)]:
            raise NotPlainError(f"the module has its own {own[0]}")
        if len(trainer.optimizers) != 1:
            raise NotPlainError(f"{len(trainer.optimizers)} optimizers")
        if trainer.gradient_clip_val:
            raise NotPlainError(f"gradients are clipped (gradient_clip_val={trainer.gradient_clip_val})")
        if trainer.accumulate_grad_batches != 1:
            raise NotPlainError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: what is left over at the end of an epoch makes a smaller step"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise NotPlainError("the gradient scaler leaves out steps that overflow")
        if not clipped and (changing := [c for c in trainer.callbacks if isinstance(c, ChangesSteps)]):  # type: ignore[attr-defined]
            raise NotPlainError(f"{type(changing[0]).__name__} scales the gradients")
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise NotPlainError("StochasticWeightAveraging replaces the weights")
        eta = sgd_rate(trainer.optimizers[0])
        self._require_same_parameters(trainer.optimizers[0])
        return eta

    def _require_same_parameters(self, optimizer: Optimizer) -> None:
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter, chosen in self._network:
            trained = parameter.requires_grad and id(parameter) in optimized
            if trained != chosen:
                how = (
                    "is trained but not among those of the kernel"
                    if trained
                    else "belongs to the kernel but is not trained"
                )
                raise NotPlainError(f"the parameter {name} {how}")


def sgd_rate(optimizer: Optimizer) -> float:
    """The one learning rate of plain SGD.

    Raises:
        NotPlainError: another optimizer, momentum, weight decay, ascent, or groups with different rates.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise NotPlainError(f"the optimizer is {type(optimizer).__name__}, not torch.optim.SGD")
    for group in optimizer.param_groups:
        for name in ("momentum", "weight_decay", "nesterov", "maximize"):
            if group.get(name):
                raise NotPlainError(f"SGD with {name}={group[name]}")
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1:
        raise NotPlainError(
            f"groups of parameters with different learning rates ({', '.join(map(str, sorted(rates)))})"
        )
    return rates.pop()
