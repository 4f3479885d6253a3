"""The present state of the machine: its rate of float32 matrix products, and its description."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from lightning_conv.recipes.machine import processor

__all__ = ["gemm_peak", "gemm_rate", "memory_bytes", "processor"]

PEAK_SIZES = (1024, 2048, 3072, 4096)


def gemm_rate(size: int = 1024, repeats: int = 7) -> float:
    """Measure the median flops per second of ``torch.mm`` of two ``size`` x ``size`` float32 matrices, after one warm-up."""
    x, y = torch.ones(size, size), torch.ones(size, size)
    out = torch.empty(size, size)
    torch.mm(x, y, out=out)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(x, y, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def gemm_peak(quick: bool) -> float:
    """Return the best of these rates over several sizes and two passes."""
    sizes = PEAK_SIZES[:2] if quick else PEAK_SIZES
    return max(gemm_rate(size, repeats=5) for _ in range(2) for size in sizes)


def memory_bytes() -> int | None:
    """Return the main memory of the machine, if the system reports it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, StopIteration):
        return None
