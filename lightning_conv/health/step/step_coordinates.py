"""``flat_sizes``: the step sizes D of an optimizer for all weights of an operator, in its order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_conv.arguments import require_type
from lightning_conv.health.wording import listed
from lightning_conv.kernels.operator import NTKOperator


def flat_sizes(operator: NTKOperator, sizes: Mapping[str, Tensor]) -> Tensor:
    """Return D as one vector, (P,), in float64 on the operator's device; weights that are left out have the size 0.

    Args:
        operator: J, with ``outputs="full"``.
        sizes: D by name of the weights, each of the weight's shape or a number.

    Raises:
        TypeError: The operator is none, or the sizes are no tensors by name.
        ValueError: ``outputs`` of the operator is another one; no weight has a size; a size is of another shape, negative, or not finite.

    Cost: the sizes are read once.
    """
    require_type("operator", operator, NTKOperator, "NTKOperator(model, inputs)")
    if operator.outputs != "full":
        kind = "cotangents=" if operator.outputs == "cotangents" else f"outputs={operator.outputs!r}"
        raise ValueError(f'operator: it has {kind}; need outputs="full", as NTKOperator(model, inputs) has')
    require_type("sizes", sizes, Mapping, "step sizes by the name of the weight, such as StepSizes.scales")
    weights = operator.shapes
    if not set(weights) & set(sizes):
        raise ValueError(
            f"sizes: {listed(sorted(sizes)) or 'nothing'}; none of them is a weight of the operator ({listed(sorted(weights))})"
        )
    return torch.cat([_flat(name, sizes.get(name), shape, operator) for name, shape in weights.items()])


def _flat(name: str, size: Tensor | None, shape: torch.Size, operator: NTKOperator) -> Tensor:
    if size is None:
        return torch.zeros(shape.numel(), dtype=torch.float64, device=operator.device)
    require_type(f"sizes[{name!r}]", size, Tensor, f"a tensor of the shape {tuple(shape)}, or of one number")
    if size.numel() != 1 and size.shape != shape:
        raise ValueError(
            f"sizes[{name!r}]: shape {tuple(size.shape)}; need that of the weight, {tuple(shape)}, or one number"
        )
    wide = size.detach().to(operator.device, torch.float64)
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise ValueError(f"sizes[{name!r}]: negative or not finite; need the rate over the preconditioner")
    return wide.expand(shape).reshape(-1) if wide.shape == shape else wide.reshape(()).expand(shape.numel())
