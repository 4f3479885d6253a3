"""``find_outputs``: the outputs of modules that a loss is a function of, from its graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.autograd.graph import Node

from lightning_conv.networks.observed.calls import Call, Result
from lightning_conv.networks.observed.leaves import Place

Key: TypeAlias = tuple[str, int, Place]


@dataclass(frozen=True)
class Output:
    """A tensor that a call has returned and that the loss depends on directly, not only through later ones."""

    call: Call
    result: Result

    @property
    def key(self) -> Key:
        """Which call of which module it is, and where in its result: the same in every run of the code."""
        return self.call.name, self.call.number, self.result.place


@dataclass(frozen=True)
class Outputs:
    """What a loss depends on directly."""

    found: tuple[Output, ...]
    beside: tuple[Tensor, ...]  # leaves of the graph, such as parameters, that it depends on beside them


def find_outputs(loss: Tensor, calls: Sequence[Call], has_samples: Callable[[Output], bool]) -> Outputs:
    r"""Find the outputs u with loss = phi(u): those of outermost calls that its graph reaches without passing another one.

    The graph is followed from the loss back, and no further than to a tensor that an outermost call has returned and that has the samples
    as an axis. Leaves of the graph that are reached in another way are what the loss depends on beside u: a penalty on the weights, say. A
    call none of whose tensors was reached is then opened: the calls inside it are taken in its place. So the outputs are found in a module
    that computes its loss itself, and in one whose ``forward`` was called by its name.

    Args:
        loss: A number with its graph.
        calls: The outermost calls, in order, of which only those of modules with a gradient count.
        has_samples: Whether the tensor of an output has the samples as an axis.

    Cost: one walk over the graph per level that is opened.
    """
    opened = [call for call in calls if call.trains]
    while True:
        outputs = [Output(call, result) for call in opened for result in call.results]
        made = {(each.result.node, each.result.number): each for each in outputs if has_samples(each)}
        reached, beside = _walk(loss, made)
        found = [made[each] for each in made if each in reached]
        used = {id(each.call) for each in found}
        inside = [
            [call] if id(call) in used else [each for each in call.within if each.trains] or [call] for call in opened
        ]
        further = [each for group in inside for each in group]
        if not beside or [id(each) for each in further] == [id(each) for each in opened]:
            return Outputs(tuple(found), tuple(beside))
        opened = further


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the leaves of a graph: the parameters that a backward pass would reach.

    Args:
        loss: A tensor with its graph.
    """
    return _walk(loss, frozenset())[1]


def _walk(loss: Tensor, stops: Container[tuple[Node, int]]) -> tuple[set[tuple[Node, int]], list[Tensor]]:
    """Return which of the stops the graph reaches first, and the leaves that it reaches beside them."""
    reached: set[tuple[Node, int]] = set()
    beside: dict[int, Tensor] = {}
    seen: set[tuple[Node, int]] = set()
    waiting = [] if loss.grad_fn is None else [(loss.grad_fn, loss.output_nr)]
    passed: set[Node] = set()
    while waiting:
        edge = waiting.pop()
        if edge in seen:
            continue
        seen.add(edge)
        node = edge[0]
        if edge in stops:
            reached.add(edge)
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            beside[id(leaf)] = leaf
        if node not in passed:
            passed.add(node)
            waiting += [(before, number) for before, number in node.next_functions if before is not None]
    return reached, list(beside.values())
