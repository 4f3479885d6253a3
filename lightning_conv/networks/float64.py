"""``in_float64``: numbers in float64, wherever they are."""

from __future__ import annotations

from torch import Tensor


def in_float64(tensor: Tensor) -> Tensor:
    """The numbers in float64, without their graph; on the CPU where their device has none, as Apple's GPUs."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
