"""``next_update``: what any optimizer makes of a gradient now, found by a copy of it that takes the step."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_conv.arguments import require_type
from lightning_conv.health.step.optimizer_rules import UnknownStepError
from lightning_conv.health.wording import listed
from lightning_conv.networks.copying import with_own_functions
from lightning_conv.networks.equal_numbers import equal_numbers
from lightning_conv.networks.observed.leaves import tensors_in

HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")

FAILS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, AssertionError, OSError)
"""Errors by which copying an optimizer or its step may fail, as that of one that asks for a closure."""


def next_update(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    r"""Return the update u that the optimizer would make of a gradient now: its next step is :math:`w \leftarrow w + u`.

    A deep copy of the optimizer, with its state, its settings and attributes of its own, steps on copies of the weights. So it is the
    step that the optimizer takes, whichever it is: with its momentum, its weight decay, and what it adds to its preconditioner first. The
    optimizer and the weights stay what they are, bit for bit. An optimizer of torch reaches nothing else. Of any other one the weights
    and the tensors of the state are looked at afterwards; had its step changed them behind the copy, they would be put back.

    Random numbers that the step draws move the generators of the process: put them back around this call.

    Args:
        optimizer: Any optimizer that steps without a closure.
        parameters: The weights whose update is asked for, by name. Others of the optimizer are left out, as weights without a gradient are.
        gradients: Their gradients by name, in their shapes.

    Returns:
        u by name, of the weights that the optimizer has, in their type: what rounding in it leaves of the step.

    Raises:
        TypeError: The optimizer is none, weights or gradients do not come by name, or one of them is no tensor.
        ValueError: A weight of the optimizer has no gradient, or one of another shape.
        UnknownStepError: The optimizer has none of these weights, has step hooks or a step that was replaced, cannot be copied, or its copy
            cannot step, as one that needs a closure.

    Cost: copies of the weights and of the optimizer's state, and a step; of an optimizer that is not torch's another copy of both.
    """
    require_type("optimizer", optimizer, Optimizer, "an optimizer of these weights, such as torch.optim.SGD(...)")
    require_type("parameters", parameters, Mapping, "weights by name, such as dict(model.named_parameters())")
    require_type("gradients", gradients, Mapping, "gradients by the names of parameters=")
    for key, each in parameters.items():
        require_type(f"parameters[{key!r}]", each, Tensor, "a weight of the optimizer")
    name = type(optimizer).__name__
    if why := _own_steps(optimizer):
        raise UnknownStepError(f"{name} {why}")
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    chosen = {key: each for key, each in parameters.items() if id(each) in held and each.requires_grad}
    if not chosen:
        raise UnknownStepError(f"{name} trains none of these weights")
    _require_gradients(chosen, gradients)
    copies = {key: nn.Parameter(each.detach().clone()) for key, each in chosen.items()}
    for key, each in copies.items():
        each.grad = gradients[key].detach().to(each, copy=True)
    before = {key: each.detach().clone() for key, each in copies.items()}
    kept = [] if type(optimizer).__module__.startswith("torch.optim") else list(_numbers_of(optimizer))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            _copied(optimizer, {id(chosen[key]): each for key, each in copies.items()}).step()
    except FAILS as error:
        raise UnknownStepError(f"a copy of {name} takes no step ({type(error).__name__}: {error})") from error
    finally:
        changed = [_put_back(*each) for each in kept]
    if any(changed):
        raise UnknownStepError(f"the step of a copy of {name} reaches into the run; what it changed was put back")
    return {key: each.detach() - before[key] for key, each in copies.items()}


def _require_gradients(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Refuse gradients that are not those of the weights."""
    missing = [key for key in weights if key not in gradients]
    if missing:
        raise ValueError(
            f"gradients: none of {listed([repr(key) for key in missing])}; pass one for each weight, or leave these out of parameters="
        )
    for key, each in weights.items():
        given = gradients[key]
        require_type(f"gradients[{key!r}]", given, Tensor, f"a tensor of the shape {tuple(each.shape)}")
        if given.shape != each.shape:
            raise ValueError(
                f"gradients[{key!r}]: shape {tuple(given.shape)}; need that of the weight, {tuple(each.shape)}"
            )


def _own_steps(optimizer: Optimizer) -> str:
    """Return why a step is not that of the optimizer's class alone; empty if it is."""
    hooks = [_global_optimizer_pre_hooks, _global_optimizer_post_hooks, *(vars(optimizer).get(each) for each in HOOKS)]
    if any(hooks):
        return "has step hooks"
    step = vars(optimizer).get("step")
    # A scheduler of torch counts the steps in this way.
    counted = (
        getattr(step, "_wrapped_by_lr_sched", False) and getattr(step, "__wrapped__", None) is type(optimizer).step
    )
    return "" if step is None or counted else "has a step that was replaced"


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Any:
    """Return a copy that trains copies of some weights; its own way to be copied would lose attributes of a subclass."""
    kind: Any = type(optimizer)
    made = object.__new__(kind)
    groups: list[dict[str, Any]] = []
    state: dict[Any, Any] = defaultdict(dict)
    known = set(memo)
    memo |= {id(optimizer): made, id(optimizer.param_groups): groups, id(optimizer.state): state}
    for group in optimizer.param_groups:
        own = [memo[id(each)] for each in group["params"] if id(each) in known]
        if own:
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append(_deep(settings, memo) | {"params": own})
    for key, value in optimizer.state.items():
        if not isinstance(key, Tensor):
            state[key] = _deep(value, memo)
        elif id(key) in known:
            state[memo[id(key)]] = _deep(value, memo)
    left_out = {"param_groups", "state", "step", *HOOKS}
    rest = {key: value for key, value in vars(optimizer).items() if key not in left_out}
    vars(made).update(_deep(rest, memo), param_groups=groups, state=state, **{each: OrderedDict() for each in HOOKS})
    return made


def _deep(value: Any, memo: dict[int, Any]) -> Any:
    return with_own_functions(copy.deepcopy(value, memo), memo)


def _numbers_of(optimizer: Optimizer) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield the weights and the tensors of the state, each with its version and a copy."""
    weights = [each for group in optimizer.param_groups for each in group["params"]]
    gradients = [each.grad for each in weights if each.grad is not None]
    for each in (*weights, *gradients, *(tensor for _, tensor in tensors_in(list(optimizer.state.values())))):
        yield each, each._version, each.detach().clone()


def _put_back(tensor: Tensor, version: int, before: Tensor) -> bool:
    """Put the numbers back, and return whether they may have changed."""
    if tensor._version == version and equal_numbers(
        tensor.detach(), before
    ):  # writes through ``.data`` raise no version
        return False
    tensor.data.copy_(before)
    return True
