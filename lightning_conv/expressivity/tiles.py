"""The lower triangle of a large matrix in square tiles, in memory or in a file that outlives the process."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_conv.machine.memory import mebibytes

WORD = 8  # bytes of a float64


class Tiles:
    """Tiles (i, j), j <= i, of an n x n float64 matrix that its lower triangle determines.

    A file is memory-mapped, so the system keeps in memory what fits. Numbers that were written survive a kill of the process.

    Args:
        size: number n of rows of the matrix.
        tile: rows and columns per tile; the last tiles are smaller.
        path: file of the tiles. It is created if it does not exist; otherwise its numbers are used. None: memory.
        kept: tile rows that are here, where other processes have the others; None: all.

    Raises:
        OSError: the disk has no room for the file.
    """

    def __init__(self, size: int, tile: int, path: Path | None = None, kept: Collection[int] | None = None) -> None:
        self.size, self.tile, self.path = size, tile, path
        self.count = -(-size // tile)
        self._starts, numbers = {}, 0
        for i in range(self.count) if kept is None else sorted(kept):
            self._starts[i] = numbers
            numbers += (i + 1) * tile**2
        if path is None:
            self._numbers = torch.empty(numbers, dtype=torch.float64)
        else:
            _reserve(path, WORD * numbers)
            self._numbers = torch.from_file(str(path), shared=True, size=numbers, dtype=torch.float64)

    @staticmethod
    def bytes_of(size: int, tile: int) -> int:
        """Return the size of the tiles in bytes."""
        count = -(-size // tile)
        return WORD * tile * tile * count * (count + 1) // 2

    def rows(self, i: int) -> slice:
        """Return the rows (or columns) of the matrix in tile row i."""
        return slice(i * self.tile, min((i + 1) * self.tile, self.size))

    def __getitem__(self, at: tuple[int, int]) -> Tensor:
        """Return tile (i, j), j <= i, for reading or writing. It is contiguous, and square except in the last row."""
        i, j = at
        rows, columns = (self.rows(k).stop - self.rows(k).start for k in at)
        start = self._starts[i] + j * self.tile**2
        return self._numbers[start : start + rows * columns].view(rows, columns)

    def before(self, k: int) -> Tensor:
        """Return the tiles (k, j), j < k, as one row of numbers, ``tile``^2 for each, of which ``tile_in`` finds one."""
        return self._numbers[self._starts[k] : self._starts[k] + k * self.tile**2]

    def tile_in(self, numbers: Tensor, k: int, j: int) -> Tensor:
        """Return tile (k, j), j < k, of the numbers that ``before(k)`` returns, in this process or another."""
        rows, start = self.rows(k).stop - self.rows(k).start, j * self.tile**2
        return numbers[start : start + rows * self.tile].view(rows, self.tile)

    def column(self, k: int) -> Iterator[tuple[int, Tensor]]:
        """Iterate over the tiles on and below the diagonal of tile column k, with their row numbers."""
        return ((i, self[i, k]) for i in range(k, self.count))

    def diagonal(self) -> Tensor:
        """Return a copy of the diagonal, (n,)."""
        return torch.cat([self[i, i].diagonal() for i in range(self.count)])

    def times(self, columns: Tensor) -> Tensor:
        """Multiply columns (n, c) by the symmetric matrix. Cost: 2 n^2 c flops."""
        result = torch.zeros_like(columns)
        for i in range(self.count):
            mine = self.rows(i)
            for j in range(i + 1):
                theirs, block = self.rows(j), self[i, j]
                if i == j:
                    block = block.tril() + block.tril(-1).T
                else:
                    result[theirs] += block.T @ columns[mine]
                result[mine] += block @ columns[theirs]
        return result

    def norm(self, scale: float = 1.0) -> float:
        """Compute the Frobenius norm of ``scale`` times the symmetric matrix, in one pass."""
        square: float = 0.0
        for i in range(self.count):
            for j in range(i):
                square += 2 * float((self[i, j] * scale).norm()) ** 2
            own = self[i, i] * scale
            square += 2 * float(own.tril(-1).norm()) ** 2 + float(own.diagonal().norm()) ** 2
        return math.sqrt(square)


def _reserve(path: Path, size: int) -> None:
    """Reserve the disk space of a file, because writing to a mapped file without space ends the process by a signal.

    Raises:
        OSError: the disk has no room.
    """
    missing = size - (path.stat().st_size if path.exists() else 0)
    free = shutil.disk_usage(path.parent).free
    if missing > free:
        raise OSError(
            errno.ENOSPC,
            f"folder: {path.parent} has {mebibytes(free)} free, and {mebibytes(missing)} are needed for {path.name}; choose "
            "another disk (folder=, or TMPDIR for the temporary one)",
        )
    if hasattr(os, "posix_fallocate"):
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size)
