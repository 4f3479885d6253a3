"""nngeometry: ``GramMatrix``, which is always the full kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from nngeometry.gram import GramMatrix
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from peers.torch_networks import load, reduce_full


def prepare(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str) -> Callable[[], Tensor]:
    """Return the computation that is timed."""
    model, inputs = load(case, arrays, dtype)
    loader = DataLoader(TensorDataset(inputs), batch_size=len(inputs))

    def gram() -> Tensor:
        blocks = GramMatrix(model, loader).data  # (C, n, C, n)
        return reduce_full(blocks.permute(1, 0, 3, 2), case["outputs"])

    return gram
