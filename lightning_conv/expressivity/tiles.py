"""The lower triangle of a large matrix in square tiles, in memory or in a file that outlives the process."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_conv.kernels.planning.memory import mebibytes

WORD = 8  # bytes of a float64


class Tiles:
    """Tiles (i, j), j <= i, of an n x n float64 matrix of which the lower triangle says everything.

    Args:
        size: n.
        tile: rows and columns of a tile; the last ones are smaller.
        path: of the file that holds them; made if it is not there, otherwise its numbers are taken up. None: memory.

    A file is mapped, so the system holds in memory what there is room for. What was written survives a kill of the process.

    Raises:
        OSError: the disk has no room for the file.
    """

    def __init__(self, size: int, tile: int, path: Path | None = None) -> None:
        self.size, self.tile, self.path = size, tile, path
        self.count = -(-size // tile)
        numbers = self.bytes_of(size, tile) // WORD
        if path is None:
            self._numbers = torch.empty(numbers, dtype=torch.float64)
        else:
            _reserve(path, WORD * numbers)
            self._numbers = torch.from_file(str(path), shared=True, size=numbers, dtype=torch.float64)

    @staticmethod
    def bytes_of(size: int, tile: int) -> int:
        """What they take."""
        count = -(-size // tile)
        return WORD * tile * tile * count * (count + 1) // 2

    def rows(self, i: int) -> slice:
        """Rows (or columns) of the matrix in tile row i."""
        return slice(i * self.tile, min((i + 1) * self.tile, self.size))

    def __getitem__(self, at: tuple[int, int]) -> Tensor:
        """Tile (i, j), j <= i, to be read or written: contiguous, and square except in the last row."""
        i, j = at
        rows, columns = (self.rows(k).stop - self.rows(k).start for k in at)
        start = (i * (i + 1) // 2 + j) * self.tile**2
        return self._numbers[start : start + rows * columns].view(rows, columns)

    def column(self, k: int) -> Iterator[tuple[int, Tensor]]:
        """The tiles on and below the diagonal of tile column k, with their rows."""
        return ((i, self[i, k]) for i in range(k, self.count))

    def diagonal(self) -> Tensor:
        """(n,), a copy."""
        return torch.cat([self[i, i].diagonal() for i in range(self.count)])

    def times(self, columns: Tensor) -> Tensor:
        """The symmetric matrix on columns (n, c): 2 n^2 c flops."""
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
        """Frobenius norm of ``scale`` times the symmetric matrix: one reading."""
        square: float = 0.0
        for i in range(self.count):
            for j in range(i):
                square += 2 * float((self[i, j] * scale).norm()) ** 2
            own = self[i, i] * scale
            square += 2 * float(own.tril(-1).norm()) ** 2 + float(own.diagonal().norm()) ** 2
        return math.sqrt(square)

    def dense(self) -> Tensor:
        """The whole symmetric matrix, for tests and small n."""
        return self.times(torch.eye(self.size, dtype=torch.float64))


def _reserve(path: Path, size: int) -> None:
    """Make room for a file now: one that is mapped and does not fit would end the process by a signal when it is written to.

    Raises:
        OSError: there is none.
    """
    missing = size - (path.stat().st_size if path.exists() else 0)
    free = shutil.disk_usage(path.parent).free
    if missing > free:
        raise OSError(
            errno.ENOSPC,
            f"folder: {path.parent} has {mebibytes(free)} free, and {mebibytes(missing)} are needed for {path.name}; choose another "
            "disk (folder=, or TMPDIR for the temporary one)",
        )
    if hasattr(os, "posix_fallocate"):
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size)
