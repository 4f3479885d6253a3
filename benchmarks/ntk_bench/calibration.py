"""What the machine gives at this moment: the rate of float32 matrix products, and its description."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path

import torch

PEAK_SIZES = (1024, 2048, 3072, 4096)


def gemm_rate(size: int = 1024, repeats: int = 7) -> float:
    """Median flops per second of ``torch.mm`` of two ``size`` x ``size`` float32 matrices, after one to warm up."""
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
    """The best of these rates over several sizes and two passes."""
    sizes = PEAK_SIZES[:2] if quick else PEAK_SIZES
    return max(gemm_rate(size, repeats=5) for _ in range(2) for size in sizes)


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Main memory of the machine, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, StopIteration):
        return None
