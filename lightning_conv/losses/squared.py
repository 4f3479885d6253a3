"""``half_sum_of_squares``: the loss of the papers, F = sum_i (1/2) |u_i - y_i|^2, sample by sample, and its gradient.

A sum over the samples is differentiated block by block, in a single pass. ``SampleLoss`` takes any loss of all outputs
together; it needs all outputs before the first block can be differentiated, which costs one forward pass more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.undisturbed import undisturbed

BLOCK = 256
"""Number of samples that are passed through the network at once."""


@dataclass(frozen=True)
class HalfSumOfSquares:
    """Loss F = sum_i F_i with F_i = (1/2) |u_i - y_i|^2 (no 1/n), and its gradient with respect to the trainable parameters."""

    per_sample: Tensor  # F_i, (n,), float64
    gradient: Mapping[str, Tensor]  # by parameter name; empty if it was not asked for

    @property
    def loss(self) -> float:
        """Loss F."""
        return float(self.per_sample.sum())

    @property
    def largest(self) -> float:
        """Largest loss of a sample, max_i F_i."""
        return float(self.per_sample.max())

    @property
    def squared_gradient(self) -> float:
        """Squared norm of the gradient over all parameters."""
        return sum(float(part.double().square().sum()) for part in self.gradient.values())

    def along(self, step: Mapping[str, Tensor]) -> float:
        """Return <grad F, step> for a step given by parameter name; parameters that are missing in it did not move."""
        return sum(
            float((part.double() * step[name].double()).sum()) for name, part in self.gradient.items() if name in step
        )


def half_sum_of_squares(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    *,
    gradient: bool = True,
    parameters: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    block: int = BLOCK,
) -> HalfSumOfSquares:
    """Compute the loss of Du et al. and Allen-Zhu et al. of a module on n samples.

    The module runs in eval mode and is left as it was.

    Args:
        model: any module.
        inputs: inputs of the n samples.
        targets: y in the shape of the outputs; (n,) for one output.
        gradient: whether to compute the gradient of F as well.
        parameters: values, by name, that replace the module's own.
        dtype: floating type to compute in; None: the module's.
        block: number of samples that are passed through the network at once.

    Raises:
        ValueError: the targets do not have the shape of the outputs.

    Cost: one forward and one backward pass over the samples.
    """
    n = sample_count(inputs)
    with undisturbed(model):
        module = StatelessModule(model, dtype=dtype)
        values = {name: module.parameters[name] for name in module.parameters}
        values.update(
            {name: value.detach().to(module.device, module.dtype) for name, value in (parameters or {}).items()}
        )
        moving = {name: values[name].detach().requires_grad_(gradient) for name in module.trainable}
        total = {name: torch.zeros_like(value) for name, value in moving.items()} if gradient else {}
        per_sample = []
        for start in range(0, n, block):
            part = module.convert(take(inputs, slice(start, start + block)))
            with torch.set_grad_enabled(gradient):
                outputs = module.outputs({**values, **moving}, part)
                wanted = targets[start : start + block].to(module.device, module.dtype)
                if wanted.reshape(len(wanted), -1).shape != outputs.shape:
                    count = outputs.shape[1]
                    raise ValueError(f"targets: shape {tuple(targets.shape)}; need (n, {count}), one number per output")
                errors = (outputs - wanted.reshape(outputs.shape)).square().sum(1) / 2
            per_sample.append(errors.detach().double())
            if gradient:
                parts = torch.autograd.grad(errors.sum(), list(moving.values()), allow_unused=True)
                for name, found in zip(moving, parts, strict=True):
                    if found is not None:
                        total[name] += found
    return HalfSumOfSquares(torch.cat(per_sample), total)
