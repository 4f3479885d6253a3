"""Which samples of a checkpoint are meant, and whether there is room for what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_conv.arguments import described
from lightning_conv.machine.memory import allowed_memory, mebibytes

Numbers: TypeAlias = Sequence[int] | Tensor | slice | None
"""Numbers of samples in the order of the loader; None: all of them."""


def require_room(needed: int, max_memory: float | None) -> None:
    """Refuse sketches or a kernel that do not fit.

    Args:
        needed: bytes that they take.
        max_memory: see ``StoredSketches.kernel``.

    Raises:
        MemoryError: they do not.
    """
    allowed = allowed_memory(max_memory, torch.device("cpu"))
    if needed > allowed:
        raise MemoryError(
            f"max_memory: sketches or kernel take {mebibytes(needed)} of the allowed {mebibytes(allowed)}; take fewer rows and columns at "
            "once, or allow more"
        )


def chosen_samples(samples: Numbers, count: int) -> np.ndarray[Any, Any]:
    """Return the numbers of the samples that are meant.

    Args:
        samples: numbers or a slice; None: all.
        count: how many there are.

    Raises:
        ValueError: a number is outside of 0 to ``count`` - 1, or there is none.
    """
    if samples is None or isinstance(samples, slice):
        chosen = np.arange(count)[samples or slice(None)]
    else:
        chosen = np.asarray(samples.cpu() if isinstance(samples, Tensor) else list(samples))
    if (
        chosen.ndim != 1
        or len(chosen) == 0
        or chosen.dtype.kind not in "iu"
        or chosen.min() < 0
        or chosen.max() >= count
    ):
        raise ValueError(f"samples: {described(samples)}; need numbers from 0 to {count - 1}, at least one")
    return chosen
