"""``Recorder``: records the layers of one forward pass, with their inputs and the edges of the autograd graph."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_conv.kernels.rules import UNROLLED, Arguments, LayerRule, rule_of
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.narrowing import coarser
from lightning_conv.networks.sharded import whole


@dataclass
class LayerCall:
    """One call, with a tracked parameter, of a function that has a layer rule."""

    rule: LayerRule
    names: Mapping[str, str]  # parameter by argument: {"weight": "encoder.weight"}
    arguments: Arguments  # by name, tensors detached
    sampled: Mapping[str, Tensor]  # those that have one row per sample
    edge: GradientEdge | None  # where B is read from the graph; None once it is no longer needed
    shape: torch.Size  # of the output


def signature_of(calls: Sequence[LayerCall]) -> tuple[tuple[str, ...], ...]:
    """Return the parameters of each call in order; equal signatures mean the same layers in the same order."""
    return tuple(tuple(call.names.values()) for call in calls)


class Recorder(TorchFunctionMode):
    """Records every call that uses a tracked parameter and has a rule, and notes the parameters with other uses.

    A parameter in ``elsewhere`` has a use that no rule covers (a transposed decoder, a parametrization, a packed
    sequence, any use inside ``torch.vmap``). It belongs to the general engine.

    Args:
        parameters: the tracked tensors by name. The recorder recognises them by identity.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self.calls: list[LayerCall] = []
        self.elsewhere: set[str] = set()
        self.largest = 0  # bytes of the largest result of any function
        self.lowered: torch.dtype | None = None  # coarsest type of a result under autocast

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        rule = rule_of(func)
        if rule is not None:
            arguments = rule.read(args, kwargs)
            names = {slot: name for slot in rule.parameters if (name := self._names.get(id(arguments.get(slot))))}
            if names and rule.holds(arguments) and not _is_transformed():
                return self._record(func, rule, arguments, names)
            if rule.rewrites and not names:
                return rule.call(func, arguments)
        used = self._tracked((args, kwargs))
        if used and _is_composite(func):
            # A function that is written in Python in terms of others: record those.
            with self:
                return _undispatched(func)(*args, **kwargs)
        if used and func in UNROLLED:
            with self:
                unrolled = UNROLLED[func](*args, **kwargs)
            if unrolled is not NotImplemented:
                return unrolled
        result = func(*args, **kwargs)
        if used and _holds_tensor(result):
            self.elsewhere |= used
        if isinstance(result, Tensor):
            self._note(result)
        return result

    def _note(self, result: Tensor) -> None:
        self.largest = max(self.largest, result.numel() * result.element_size())
        if result.element_size() < 4 and result.is_floating_point() and torch.is_autocast_enabled(result.device.type):
            self.lowered = coarser(self.lowered, result.dtype)

    def _record(
        self, func: Callable[..., Any], rule: LayerRule, arguments: dict[str, Any], names: dict[str, str]
    ) -> Tensor:
        self.elsewhere |= self._tracked([value for slot, value in arguments.items() if slot not in names])
        output = rule.call(func, arguments)
        if not output.requires_grad:
            if not torch.is_grad_enabled():
                return output  # no derivative flows through here
            # Nothing below a first layer needs a gradient, so a graph must be started here.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        self._note(output)
        detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        # The edge is kept rather than the tensor, which an in-place activation may change later.
        edge = get_gradient_edge(output)
        self.calls.append(LayerCall(rule, names, detached, rule.sampled(detached, output.detach()), edge, output.shape))
        return output

    def _tracked(self, value: object) -> set[str]:
        """Return the names of the tracked parameters in a nest of arguments."""
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            return set() if name is None else {name}
        if isinstance(value, Mapping):
            value = list(value.values())
        return set().union(*map(self._tracked, value)) if isinstance(value, (list, tuple)) else set()


def record(
    module: StatelessModule, inputs: Inputs, tracked: Mapping[str, Tensor], moved: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Recorder]:
    """Run one forward and record the layers of ``tracked`` parameters; return the outputs (n, C) and the recorder.

    With ``moved`` these take the place of the network's own parameters.
    """
    with (module.recorder or Recorder)(tracked) as recorder:
        outputs = module.outputs(moved or {}, inputs)
    return outputs, recorder


def edges_of(calls: Sequence[LayerCall]) -> list[GradientEdge]:
    """Return the edges of the graph from which B of the calls is read."""
    return [call.edge for call in calls if call.edge is not None]


def layer_gradients(
    outputs: Tensor, cotangent: Tensor, calls: Sequence[LayerCall], *, keep: bool
) -> list[Tensor | None]:
    """Return B, the gradient of sum(cotangent * outputs), for the output of each call.

    It is None for a call that does not enter.
    """
    if not calls or not outputs.requires_grad:
        return [None] * len(calls)
    grad_outputs = cotangent.to(outputs).expand_as(outputs)
    found = torch.autograd.grad(outputs, edges_of(calls), grad_outputs, retain_graph=keep, allow_unused=True)
    return [None if each is None else whole(each) for each in found]


def _is_transformed() -> bool:
    """Return whether the code runs inside ``torch.func.vmap``, ``grad`` or another transform, whose tensors have graphs of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _holds_tensor(result: object) -> bool:
    if isinstance(result, Tensor):
        return True
    return isinstance(result, (list, tuple)) and any(_holds_tensor(value) for value in result)


def _is_composite(func: Callable[..., Any]) -> bool:
    return isinstance(func, types.FunctionType) and func.__module__ == F.__name__


_NO_DISPATCH = {
    name: (lambda *_: False)
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
}


def _undispatched(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same Python function without its own dispatch, so that the functions inside are recorded."""
    assert isinstance(func, types.FunctionType)
    twin = types.FunctionType(
        func.__code__, {**func.__globals__, **_NO_DISPATCH}, func.__name__, func.__defaults__, func.__closure__
    )
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin
