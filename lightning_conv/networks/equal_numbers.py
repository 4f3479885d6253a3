"""``equal_numbers``: whether two tensors have the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def equal_numbers(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same numbers, NaN being equal to itself."""
    return one.shape == other.shape and (
        torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    )
