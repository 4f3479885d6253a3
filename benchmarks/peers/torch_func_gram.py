"""PyTorch's tutorial "Neural Tangent Kernels": ``vmap(jacrev)`` and a contraction over each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from peers.torch_networks import blocked_gram, load


def prepare(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str) -> Callable[[], Tensor]:
    """Return the computation that is timed."""
    model, inputs = load(case, arrays, dtype)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def single(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (one.unsqueeze(0),)).squeeze(0)

    rows = vmap(jacrev(single), (None, 0))

    def jacobian(tile: slice, _: int | None) -> list[Tensor]:
        return [leaf.flatten(2) for leaf in rows(parameters, inputs[tile]).values()]

    def gram() -> Tensor:
        with torch.no_grad():
            return blocked_gram(
                jacobian,
                samples=len(inputs),
                classes=case["classes"],
                parameters=sum(p.numel() for p in parameters.values()),
                outputs=case["outputs"],
                itemsize=inputs.element_size(),
                loop=False,
            )

    return gram
