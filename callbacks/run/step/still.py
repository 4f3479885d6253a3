"""``Still``: an optimizer as the copy of a module sees it; ``StepRecord``: the losses whose gradients each optimizer steps with."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.networks.observed.frontier import leaves_of


@dataclass(frozen=True)
class StepLoss:
    """What an optimizer's step minimises: the sum of the losses whose gradients it steps with."""

    losses: tuple[Tensor, ...]
    numbers: tuple[int, ...] = (
        0,
    )  # of the losses, in the order in which the training step hands them to backward passes
    steps: int = 0  # that the optimizer makes in the training step; this is the first one. 0: none was seen

    @property
    def total(self) -> Tensor:
        """The sum of the losses, with its graph."""
        return (
            self.losses[0] if len(self.losses) == 1 else torch.stack([each.reshape(()) for each in self.losses]).sum()
        )


class StepRecord:
    """Follows a training step: which losses it hands to backward passes, and which of their gradients each optimizer steps with.

    No backward pass is made, so the graphs stay. In its place the parameters that it reaches get the gradient zero. Whatever clears
    gradients, such as ``optimizer.zero_grad()``, ``module.zero_grad()`` or ``p.grad = None``, thereby takes back what was recorded.

    Attributes:
        losses: What the step gave to backward passes, in order.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self._steps: list[tuple[int, tuple[int, ...]]] = []  # optimizer, and the numbers of the losses
        self._reached: dict[int, list[int]] = {}  # losses by the id of the parameter that has their gradient
        self._left: dict[int, list[int]] = {}  # the same at the end
        self._records = False

    def __deepcopy__(self, memo: dict[int, Any]) -> StepRecord:
        """Return this record, which a copy of a module may refer to."""
        return self

    @contextmanager
    def recording(self, module: nn.Module) -> Iterator[None]:
        """Record what is done inside; gradients and ``requires_grad`` of the module are then as they were, but for gradients of before.

        Args:
            module: Copy of the run's module.
        """
        parameters = list(module.parameters())
        trained = [each.requires_grad for each in parameters]
        _clear(parameters)
        self._records = True
        try:
            yield
            # It counts for an optimizer whose step comes in a later batch.
            self._left = {id(each): self._reached.get(id(each), []) for each in parameters if each.grad is not None}
        finally:
            self._records = False
            _clear(parameters)
            for each, flag in zip(parameters, trained, strict=True):
                each.requires_grad_(flag)

    def begin(self) -> None:
        """Forget the last run of the step."""
        self.losses, self._steps, self._reached, self._left = [], [], {}, {}

    def backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Note a loss whose backward pass is asked for; outside of ``recording`` nothing is done.

        Args:
            loss: The loss, with its graph.
            gradient: Weights of its entries.
            retain_graph: Of ``Tensor.backward``.
            create_graph: Of ``Tensor.backward``.
            inputs: Parameters that alone get a gradient; None: all.
        """
        if not self._records:
            return
        self.losses.append(loss if gradient is None else (loss * gradient).sum())
        only = None if inputs is None else {id(each) for each in ([inputs] if isinstance(inputs, Tensor) else inputs)}
        for leaf in leaves_of(loss):
            if only is not None and id(leaf) not in only:
                continue
            if leaf.grad is None:  # cleared since the last one
                self._reached[id(leaf)] = []
                leaf.grad = torch.zeros_like(leaf)
            self._reached[id(leaf)].append(len(self.losses) - 1)

    def step(self, number: int, parameters: Sequence[Tensor]) -> None:
        """Note that an optimizer steps with the gradients that its parameters have now.

        Args:
            number: Its place among the optimizers.
            parameters: Its parameters.
        """
        if self._records:
            reached = {id(each): self._reached.get(id(each), []) for each in parameters if each.grad is not None}
            self._steps.append((number, _numbers(reached, parameters)))

    def loss_of(self, number: int, parameters: Sequence[Tensor]) -> StepLoss | None:
        """Return what the first step of an optimizer minimises; where it made none, what its gradients are of in the end.

        Args:
            number: Its place among the optimizers.
            parameters: Its parameters.

        Returns:
            The losses; None: no gradient of any loss reaches its parameters.
        """
        steps = [losses for stepped, losses in self._steps if stepped == number and losses]
        losses = steps[0] if steps else _numbers(self._left, parameters)
        return self.sum_of(losses, len(steps)) if losses else None

    def sum_of(self, numbers: Sequence[int], steps: int = 0) -> StepLoss | None:
        """Return the sum of some of the losses; None: there are not as many.

        Args:
            numbers: Their places.
            steps: Steps that the optimizer makes with it.
        """
        if not numbers or max(numbers) >= len(self.losses):
            return None
        return StepLoss(tuple(self.losses[each] for each in numbers), tuple(numbers), steps)


