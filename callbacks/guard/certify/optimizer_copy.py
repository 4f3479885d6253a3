"""Try an optimizer on copies of the weights: whether it moves them for another reason than the gradient."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.networks.head_probe import same

STEPS = 8  # of copies with the optimizer's memory: a term may act in some steps only
DEPEND = "depend on the weights: a penalty, or a norm that scales them, so it may minimise something beside the loss"
SIZES = (1.0, 30.0, 1000.0)  # of other weights, in units of the present ones
AGREEMENT = 3e-7  # relative to the weights: an optimizer may compute in float32 inside


class OptimizerCopy:
    """Copies an optimizer and its parameters, without gradients, hooks and schedulers.

    Args:
        optimizer: Optimizer; nothing of it changes.
        parameters: Those of its parameters that are looked at.
        dtype: Type of the copies and of the memory; None: as they are.
        remembers: Whether the copy has the memory of earlier steps.

    Attributes:
        parameters: Their copies.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        *,
        dtype: torch.dtype | None = None,
        remembers: bool = False,
    ) -> None:
        made = {
            id(each): nn.Parameter(_to(each.detach().clone(), dtype), each.requires_grad)
            for g in optimizer.param_groups
            for each in g["params"]
        }
        memo: dict[int, Any] = dict(made)
        # A scheduler replaces ``step`` by a function of the original; what follows the steps is none of the optimizer's.
        own = {name: value for name, value in vars(optimizer).items() if name != "step"}
        memo |= {id(hooks): type(hooks)() for name, hooks in own.items() if name.endswith("_hooks")}
        if not remembers:
            memo[id(optimizer.state)] = defaultdict(dict)
        self._copy = memo[id(optimizer)] = object.__new__(type(optimizer))
        vars(self._copy).update(copy.deepcopy(own, memo))
        if dtype is not None:
            for state in self._copy.state.values():
                state.update({name: _to(each, dtype) for name, each in state.items() if isinstance(each, Tensor)})
        self.parameters = [made[id(each)] for each in parameters]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Make a step from these gradients of the parameters that are looked at.

        Raises:
            Exception: Whatever the optimizer raises.
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        with isolated():
            type(self._copy).step(self._copy)


def _to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def is_of_torch(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer's class is one of torch's, whose terms are among its settings.

    Args:
        optimizer: The optimizer.
    """
    return type(optimizer).__module__.partition(".")[0] == "torch"


def moves_without_gradient(optimizer: Optimizer, parameters: Sequence[Tensor], *, present: bool = True) -> bool:
    """Return whether a copy of an optimizer, with no memory of earlier steps, moves copies of some parameters without a gradient.

    Args:
        optimizer: Optimizer; nothing of it changes.
        parameters: Parameters of it.
        present: Whether the gradients are zero; False: there are none.

    Raises:
        Exception: Whatever its step raises then.
    """
    twin = OptimizerCopy(optimizer, parameters)
    before = [each.detach().clone() for each in twin.parameters]
    twin.step([torch.zeros_like(each) if present else None for each in twin.parameters])
    return not all(map(same, before, twin.parameters))


@torch.no_grad()
def steps_depend_on_weights(
    optimizer: Optimizer, parameters: Sequence[Tensor], seed: int = 0, sizes: Sequence[float] = SIZES
) -> bool:
    r"""Return whether two copies of an optimizer with its memory, at weights w and w + d, move differently on the same gradients.

    Without a term in w the step is a function of gradients and memory alone. Gradients are random, of the size of the present ones, and so
    is d, of that size and some larger ones: a norm may be held only far out.

    Args:
        optimizer: Optimizer; nothing of it changes.
        parameters: Parameters of it.
        seed: Seed of the random numbers.
        sizes: Sizes of d, in units of the present weights.

    Raises:
        Exception: Whatever its step raises.

    Cost: two copies in float64 for each size, ``STEPS`` steps each.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, size: float) -> Tensor:
        return size * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    return any(_moves_otherwise(optimizer, parameters, draw, size) for size in sizes)


def _moves_otherwise(
    optimizer: Optimizer, parameters: Sequence[Tensor], draw: Callable[[Tensor, float], Tensor], size: float
) -> bool:
    here, there = (OptimizerCopy(optimizer, parameters, dtype=torch.float64, remembers=True) for _ in range(2))
    shifts = [draw(each, size * _size(each)) for each in parameters]
    for parameter, shift in zip(there.parameters, shifts, strict=True):
        parameter.add_(shift)
    for _ in range(STEPS):
        gradients = [draw(each, 1.0 if each.grad is None else _size(each.grad)) for each in parameters]
        here.step(gradients)
        there.step(gradients)
    return any(
        bool(((b - a - d).abs() > AGREEMENT * (a.abs() + b.abs() + d.abs()).max()).any())
        for a, b, d in zip(here.parameters, there.parameters, shifts, strict=True)
    )


def _size(tensor: Tensor) -> float:
    size = float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0
    return size if 0 < size < float("inf") else 1.0
