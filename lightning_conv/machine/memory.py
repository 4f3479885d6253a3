"""The memory that is free, the part of it that a computation may use, and how work is cut into blocks that fit."""

from __future__ import annotations

import math
import os
from numbers import Real

import torch

FALLBACK_MEMORY = 2 * 2**30
"""Bytes that are assumed to be free if the system does not tell."""


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free on ``device`` now (2 GiB if the system does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return FALLBACK_MEMORY


def whole_bytes(max_memory: object) -> int:
    """Return a number of bytes such as ``2**30`` or ``1e9`` as an integer.

    Raises:
        ValueError: ``max_memory`` is not a finite number of at least one byte.
    """
    number = isinstance(max_memory, Real) and not isinstance(max_memory, bool)
    if not (number and math.isfinite(max_memory) and max_memory >= 1):  # type: ignore[arg-type, operator]
        raise ValueError(
            f"max_memory: {max_memory!r}; give a positive number of bytes, or None for a quarter of the free memory"
        )
    return int(max_memory)  # type: ignore[call-overload, no-any-return]


def allowed_memory(max_memory: float | None, device: torch.device) -> int:
    """Return ``max_memory`` in bytes, or a quarter of the free memory if it is None.

    Raises:
        ValueError: ``max_memory`` is not a finite number of at least one byte.
    """
    return available_memory(device) // 4 if max_memory is None else whole_bytes(max_memory)


def blocks(samples: int, rows: int) -> list[slice]:
    """Return consecutive slices of ``rows`` samples that cover ``samples``."""
    return [slice(start, min(start + rows, samples)) for start in range(0, samples, rows)]


def mebibytes(count: float) -> str:
    """Return a number of bytes in readable form."""
    return f"{count / 2**20:.1f} MiB"


def memory_budget(max_memory: float | None, device: torch.device, result_bytes: int) -> int:
    """Return the bytes that are left for working storage beside the result and two temporaries of its size.

    Raises:
        ValueError: ``max_memory`` is not a finite number of at least one byte.
        MemoryError: the result alone does not fit.
    """
    allowed = allowed_memory(max_memory, device)
    left = allowed - 3 * result_bytes
    if left <= 0:
        raise MemoryError(
            f"max_memory: the Gram matrix with its temporaries takes {mebibytes(3 * result_bytes)} of the allowed "
            f"{mebibytes(allowed)}; use fewer samples, outputs='trace' or 'sum', or a larger max_memory"
        )
    return left
