"""``CallWatch``: which modules a piece of code calls, with what, and what they return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_conv.networks.observed.leaves import Place, tensors_in


@dataclass(frozen=True)
class Result:
    """A floating tensor with a graph that a call has returned."""

    place: Place  # in what the call returned
    tensor: Tensor
    node: Node  # of the graph when the call returned it: what works in place afterwards changes ``tensor.grad_fn``
    number: int  # of the node's outputs


@dataclass
class Call:
    """A call of a module."""

    name: str  # dotted name of the module; empty: the outermost one
    number: int  # of the module's calls, from 0
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    within: list[Call] = field(default_factory=list)  # the calls of other modules that it made, in order
    output: Any = None
    results: list[Result] = field(default_factory=list)
    draws: int = 0  # random tensors that were drawn inside it

    @property
    def all(self) -> Iterator[Call]:
        """This call, and all that were made inside it."""
        yield self
        for each in self.within:
            yield from each.all

    @property
    def trains(self) -> bool:
        """Whether anything in the module has a gradient."""
        return any(each.requires_grad for each in self.module.parameters())


class CallWatch:
    """Records the calls that are made while ``watching``, as trees.

    Args:
        drawn: Random tensors that were drawn so far; what is added during a call was drawn by it.

    Attributes:
        outermost: The calls that no other call has made, in order.
    """

    def __init__(self, drawn: Sequence[Tensor] = ()) -> None:
        self._drawn = drawn
        self.outermost: list[Call] = []
        self._open: list[Call] = []
        self._counts: dict[str, int] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[CallWatch]:
        """Record the calls of a model and of all modules in it, but for scripted ones.

        Args:
            model: Any module; its hooks are removed again.

        Yields:
            This object.
        """
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                    continue
                hooks.callback(module.register_forward_pre_hook(self._entering(name), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._left, with_kwargs=True).remove)
            yield self

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            number = self._counts.get(name, 0)
            self._counts[name] = number + 1
            call = Call(name, number, module, args, kwargs, draws=-len(self._drawn))
            (self._open[-1].within if self._open else self.outermost).append(call)
            self._open.append(call)

        return enter

    def _left(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        while self._open and self._open[-1].module is not module:  # ended by an error that the code has caught
            self._open.pop()
        if not self._open:
            return
        call = self._open.pop()
        call.output = output
        call.draws += len(self._drawn)
        call.results = [
            Result(place, tensor, tensor.grad_fn, tensor.output_nr)
            for place, tensor in tensors_in(output)
            if tensor.is_floating_point() and tensor.grad_fn is not None
        ]
