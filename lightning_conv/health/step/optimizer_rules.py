"""``step_sizes``: the rate over the preconditioner of every weight, and the update rule, of torch's optimizers as they are now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_conv.arguments import require_type
from lightning_conv.health.step.update_rule import UpdateRule

Group: TypeAlias = Mapping[str, Any]
State: TypeAlias = Mapping[str, Any]


class UnknownStepError(ValueError):
    """The steps of the optimizer are not those of a known rule now; the message says why."""


@dataclass(frozen=True)
class StepSizes:
    """How an optimizer turns gradients into steps now.

    Attributes:
        rules: The update rule of each weight's group, by name.
        scales: Rate over preconditioner of every coordinate of each weight, of its shape or a number.
        decay: What ``weight_decay`` adds to the curvature of each weight, where it is a part of the gradient.
    """

    rules: Mapping[str, UpdateRule]
    scales: Mapping[str, Tensor]
    decay: Mapping[str, float]

    def relative(self, name: str) -> Tensor:
        """Return rate over preconditioner over the limit of the rule: the coordinates in which the limit of the curvature is 1."""
        return self.scales[name] / self.rules[name].limit


def step_sizes(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> StepSizes:
    r"""Read the steps that an optimizer takes now: :math:`D = \mathrm{rate} / P` and the recurrence of its momentum.

    P is 1 for SGD, :math:`\sqrt v + \epsilon` for RMSprop and Adagrad, and :math:`(1 - \beta_1^t) (\sqrt{\hat v} + \epsilon)` for Adam,
    AdamW and NAdam after t steps; it is taken as fixed, though it follows the gradients. Coordinates that no gradient has reached so far
    (v = 0) have the scale 0, so they are left out: their first step is as long as the rate, whatever the curvature is.

    Args:
        optimizer: One of torch's SGD, Adam, AdamW, NAdam, RMSprop, Adagrad.
        parameters: The weights, by name; those that the optimizer does not have, or that no gradient has reached, are left out.

    Raises:
        TypeError: The weights do not come by name.
        UnknownStepError: The optimizer is another one, even a subclass of these; it has not stepped yet and its steps depend on that; it
            ascends; its rate is negative.

    Source: Cohen et al. 2022 (2207.14484), equation 2 and Appendix A.
    """
    require_type("parameters", parameters, Mapping, "weights by name, such as dict(model.named_parameters())")
    read = READERS.get(type(optimizer))
    if read is None:
        raise UnknownStepError(f"the steps of {type(optimizer).__name__} are not known")
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    stepped = any(float(each.get("step", 0)) for each in optimizer.state.values())
    rules, scales, decay = {}, {}, {}
    for name, parameter in parameters.items():
        group = groups.get(id(parameter))
        if group is None or not parameter.requires_grad:
            continue
        if stepped and not float(optimizer.state.get(parameter, {}).get("step", 0)):
            continue  # no gradient has reached it so far, so it does not move
        rate = float(group["lr"])
        if group.get("maximize") or rate < 0:
            raise UnknownStepError(f"{type(optimizer).__name__} ascends")
        with torch.no_grad():
            rules[name], scales[name] = read(group, optimizer.state.get(parameter, {}), parameter)
        decoupled = type(optimizer) is AdamW or group.get("decoupled_weight_decay", False)
        decay[name] = 0.0 if decoupled else float(group.get("weight_decay", 0.0))
    if not rules:
        raise UnknownStepError(f"{type(optimizer).__name__} trains none of these weights")
    return StepSizes(rules, scales, decay)


def momentum_of(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the momentum of the weights, m of ``UpdateRule``, by name; empty: there is none yet.

    Args:
        optimizer: One of those that ``step_sizes`` knows.
        parameters: The weights, by name.
    """
    found = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        buffer = next((state[key] for key in ("exp_avg", "momentum_buffer") if state.get(key) is not None), None)
        if buffer is not None:
            found[name] = buffer.detach()
    return found


def common_rate(optimizer: Optimizer) -> float | None:
    """Return the learning rate if the stability ratio is proportional to it and it is the same for all weights; None: it is not.

    Args:
        optimizer: Any optimizer.
    """
    decays = any(group.get("weight_decay") for group in optimizer.param_groups)
    return only_rate(optimizer) if type(optimizer) is SGD and not decays else None


