"""The tiles of a certificate, divided among processes: each multiplies some of them, and the first one gets all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from lightning_conv.expressivity.factor import divide_by, is_factored, share_of_columns, subtract_products
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.machine.processes import Processes
from lightning_conv.reporting.progress import Report


def owner(row: int, world: int) -> int:
    """Return the rank that has a tile row of the factor: forth and back, so that long and short rows are evenly divided.

    Args:
        row: number of the tile row.
        world: number of processes.
    """
    turn, place = divmod(row, world)
    return world - 1 - place if turn % 2 else place


def rows_of(rank: int, world: int, count: int) -> list[int]:
    """Return the tile rows of the factor that a process has.

    Args:
        rank: of the process.
        world: number of processes.
        count: number of tile rows.
    """
    return [i for i in range(count) if owner(i, world) == rank]


def shared_products(
    processes: Processes, tiles: Tiles, i: int, columns: Sequence[int], multiply: Callable[[int, Tensor], None]
) -> None:
    """Fill some tiles of row i, each by one of the processes; the first one gets all.

    Args:
        processes: they have the same features.
        tiles: in the first process those that are filled; in the others only their sizes count.
        i: number of the tile row.
        columns: numbers of the tile columns.
        multiply: called with a column and the tile that it fills.

    Raises:
        Exception: one of the processes fails; raised in all of them.
    """
    numbers = [(i * (i + 1) // 2 + j) % processes.world for j in columns]  # all tiles in turn
    rows = tiles.rows(i)
    places: list[list[Tensor]] = [[] for _ in range(processes.world)]
    for j, rank in zip(columns, numbers, strict=True):
        if processes.rank in (0, rank):
            theirs = tiles.rows(j)
            shape = rows.stop - rows.start, theirs.stop - theirs.start
            places[rank].append(tiles[i, j] if processes.rank == 0 else torch.empty(shape, dtype=torch.float64))

    def mine() -> None:
        own = [j for j, rank in zip(columns, numbers, strict=True) if rank == processes.rank]
        for j, place in zip(own, places[processes.rank], strict=True):
            multiply(j, place)

    processes.together(mine)
    processes.pass_on(places, to_first=True)


class SharedCholesky:
    """Computes what ``tiled_cholesky`` does, to the last bit, with each tile row of the factor in one of the processes.

    For each column of tiles every process gets the row of the factor on its left and, from the process that has the tile on the diagonal,
    that one's factor. The tiles of its own rows are its own work.

    Args:
        processes: those among which the rows are divided (``owner``); all of them do this together.
        matrix: A, in the first process; in the others only its sizes count.
        factor: tiles that receive L: all of them in the first process, in the others those of ``rows_of``.
        shift: number that is subtracted from the diagonal of A.

    Cost: n^3 / (3 W) flops in each of W processes, which has n^2 / (2 W) numbers. The first one sends n^2 / 2 numbers to all together and
    as many to each, and gets the latter back.
    """

    def __init__(self, processes: Processes, matrix: Tiles, factor: Tiles, shift: float) -> None:
        self._processes, self._matrix, self._factor, self._shift = processes, matrix, factor, shift
        self._count, tile = matrix.count, matrix.tile
        self._own = rows_of(processes.rank, processes.world, self._count)
        self._beside, self._diagonal, self._work = processes.together(
            lambda: [torch.empty(n * tile**2, dtype=torch.float64) for n in (self._count, 1, 1)]
        )

    def run(self, *, done: int = 0, report: Report, save: Callable[[int], None]) -> int:
        """Return what ``tiled_cholesky`` returns.

        Args:
            done: number of columns of tiles that the first process has already.
            report: see ``tiled_cholesky``.
            save: see ``tiled_cholesky``.

        Raises:
            Exception: one of the processes fails; raised in all of them.
        """
        processes = self._processes
        for k in range(done):  # what an earlier process has done
            processes.pass_on(self._parcels(range(done, self._count), k, self._factor), to_first=False)
        for k in range(done, self._count):
            if not self._column(k):
                return int(self._matrix.rows(k).start)
            processes.together(partial(save, k + 1))
            report(share_of_columns(k + 1, self._count))
        return self._matrix.size

    def _parcels(self, rows: Iterable[int], k: int, source: Tiles) -> list[list[Tensor]]:
        """Return the tiles (i, k) by their owners, in the first process those of ``source``; in another one its own."""
        processes = self._processes
        found: list[list[Tensor]] = [[] for _ in range(processes.world)]
        for i in rows:
            if processes.rank == 0 or i in self._own:
                found[owner(i, processes.world)].append((source if processes.rank == 0 else self._factor)[i, k])
        return found

    def _column(self, k: int) -> bool:
        """Compute a column of tiles; return False, without it, if the tile on the diagonal has no factor."""
        processes, factor = self._processes, self._factor
        rows = self._matrix.rows(k)
        size = rows.stop - rows.start
        processes.pass_on(self._parcels(range(k, self._count), k, self._matrix), to_first=False)
        has_row = processes.rank == 0 or k in self._own
        left = factor.before(k) if has_row else self._beside[: k * factor.tile**2]
        if k:
            processes.spread(left)()
        row = [factor.tile_in(left, k, j) for j in range(k)]
        diagonal = self._diagonal[: size**2].view(size, size).fill_(math.nan)
        below = [i for i in self._own if i > k]
        errors: list[Exception] = []
        with _noted(errors):
            if k in self._own:
                self._subtract(k, k, row)
                if is_factored(factor[k, k]):
                    diagonal.copy_(factor[k, k])
        wait = processes.spread(diagonal, owner(k, processes.world))
        with _noted(errors):  # while it is on its way
            for i in below:
                self._subtract(i, k, row)
        wait()
        with _noted(errors):
            for i in below:
                divide_by(diagonal, factor[i, k])
        processes.together(partial(_raise, errors))
        if bool(diagonal.isnan().any()):
            return False
        processes.pass_on(self._parcels(range(k, self._count), k, factor), to_first=True)
        return True

    def _subtract(self, i: int, k: int, row: Sequence[Tensor]) -> None:
        target = self._factor[i, k]
        if self._processes.rank == 0:
            target.copy_(self._matrix[i, k])
        if i == k:
            target.diagonal().sub_(self._shift)
        subtract_products(target, self._factor, i, row, self._work)


@contextmanager
def _noted(errors: list[Exception]) -> Iterator[None]:
    """Keep an error until the others can be told, since they wait for what comes next."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def _raise(errors: Sequence[Exception]) -> None:
    if errors:
        raise errors[0]
