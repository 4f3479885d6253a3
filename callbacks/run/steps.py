"""``describe_steps``: is a step of the run plain gradient descent, w <- w - eta grad L, and with which eta?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.run.callbacks import all_callbacks

OWN_STEPS = ("optimizer_step", "configure_gradient_clipping", "optimizer_zero_grad")
"""Hooks of a LightningModule that may change what a step does, or the gradients that it is made with."""

MAY_CHANGE = ("on_before_optimizer_step",)
"""A hook that comes after the callbacks have seen the gradients, for logging them as a rule."""

NOT_PLAIN = ("momentum", "weight_decay", "nesterov", "maximize")
"""Settings of SGD with which a step is not w <- w - eta grad L."""


class NotPlainError(Exception):
    """The run's step is no plain gradient descent; the message says why."""


class ChangesSteps(pl.Callback):
    """Base of callbacks after which a step is no longer w <- w - eta grad L."""


@dataclass(frozen=True)
class Steps:
    """What the next optimizer step does to some parameters, by the settings of the run."""

    rate: float | None  # eta of w <- w - eta grad L; None: the step is something else
    reason: str = ""  # why the step is something else; empty if it is not

    def required_rate(self) -> float:
        """Return the rate.

        Raises:
            NotPlainError: the step is something else.
        """
        if self.rate is None:
            raise NotPlainError(self.reason)
        return self.rate


@dataclass(frozen=True)
class Parameters:
    """The parameters that a question about steps concerns, by name."""

    trained: Mapping[str, nn.Parameter]  # must all be trained
    fixed: Mapping[str, nn.Parameter] | None = None  # must not be trained; None: all others may be, in whatever way

    @classmethod
    def of(cls, network: nn.Module, names: Iterable[str]) -> Parameters:
        """Return the parameters of a network: those with these names must be trained, and no others."""
        chosen, named = set(names), dict(network.named_parameters())
        return cls(
            {name: value for name, value in named.items() if name in chosen},
            {name: value for name, value in named.items() if name not in chosen},
        )


def describe_steps(
    trainer: pl.Trainer,
    parameters: Parameters,
    *,
    clipped: bool = False,
    accumulated: bool = False,
    compared: bool = False,
) -> Steps:
    """Describe the run's next step on these parameters, by the settings that are in force now.

    Args:
        trainer: of the run.
        parameters: those that the step is about.
        clipped: whether ``ChangesSteps`` callbacks are allowed; they scale the step of the rate that is returned.
        accumulated: whether a step may accumulate the gradients of several batches.
        compared: whether the caller compares what a step does with what it should do, so that an ``on_before_optimizer_step`` of the
            module, which often only logs, is allowed for; where nothing is compared, it may change the gradients.

    Cost: no tensor is read; a few dictionary look-ups per parameter, so it may be called before every optimizer step.
    """
    if why := changed_steps(trainer, clipped=clipped, accumulated=accumulated, compared=compared):
        return Steps(None, why)
    optimizer = trainer.optimizers[0]
    steps = describe_optimizer(optimizer, None if parameters.fixed is not None else parameters.trained.values())
    mismatch = "" if steps.rate is None else _mismatch(optimizer, parameters)
    return Steps(None, mismatch) if mismatch else steps


