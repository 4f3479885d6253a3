"""``Team``: processes that compute the tiles of a certificate together, of which the first one leads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lightning_conv.expressivity.shared import SharedCholesky, rows_of
from lightning_conv.expressivity.stream import DerivedRows, FeatureRows, GramDone, ScaledRows, stream_gram
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.machine.processes import Processes, ProcessesError
from lightning_conv.reporting.progress import Report, silent

T = TypeVar("T")


class Team:
    """Processes of which the first one leads a computation; the others do with it what it asks for, until it has ended.

    Args:
        processes: each of them makes a ``Team`` and calls ``run``.
        source: features, the same in all of them. Its ``rows`` may communicate, since all of them call it.
    """

    def __init__(self, processes: Processes, source: FeatureRows) -> None:
        self._processes, self._source = processes, source
        self._jobs: Mapping[str, Callable[..., object]] = {
            "rows": source.rows,
            "gram": self._help_with_gram,
            "cholesky": self._help_with_cholesky,
        }

    @property
    def world(self) -> int:
        """Number of the processes."""
        return self._processes.world

    @property
    def rows(self) -> FeatureRows:
        """The features, for the one that leads."""
        return _LedRows(self._source, self._read)

    def run(self, lead: Callable[[], T]) -> T:
        """Return in all processes what ``lead`` returns in the first one, which may call the methods below.

        Raises:
            Exception: it failed; raised in all of them.
            ProcessesError: one does not answer.
        """
        processes, made, errors = self._processes, [], []
        if processes.rank == 0:
            try:
                made.append(lead())
            except Exception as error:
                errors.append(error)
            processes.once(lambda: None)
        else:
            while (asked := processes.once(lambda: None)) is not None:
                self._help(*asked)

        def result() -> T:
            if errors:
                raise errors[0]
            return made[0]

        return processes.once(result)

    def gram(
        self,
        tiles: Tiles,
        *,
        bias: bool,
        panel: int,
        ones: float,
        exponent: int,
        done: GramDone,
        report: Report,
        save: Callable[[GramDone], None],
        seen: Callable[[int, Tensor], None],
    ) -> None:
        """Fill ``tiles`` as ``stream_gram`` does.

        Args:
            tiles: see ``stream_gram``.
            bias: see there, as what follows.
            panel: see there.
            ones: see there.
            exponent: of the power of two by which the features are multiplied.
            done: see ``stream_gram``.
            report: see there.
            save: see there.
            seen: see there.
        """
        options: dict[str, Any] = {"bias": bias, "panel": panel, "ones": ones, "done": tuple(done)}
        self._ask("gram", tiles.tile, exponent, options)
        stream_gram(
            self._scaled(exponent), tiles, **options, report=report, save=save, seen=seen, processes=self._processes
        )

    def cholesky(
        self,
        matrix: Tiles,
        factor: Tiles,
        shift: float,
        *,
        done: int,
        report: Report,
        save: Callable[[int], None],
    ) -> int:
        """Return what ``tiled_cholesky`` returns, with the same arguments."""
        self._ask("cholesky", factor.tile, shift, done, factor.path is not None)
        own = self._processes.together(lambda: factor)
        return SharedCholesky(self._processes, matrix, own, shift).run(done=done, report=report, save=save)

    def _ask(self, job: str, *args: object) -> None:
        self._processes.once(lambda: (job, args))

    def _help(self, job: str, args: tuple[Any, ...]) -> None:
        try:
            self._jobs[job](*args)
        except ProcessesError:
            raise
        except Exception:  # raised in the first one, too, which ends the work and tells
            return

    def _read(self, start: int, stop: int) -> Tensor:
        self._ask("rows", start, stop)
        return self._source.rows(start, stop)

    def _scaled(self, exponent: int) -> FeatureRows:
        return ScaledRows(self._source, exponent) if exponent else self._source

    def _help_with_gram(self, tile: int, exponent: int, options: Mapping[str, Any]) -> None:
        sizes = Tiles(self._source.samples, tile, kept=())
        stream_gram(self._scaled(exponent), sizes, **options, report=silent, save=_ignore, processes=self._processes)

    def _help_with_cholesky(self, tile: int, shift: float, done: int, on_disk: bool) -> None:
        processes, size = self._processes, self._source.samples
        sizes = Tiles(size, tile, kept=())
        own = rows_of(processes.rank, processes.world, sizes.count)
        with tempfile.TemporaryDirectory(prefix="expressivity-") if on_disk else nullcontext() as folder:
            path = None if folder is None else Path(folder) / "factor.tiles"
            factor = processes.together(partial(Tiles, size, tile, path, own))
            SharedCholesky(processes, sizes, factor, shift).run(done=done, report=silent, save=_ignore)


@dataclass(frozen=True)
class _LedRows(DerivedRows):
    """Features that the first process asks for and all of them compute."""

    read: Callable[[int, int], Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows start, ..., stop - 1."""
        return self.read(start, stop)


def _ignore(done: object) -> None:
    del done