def _numbers(reached: Mapping[int, Sequence[int]], parameters: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(sorted({number for each in parameters for number in reached.get(id(each), [])}))


def _clear(parameters: Sequence[Tensor]) -> None:
    for each in parameters:
        each.grad = None


class Still(Optimizer):
    """The settings of an optimizer or of a scheduler, to be read; its steps do nothing. It is an optimizer to whoever asks.

    Args:
        record: Where its steps are noted; None: nowhere, as for a scheduler.
        number: Its place among the optimizers.
    """

    def __init__(self, record: StepRecord | None = None, number: int = 0) -> None:
        self._record, self._number = record, number
        self._together: Sequence[Still] = (self,)

    def read(self, of: Any, memo: Mapping[int, Any], together: Sequence[Still]) -> None:
        """Take over the settings.

        Args:
            of: Optimizer or scheduler of the run.
            memo: Copies of the parameters by the ``id`` of their originals.
            together: All optimizers of the copy.
        """
        groups = getattr(of, "param_groups", getattr(getattr(of, "optimizer", None), "param_groups", []))
        own = [[memo[id(each)] for each in group["params"] if id(each) in memo] for group in groups]
        copied = [copy.copy(group) | {"params": params} for group, params in zip(groups, own, strict=True)]
        defaults = dict(getattr(of, "defaults", {}))
        # As if it had been loaded: an empty list of parameters, as a scheduler has, is no error then.
        self.__setstate__({"param_groups": copied, "defaults": defaults, "state": defaultdict(dict)})
        self._together = together

    def __deepcopy__(self, memo: dict[int, Any]) -> Still:
        """Return this optimizer, whose parameters are those of the one copy."""
        return self

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters of its groups."""
        return [each for group in self.param_groups for each in group["params"]]

    @property
    def optimizer(self) -> Still:
        """Itself, where one of Lightning's optimizers has the one inside."""
        return self

    def get_last_lr(self) -> list[float]:
        """Return the learning rates of the groups."""
        return [float(group["lr"]) for group in self.param_groups]

    def step(self, closure: Callable[[], Any] | None = None, *_: Any, **__: Any) -> Any:
        """Call the closure, which computes a loss, note the step, and change nothing."""
        made = closure() if callable(closure) else None  # a scheduler may be given a metric
        if self._record is not None:
            self._record.step(self._number, self.parameters)
        return made

    def zero_grad(self, *_: Any, **__: Any) -> None:
        """Clear what backward passes have left on the parameters of the copy."""
        _clear(self.parameters)

    @contextmanager
    def toggle_model(self, *_: Any, **__: Any) -> Iterator[None]:
        """Switch off the gradients of all parameters that belong to other optimizers only."""
        own = {id(each) for each in self.parameters}
        others = [each for one in self._together for each in one.parameters if id(each) not in own]
        switched = [each for each in others if each.requires_grad]
        for each in switched:
            each.requires_grad_(False)
        try:
            yield
        finally:
            for each in switched:
                each.requires_grad_()
