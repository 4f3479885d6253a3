"""``scaled_columns``: vectors as columns in a range in which float32 passes neither overflow nor vanish."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_columns(vectors: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return float64 columns, scaled by powers of two into the range of the passes' dtype, and these powers.

    Args:
        vectors: (N,) or (N, k).
        size: N.
        device: That of the columns.

    Raises:
        ValueError: the first dimension is not ``size``.
    """
    if vectors.ndim not in (1, 2) or vectors.shape[0] != size or vectors.numel() == 0:
        raise ValueError(f"vectors: shape {tuple(vectors.shape)}; need ({size},) or ({size}, k)")
    columns = vectors.detach().to(device, torch.float64).reshape(size, -1)
    largest = columns.abs().amax(0)
    scales = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), torch.ones_like(largest))
    return columns / scales, scales
