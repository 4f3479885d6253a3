"""The loss of a network on fixed samples and its gradient, for any loss of all outputs together: ``SampleLoss``."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_conv.losses.kind import LossFn, loss_kind
from lightning_conv.networks.evaluation import (
    BatchNormMode,
    Inputs,
    StatelessModule,
    sample_count,
    take,
    undisturbed,
)


class SampleLoss:
    """f(w) = loss(u(w), y) on n samples, at the network's present weights.

    Args:
        network: whose outputs are one tensor; left as it is, bit for bit.
        inputs: n samples.
        targets: y.
        loss_fn: of (outputs, targets), one number; every scale is that of this loss.
        batch_norm: as in ``StatelessModule``; ``"frozen"`` takes the statistics of ``inputs``.
        chunk: samples that go through the network together.
        dtype: that the network is evaluated in; None: its own, float32 at least.

    Cost: the outputs in that type, the loss in float64.
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
    ) -> None:
        with undisturbed(network):
            self._module = StatelessModule(network, dtype=dtype, batch_norm=batch_norm, statistics_of=inputs)
        self._network, self._loss_fn, self._targets = network, loss_fn, targets.to(self._module.device)
        converted, n = self._module.convert(inputs), sample_count(inputs)
        self._parts = [take(converted, slice(s, s + chunk)) for s in range(0, n, chunk)]

    def outputs(self) -> Tensor:
        """u, in the type of the evaluation. One forward pass."""
        with undisturbed(self._network), torch.no_grad():
            return torch.cat([self._outputs({}, part) for part in self._parts])

    def value(self) -> float:
        """f. One forward pass."""
        with undisturbed(self._network), torch.no_grad():
            return float(self._loss(torch.cat([self._outputs({}, part) for part in self._parts])))

    def gradient(
        self, names: Sequence[str], *, at: Mapping[str, Tensor] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """F and its gradient by the parameters called ``names``, in the type of the evaluation.

        Args:
            names: of the parameters.
            at: their values, where they are not the network's own.

        One forward and one backward pass; one forward more if there are several chunks.
        """
        with undisturbed(self._network):
            if len(self._parts) == 1:
                leaves = self._leaves(names, at)
                loss = self._loss(self._outputs(leaves, self._parts[0]))
                return float(loss.detach()), _by_name(
                    names, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), leaves
                )
            with torch.no_grad():
                leaves = self._leaves(names, at)
                outputs = torch.cat([self._outputs(leaves, part) for part in self._parts])
            outputs.requires_grad_()
            loss = self._loss(outputs)
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

    def _loss(self, outputs: Tensor) -> Tensor:
        exact = wide(outputs)
        targets = self._targets.to(exact.device)
        if targets.is_floating_point():
            targets = targets.to(exact.dtype)
        if loss_kind(self._loss_fn).elementwise:
            if targets.numel() != exact.numel():
                raise ValueError(
                    f"targets: shape {tuple(targets.shape)} for outputs of shape {tuple(exact.shape)}; bring them into one shape "
                    "(target_fn=lambda batch: ...)"
                )
            targets = targets.reshape(exact.shape)
        loss_fn = copy.deepcopy(self._loss_fn).to(exact) if isinstance(self._loss_fn, nn.Module) else self._loss_fn
        loss = loss_fn(exact, targets)
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
    """<a, b> over all tensors, each product summed in float64 (float32 on devices without it)."""
    return sum(float((wide(a[name]) * wide(b[name])).sum()) for name in a)


def norm(a: Mapping[str, Tensor]) -> float:
    """|a|_2 over all tensors."""
    return math.sqrt(inner(a, a))


def wide(tensor: Tensor) -> Tensor:
    """In float64; in float32 on devices without it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
