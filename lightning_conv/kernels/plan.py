"""How much memory a kernel may take, and how the work is cut so that it keeps to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


def memory_budget(max_memory: int | None, device: torch.device, result_bytes: int) -> int:
    """Bytes left for working storage after the result: ``max_memory``, or a quarter of what is free.

    Raises:
        ValueError: ``max_memory`` is not positive.
        MemoryError: the n x n (or nC x nC) result alone does not fit.
    """
    if max_memory is not None and max_memory <= 0:
        raise ValueError(
            f"max_memory: {max_memory} bytes; give a positive number, or None for a quarter of what is free"
        )
    allowed = available_memory(device) // 4 if max_memory is None else max_memory
    # The result, one float64 temporary of its size in a product, and as much again in the Hadamard rule.
    left = allowed - 3 * result_bytes
    if left <= 0:
        raise MemoryError(
            f"max_memory: the Gram matrix with its temporaries takes {3 * result_bytes / 2**20:.0f} MiB of the allowed "
            f"{allowed / 2**20:.0f} MiB; use fewer samples, outputs='trace' or 'sum', or a larger max_memory"
        )
    return left


def tile_rows(samples: int, bytes_per_sample: int, budget: int, what: str) -> int:
    """Samples in one tile, such that the two tiles of a block product fit ``budget``.

    Raises:
        MemoryError: not even two single samples fit; says what takes the room and what would do.
    """
    fit = budget // bytes_per_sample if bytes_per_sample else samples
    if fit >= samples:
        return samples
    if fit < 2:
        raise MemoryError(
            f"max_memory: {what} of one sample takes {bytes_per_sample / 2**20:.1f} MiB and two must fit in "
            f"{budget / 2**20:.1f} MiB; use outputs='sum', train fewer parameters, or allow a larger max_memory"
        )
    return int(fit // 2)


def tiles(samples: int, rows: int) -> list[slice]:
    """Consecutive slices of ``rows`` samples that cover ``samples``."""
    return [slice(start, min(start + rows, samples)) for start in range(0, samples, rows)]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose per-sample Jacobian is formed together."""

    names: tuple[str, ...]
    numel: int


def parameter_groups(sizes: Sequence[tuple[str, int]], limit: int) -> Iterator[ParameterGroup]:
    """Pack parameters, in order, into groups of at most ``limit`` elements (one parameter at least)."""
    names: list[str] = []
    total = 0
    for name, size in sizes:
        if names and total + size > limit:
            yield ParameterGroup(tuple(names), total)
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield ParameterGroup(tuple(names), total)
