"""``CheckedRecorder``: compares the rule of every use of a parameter with the gradient that autograd brings, one use after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.kernels.reading.rule_check import fault_of
from lightning_conv.kernels.reading.sample_axis import SampleAxis, close
from lightning_conv.kernels.reading.sites import Site, Use, layer_of
from lightning_conv.kernels.rules import EmbeddingRule
from lightning_conv.kernels.sharded.module import ShardedModule, ShardedRecorder
from lightning_conv.networks.sharded import whole

WRONG = "its layer rule does not give autograd's gradient"


class CheckedRecorder(ShardedRecorder):
    """A recorder that sees the gradient of each use of a parameter in a backward pass, and lets none of them be kept.

    Args:
        module: the network.
        tracked: see ``ShardedRecorder``.

    Attributes:
        faults: why the rule of a parameter may not be used, by name.
        arrived: the parameters of which a gradient has come.
    """

    def __init__(self, module: ShardedModule, tracked: Mapping[str, Tensor]) -> None:
        super().__init__(module, tracked)
        self.faults: dict[str, str] = {}
        self.arrived: set[str] = set()
        self._uses: list[tuple[str, Tensor, list[int]]] = []

    def compare(
        self,
        outputs: Tensor,
        mixture: Tensor,
        gradients: Sequence[Tensor],
        axes: Mapping[int, SampleAxis],
        samples: int,
        tolerance: float,
    ) -> None:
        """Compare the rules of all uses with autograd, in one backward pass, in which each gradient is dropped once it is compared.

        Args:
            outputs: those of the forward that was recorded; their graph ends with this.
            mixture: a combination of them, (n, C).
            gradients: that of the mixture by the output of each call.
            axes: where the samples of each call are; others are not compared.
            samples: their number.
            tolerance: largest relative difference.
        """

        def look(name: str, index: int, gradient: Tensor) -> None:
            self.arrived.add(name)
            whole_gradient = whole(gradient)  # by all processes, whatever they find
            if index in axes:
                fault = _fault(name, Use(index, axes[index]), self.calls, gradients, samples, whole_gradient, tolerance)
                if fault is not None:
                    self.faults[name] = fault

        self._look = look
        tokens = [token for _, token, _ in self._uses]
        if tokens and outputs.requires_grad:
            torch.autograd.grad(outputs, tokens, mixture, allow_unused=True)

    def hidden(self, outputs: Tensor) -> set[str]:
        """Return the parameters that the graph of the outputs reaches in another way than by a recorded use.

        Args:
            outputs: those of the forward that was recorded.
        """
        pairs = ((node, getattr(below, "variable", None)) for node, below in _edges(outputs))
        found = {self._names.get(id(each)) for node, each in pairs if "_Seen" not in type(node).__name__}
        return {name for name in found if name in self._wanted}

    def _record(self, func: Any, rule: Any, arguments: dict[str, Any], names: dict[str, str]) -> Tensor:
        seen: dict[str, Tensor] = {}
        index: list[int] = []
        with torch._C.DisableTorchFunction():  # this is no part of the network
            for slot, name in names.items():
                if name not in seen:  # a parameter may be in two slots
                    token = torch.zeros((), requires_grad=True, device=arguments[slot].device)
                    self._uses.append((name, token, index))
                    seen[name] = _Seen.apply(arguments[slot], token, self._arrive(name, index))
        output = super()._record(func, rule, {**arguments, **{slot: seen[name] for slot, name in names.items()}}, names)
        index.append(len(self.calls) - 1)
        return output

    def _arrive(self, name: str, index: list[int]) -> Callable[[Tensor], None]:
        return lambda gradient: self._look(name, index[0], gradient)


class _Seen(torch.autograd.Function):
    """The identity; what comes back is looked at, and goes no further."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, token: Tensor, arrive: Callable[[Tensor], None]) -> Tensor:
        del token  # it is there for a derivative to be asked for
        ctx.arrive = arrive
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.arrive(gradient)
        return None, torch.zeros((), device=gradient.device), None


def _fault(
    name: str,
    use: Use,
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor],
    samples: int,
    truth: Tensor,
    tolerance: float,
) -> str | None:
    """Return why the rule of a use of a parameter may not be used, or None."""
    call = calls[use.call]
    if isinstance(call.rule, EmbeddingRule):  # without a table for each sample
        words = call.rule.tokens(call.arguments).flatten()
        values = gradients[use.call].reshape(-1, truth.shape[-1])
        if len(values) != len(words):
            return WRONG
        found = torch.zeros_like(truth).index_add_(0, words[words >= 0], values[words >= 0])
        return None if close(found, truth, tolerance) else WRONG
    kind = type(call.rule).__name__.removesuffix("Rule").lower()
    site = Site(layer_of(name), name, None, (use,), {name: truth.numel()}, kind)
    return fault_of(site, calls, gradients, samples, {name: truth}, tolerance, samples)


def _edges(outputs: Tensor) -> Iterator[tuple[Any, Any]]:
    """Yield each node of the graph of the outputs with each node below it."""
    waiting: list[Any] = [outputs.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for below, _ in () if node is None else node.next_functions:
            yield node, below
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