def only_rate(optimizer: Optimizer) -> float | None:
    """Return the learning rate if all weights have the same one; None: they have not, or the optimizer has no ``lr``.

    Args:
        optimizer: Any optimizer.
    """
    rates = {float(group["lr"]) if "lr" in group else None for group in optimizer.param_groups}
    return rates.pop() if len(rates) == 1 else None


def has_rule(optimizer: Optimizer) -> bool:
    """Return whether the optimizer is of a class whose update rule is known, at least after its first step.

    Args:
        optimizer: Any optimizer.
    """
    return type(optimizer) in READERS


def adapts(optimizer: Optimizer) -> bool:
    """Return whether the optimizer has a known rule with a preconditioner, which is not known before its first step.

    Args:
        optimizer: Any optimizer.
    """
    return has_rule(optimizer) and type(optimizer) is not SGD


def is_of_torch(optimizer: Optimizer) -> bool:
    """Return whether the optimizer is of a class of ``torch.optim``, whose step writes to its weights and its state only.

    Args:
        optimizer: Any optimizer.
    """
    return type(optimizer).__module__.startswith("torch.optim.")


def largest_rate(optimizer: Optimizer) -> float:
    """Return the largest learning rate of the groups.

    Args:
        optimizer: Any optimizer.
    """
    return max(float(group["lr"]) for group in optimizer.param_groups)


def has_momentum(optimizer: Optimizer) -> bool:
    """Return whether a group has momentum, as all kinds of Adam have.

    Args:
        optimizer: Any optimizer.
    """
    return any(group.get("momentum") or group.get("betas") for group in optimizer.param_groups)


def _sgd(group: Group, state: State, weight: Tensor) -> tuple[UpdateRule, Tensor]:
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    rate = _number(group["lr"])
    if not momentum:
        return UpdateRule(), rate
    if group["nesterov"]:
        return UpdateRule(a=momentum, b=1 - dampening, c=momentum, e=1.0), rate
    return UpdateRule(a=momentum, b=1 - dampening), rate


def _adam(group: Group, state: State, weight: Tensor) -> tuple[UpdateRule, Tensor]:
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    step = _steps(state)
    squares = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    root = (squares / (1 - beta2**step)).sqrt() + group["eps"]
    decay = rate * float(group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0
    return UpdateRule(a=beta1, b=1 - beta1, d=decay), _where_known(squares, rate / ((1 - beta1**step) * root))


def _nadam(group: Group, state: State, weight: Tensor) -> tuple[UpdateRule, Tensor]:
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    step = _steps(state)
    product = float(state["mu_product"])
    now, then = (beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (step, step + 1))
    root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
    decay = rate * float(group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0
    rule = UpdateRule(a=beta1, b=1 - beta1, c=then / (1 - product * then), e=(1 - now) / (1 - product), d=decay)
    return rule, _where_known(state["exp_avg_sq"], rate / root)


def _rmsprop(group: Group, state: State, weight: Tensor) -> tuple[UpdateRule, Tensor]:
    _steps(state)
    squares = state["square_avg"]
    if group["centered"]:
        squares = (squares - state["grad_avg"].square()).clamp(min=0)
    scale = float(group["lr"]) / (squares.sqrt() + group["eps"])
    return UpdateRule(a=float(group["momentum"])), _where_known(state["square_avg"], scale)


def _adagrad(group: Group, state: State, weight: Tensor) -> tuple[UpdateRule, Tensor]:
    step = _steps(state)
    rate = float(group["lr"]) / (1 + (step - 1) * float(group["lr_decay"]))
    return UpdateRule(), _where_known(state["sum"], rate / (state["sum"].sqrt() + group["eps"]))


def _where_known(squares: Tensor, scale: Tensor) -> Tensor:
    """Return the scale, 0 where no gradient has come yet, as in the unused rows of an embedding: the first one sets its own scale."""
    return torch.where(squares > 0, scale, torch.zeros_like(scale))


def _steps(state: State) -> float:
    """Return how many steps were taken.

    Raises:
        UnknownStepError: None was.
    """
    if not float(state.get("step", 0)):
        raise UnknownStepError("its preconditioner is not known before the first step")
    return float(state["step"])


def _number(value: Any) -> Tensor:
    return torch.as_tensor(float(value), dtype=torch.float64)


READERS: Mapping[type[Optimizer], Callable[[Group, State, Tensor], tuple[UpdateRule, Tensor]]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    NAdam: _nadam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}
"""How the state of each optimizer is read. Subclasses are not taken for their parents: they may step in another way."""