def changed_steps(
    trainer: pl.Trainer,
    *,
    clipped: bool = False,
    accumulated: bool = False,
    compared: bool = False,
    clips: bool = False,
    watched: bool = False,
) -> str:
    """Return what stands between the optimizer's rule and the gradient of the loss; empty if nothing does.

    Args:
        trainer: of the run.
        clipped: see ``describe_steps``.
        accumulated: see ``describe_steps``.
        compared: see ``describe_steps``.
        clips: whether the caller clips gradients as the trainer does (``clip_as_trainer``).
        watched: whether the caller looks at the weights before a step and after it, whatever it is made of.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return "the module optimizes manually"
    if not watched and (own := _own_steps(module, OWN_STEPS)):
        return f"the module has its own {own[0]}"
    if not (compared or watched) and (own := _own_steps(module, MAY_CHANGE)):
        return f"the module has its own {own[0]}, which may change the gradients"
    if len(trainer.optimizers) != 1:
        return f"{len(trainer.optimizers)} optimizers"
    if watched:
        return ""
    if trainer.gradient_clip_val and not clips:
        return f"gradients are clipped (gradient_clip_val={trainer.gradient_clip_val})"
    if trainer.accumulate_grad_batches != 1 and not accumulated:
        return (
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: the batches that are left over at the end of an epoch make a "
            "smaller step"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "the gradient scaler leaves out steps that overflow"
    for callback in all_callbacks(trainer):
        if isinstance(callback, ChangesSteps) and not clipped:
            return f"{type(callback).__name__} scales the gradients"
        if isinstance(callback, StochasticWeightAveraging):
            return "StochasticWeightAveraging replaces the weights"
        if isinstance(callback, GradientAccumulationScheduler) and accumulated:
            return "GradientAccumulationScheduler changes the steps"
    return ""


def _own_steps(module: pl.LightningModule, names: Sequence[str]) -> list[str]:
    """Return those of some hooks that the module has itself, in a few look-ups, as this is asked before every step."""
    kind, own = type(module), vars(module)
    return [name for name in names if name in own or getattr(kind, name) is not getattr(pl.LightningModule, name)]


def _mismatch(optimizer: Optimizer, parameters: Parameters) -> str:
    """Return which parameter is trained though it should not be, or the other way round; empty if there is none."""
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    alone = parameters.fixed is not None
    for name, parameter in parameters.trained.items():
        if not (parameter.requires_grad and id(parameter) in optimized):
            return f"the parameter {name} {'belongs to the kernel but ' if alone else ''}is not trained"
    for name, parameter in (parameters.fixed or {}).items():
        if parameter.requires_grad and id(parameter) in optimized:
            return f"the parameter {name} is trained but not among those of the kernel"
    return ""


def may_be_plain(optimizers: Iterable[Optimizer]) -> bool:
    """Return whether a step of one of the optimizers may be plain descent, with the settings of now or with others.

    Args:
        optimizers: of the run.
    """
    return any(type(each) is torch.optim.SGD for each in optimizers)


def describe_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter] | None = None) -> Steps:
    """Describe what the optimizer's own rule does, whatever the trainer does around it.

    Args:
        optimizer: of the run.
        parameters: those that count; groups without any of them may do as they like. None: all.
    """
    if not may_be_plain([optimizer]):
        return Steps(None, f"the optimizer is {type(optimizer).__name__}, not torch.optim.SGD")
    groups = optimizer.param_groups if parameters is None else _groups_with(optimizer, parameters)
    for group in groups:
        for name in NOT_PLAIN:
            if group.get(name):
                return Steps(None, f"SGD with {name}={group[name]}")
    rates = {float(group["lr"]) for group in groups}
    if len(rates) == 1:
        return Steps(rates.pop())
    return Steps(None, f"groups of parameters with different learning rates ({', '.join(map(str, sorted(rates)))})")


def clips_values(trainer: pl.Trainer) -> bool:
    """Return whether the trainer clips every entry of a gradient, and not its norm.

    Args:
        trainer: Trainer of the run.
    """
    algorithm = str(trainer.gradient_clip_algorithm or "norm").lower()  # an enum, or what the user wrote
    return trainer.gradient_clip_val is not None and algorithm.endswith("value")


def clip_as_trainer(trainer: pl.Trainer, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients as the trainer's ``gradient_clip_val`` leaves them: as they are, if it is not set.

    Args:
        trainer: Trainer of the run.
        gradients: All gradients that the optimizer steps with, by the name of the weight.
    """
    bound = trainer.gradient_clip_val
    made = {name: each.clone() for name, each in gradients.items()}
    if bound and clips_values(trainer):
        return {name: each.clamp_(-bound, bound) for name, each in made.items()}
    if bound:
        held = [nn.Parameter(torch.empty_like(each)) for each in made.values()]
        for parameter, each in zip(held, made.values(), strict=True):
            parameter.grad = each
        torch.nn.utils.clip_grad_norm_(held, bound)
    return made


def decays(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether the optimizer's weight decay acts on any of these parameters."""
    return any(group.get("weight_decay") for group in _groups_with(optimizer, parameters))


def _groups_with(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the groups that hold any of these parameters."""
    own = {id(parameter) for parameter in parameters}
    return [group for group in optimizer.param_groups if any(id(each) in own for each in group["params"])]
