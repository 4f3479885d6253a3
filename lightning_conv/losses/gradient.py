"""``SampleLoss``: the loss of a network on fixed samples and its gradient, for any loss of all outputs together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_conv.losses.kind import LossFn, loss_kind
from lightning_conv.networks.batch_norm import BatchStatistics
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.undisturbed import undisturbed


class SampleLoss:
    """Loss f(w) = loss(u(w), y) of a network on n samples, at the network's current weights or at given ones.

    The outputs are computed in the type of the evaluation, the loss in float64.

    Args:
        network: a module whose output is one tensor; it is not changed, bit for bit.
        inputs: inputs of the n samples.
        targets: targets y of the n samples.
        loss_fn: a function of (outputs, targets) that returns one number; all results have the scale of this loss.
        batch_norm: mode of BatchNorm layers, see ``StatelessModule``; ``"frozen"`` uses the statistics of ``inputs``.
        chunk: samples that go through the network together.
        dtype: type in which the network is evaluated; None: its own, float32 at least.
        statistics: those of ``inputs`` at the present weights, where they are known, for ``"frozen"``; None: a forward finds them.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Inputs,
        targets: Tensor,
        loss_fn: LossFn,
        *,
        batch_norm: BatchNormMode = "eval",
        chunk: int = 128,
        dtype: torch.dtype | None = None,
        statistics: BatchStatistics | None = None,
    ) -> None:
        with undisturbed(network):
            of = inputs if statistics is None else statistics
            self._module = StatelessModule(network, dtype=dtype, batch_norm=batch_norm, statistics_of=of)
        self._network, self._loss, self._targets = network, loss_kind(loss_fn), targets.to(self._module.device)
        converted, n = self._module.convert(inputs), sample_count(inputs)
        self._parts = [take(converted, slice(s, s + chunk)) for s in range(0, n, chunk)]

    def outputs(self) -> Tensor:
        """Return u in the type of the evaluation: one forward pass."""
        with undisturbed(self._network), torch.no_grad():
            return torch.cat([self._outputs({}, part) for part in self._parts])

    def of_outputs(self, outputs: Tensor) -> float:
        """Return f at given outputs.

        Args:
            outputs: u of all samples, in the shape that the network gives.
        """
        with torch.no_grad():
            return float(self._value(outputs))

    def value(self, *, at: Mapping[str, Tensor] | None = None) -> float:
        """Return f: one forward pass.

        Args:
            at: values of some of the parameters by name; the others, or with None all of them, are the network's own.
        """
        own = self._module.parameters
        with undisturbed(self._network), torch.no_grad():
            given = {name: value.to(own[name]) for name, value in (at or {}).items()}
            return float(self._value(torch.cat([self._outputs(given, part) for part in self._parts])))

    def gradient(
        self, names: Sequence[str], *, at: Mapping[str, Tensor] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """Return f and its gradient with respect to some of the parameters, in the type of the evaluation.

        Args:
            names: names of these parameters.
            at: their values; None: the network's own.

        Returns:
            f, and the gradient by parameter name.

        Cost: one forward and one backward pass; with several chunks one forward pass more.
        """
        with undisturbed(self._network):
            if len(self._parts) == 1:
                leaves = self._leaves(names, at)
                loss = self._value(self._outputs(leaves, self._parts[0]))
                return float(loss.detach()), _by_name(
                    names, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), leaves
                )
            with torch.no_grad():
                leaves = self._leaves(names, at)
                outputs = torch.cat([self._outputs(leaves, part) for part in self._parts])
            outputs.requires_grad_()
            loss = self._value(outputs)
            (cotangent,) = torch.autograd.grad(loss, outputs)
            total: dict[str, Tensor] = {}
            start = 0
            for part in self._parts:
                leaves = self._leaves(names, at)
                own = self._outputs(leaves, part)
                found = torch.autograd.grad(
                    own, list(leaves.values()), cotangent[start : start + len(own)], allow_unused=True
                )
                start += len(own)
                for name, gradient in _by_name(names, found, leaves).items():
                    total[name] = total[name] + gradient if name in total else gradient
            return float(loss.detach()), total

    def _leaves(self, names: Sequence[str], at: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        own = self._module.parameters
        given = own if at is None else {name: at[name].to(own[name]) for name in names}
        return {name: given[name].detach().requires_grad_() for name in names}

    def _outputs(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        result = self._module.call(parameters, inputs)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"model: returned {type(result).__name__}, need one tensor; pass a forward_fn that returns it"
            )
        return result

    def _value(self, outputs: Tensor) -> Tensor:
        loss = self._loss.evaluate(wide(outputs), self._targets)
        if loss.ndim:
            raise ValueError(
                f"loss_fn: returned shape {tuple(loss.shape)}, need one number; use reduction='mean' or 'sum'"
            )
        return loss


def _by_name(
    names: Sequence[str], gradients: Sequence[Tensor | None], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    pairs = zip(names, gradients, strict=True)
    return {name: torch.zeros_like(leaves[name]) if g is None else g.detach() for name, g in pairs}


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return <a, b> over all tensors; each product is summed in float64 (float32 on devices without it)."""
    return sum(float((wide(a[name]) * wide(b[name])).sum()) for name in a)


def norm(a: Mapping[str, Tensor]) -> float:
    """Return |a|_2 over all tensors."""
    return math.sqrt(inner(a, a))


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64; in float32 on devices without it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
