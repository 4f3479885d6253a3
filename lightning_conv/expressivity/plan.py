"""The plan of a streamed certificate: memory, disk and time, predicted before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_conv.expressivity.tiles import WORD, Tiles
from lightning_conv.machine.gemm import calibrated
from lightning_conv.machine.memory import allowed_memory, mebibytes

TILE = 1024
SHARE = 0.7
"""Share of the calibrated rate of matrix products that a whole certificate reaches."""


@dataclass(frozen=True)
class StreamPlan:
    """Predicted cost of a certificate."""

    samples: int
    width: int
    tile: int
    panel: int  # number of tile rows of features that are held in memory
    on_disk: bool
    flops: float
    bytes: int  # of memory
    disk_bytes: int
    computed: int
    """Number of rows of features that are computed, each sample once for every panel at or before it."""
    seconds: float
    """For the matrices and, if the time per row was given, for computing the features."""

    @property
    def matrix_bytes(self) -> int:
        """Size of the two matrices, in memory or on disk."""
        return 2 * Tiles.bytes_of(self.samples, self.tile)

    def __str__(self) -> str:
        """Return the plan in one line."""
        disk = f", {mebibytes(self.disk_bytes)} on disk" if self.on_disk else ""
        return (
            f"rank of [h, 1], {self.samples} x {self.width + 1}: {self.flops / 1e9:.4g} Gflop, about {self.seconds:.0f} s, "
            f"{mebibytes(self.bytes)} of memory{disk}"
        )


def plan_stream(
    samples: int,
    width: int,
    *,
    max_memory: float | None = None,
    folder: Path | None = None,
    tile: int | None = None,
    row_seconds: float = 0.0,
    processes: int = 1,
) -> StreamPlan:
    """Plan how the features of n samples are processed.

    Args:
        samples: number n of samples.
        width: number m_H of features per sample.
        max_memory: bytes, such as ``2**30`` or ``1e9`` (default a quarter of the free memory).
        folder: folder of the matrices; None: memory if they fit into half of ``max_memory``, else a temporary folder.
        tile: rows per tile; None: 1,024, or fewer for few samples.
        row_seconds: time to compute the features of one sample.
        processes: number of processes that share the products.

    Raises:
        MemoryError: two tile rows of features do not fit.
        ValueError: ``max_memory`` is not a finite number of at least one byte.
    """
    tile = min(TILE, max(64, -(-samples // 8))) if tile is None else tile
    allowed = allowed_memory(max_memory, torch.device("cpu"))
    matrices = 2 * Tiles.bytes_of(samples, tile)
    on_disk = folder is not None or matrices > allowed // 2
    row = WORD * tile * width
    left = allowed - (0 if on_disk else matrices) - 4 * WORD * tile**2
    count = -(-samples // tile)
    panel = min(left // row - 1, count)
    if panel < 1:
        raise MemoryError(
            f"max_memory: two strips of {tile} samples take {mebibytes(2 * row)} and {mebibytes(left)} are left for them; allow "
            f"{mebibytes(allowed - left + 2 * row)}"
        )
    flops = float(samples) ** 2 * width + 2 * samples**3 / 3
    rate = calibrated("cpu", torch.float64, torch.get_num_threads())[1]
    held = min(panel + 1, count) * row
    used = (0 if on_disk else matrices) + held + 4 * WORD * tile**2
    computed = sum(samples - first * tile for first in range(0, count, panel))
    seconds = flops / (SHARE * rate * processes) + computed * row_seconds
    return StreamPlan(
        samples, width, tile, int(panel), on_disk, flops, used, matrices if on_disk else 0, computed, seconds
    )
