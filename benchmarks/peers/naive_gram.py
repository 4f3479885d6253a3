"""The definition: one ``autograd.grad`` for each output of each sample, and the inner products of all pairs of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peers.torch_networks import load, reduce_full


def prepare(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str) -> Callable[[], Tensor]:
    """Return the double loop, always in float64."""
    model, inputs = load(case, arrays, "float64")
    parameters = list(model.parameters())

    def gram() -> Tensor:
        rows = []
        for one in inputs.split(1):
            for output in model(one)[0]:
                gradients = torch.autograd.grad(output, parameters, retain_graph=True)
                rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        full = torch.zeros(len(rows), len(rows))
        for i, left in enumerate(rows):
            for j, right in enumerate(rows[: i + 1]):
                full[i, j] = full[j, i] = left @ right
        classes = len(rows) // len(inputs)
        return reduce_full(full.reshape(len(inputs), classes, len(inputs), classes), case["outputs"])

    return gram
