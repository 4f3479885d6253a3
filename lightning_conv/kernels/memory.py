"""How much memory there is and how much of it a kernel may take."""

from __future__ import annotations

import os

import torch

FALLBACK_MEMORY = 2 * 2**30


def available_memory(device: torch.device) -> int:
    """Bytes that are free on ``device`` now (2 GiB where the system does not tell)."""
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


def allowed_memory(max_memory: int | None, device: torch.device) -> int:
    """``max_memory``, or a quarter of what is free.

    Raises:
        ValueError: ``max_memory`` is not positive.
    """
    if max_memory is not None and max_memory <= 0:
        raise ValueError(
            f"max_memory: {max_memory} bytes; give a positive number, or None for a quarter of what is free"
        )
    return available_memory(device) // 4 if max_memory is None else max_memory


def blocks(samples: int, rows: int) -> list[slice]:
    """Consecutive slices of ``rows`` samples that cover ``samples``."""
    return [slice(start, min(start + rows, samples)) for start in range(0, samples, rows)]


def mebibytes(count: float) -> str:
    """A number of bytes as people read it."""
    return f"{count / 2**20:.1f} MiB"


def memory_budget(max_memory: int | None, device: torch.device, result_bytes: int) -> int:
    """Bytes left for working storage beside the result and two temporaries of its size.

    Raises:
        ValueError: ``max_memory`` is not positive.
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
