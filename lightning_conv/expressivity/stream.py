"""The Gram matrix h h^T (+ 1 for the bias column) of features that do not fit into memory, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import require_features
from lightning_conv.expressivity.shared import shared_products
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.rounding import gamma, ldexp
from lightning_conv.machine.processes import Processes, alone
from lightning_conv.reporting.progress import Report

STRIP = 2048
"""Number of features that are multiplied at a time; sums of short sums have smaller rounding errors than one long sum."""


GramDone: TypeAlias = Sequence[int]
"""(first, last, row): columns of tiles before ``first`` are done, and those before ``last`` above tile row ``row``."""


class FeatureRows(Protocol):
    """Features of n samples, computed on demand. Every call must return the same numbers."""

    @property
    def samples(self) -> int:
        """Number of samples n."""

    @property
    def width(self) -> int:
        """Number of features m_H."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return h of the samples start, ..., stop - 1: (stop - start, m_H), float64, on any device."""


@dataclass(frozen=True)
class HeldRows:
    """Features that are in memory."""

    features: Tensor  # (n, m_H), float64

    @property
    def samples(self) -> int:
        """Number of samples n."""
        return len(self.features)

    @property
    def width(self) -> int:
        """Number of features m_H."""
        return self.features.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows start, ..., stop - 1."""
        return self.features[start:stop]


@dataclass(frozen=True)
class DerivedRows:
    """Features that follow from others, of the same shape; a subclass has ``rows``."""

    source: FeatureRows

    @property
    def samples(self) -> int:
        """Number of samples n."""
        return self.source.samples

    @property
    def width(self) -> int:
        """Number of features m_H."""
        return self.source.width


@dataclass(frozen=True)
class ScaledRows(DerivedRows):
    """Features times a power of two."""

    exponent: int

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows start, ..., stop - 1."""
        return ldexp(self.source.rows(start, stop), self.exponent)


def stream_gram(
    source: FeatureRows,
    tiles: Tiles,
    *,
    bias: bool,
    panel: int,
    ones: float = 1.0,
    done: GramDone = (0, 0, 0),
    report: Report,
    save: Callable[[GramDone], None],
    seen: Callable[[int, Tensor], None] = lambda row, features: None,
    processes: Processes | None = None,
) -> None:
    r"""Fill ``tiles`` with :math:`G = h h^T + 1 1^T` (without the ones if there is no bias).

    A panel of ``panel`` tile rows of h is held in memory while the rows below it are read once, so h is computed about
    n / (2 panel tile) times. See ``gram_rounding`` for the error.

    Args:
        source: last hidden features h of the n samples.
        tiles: tiles that receive G.
        bias: whether the last layer has a bias.
        panel: number of tile rows that are held.
        ones: the number in place of 1 in :math:`1 1^T`, if the features are scaled: the square of their factor.
        done: the part of ``tiles`` that is done already.
        report: called with the share of the work that is done.
        save: called after each tile row with the part that is done.
        seen: called with each tile row's number and features when they are read for the first time.
        processes: those among which the tiles are divided, which all call this; the first one gets all of them, and each reads the same
            features. None: there is one.

    Raises:
        ValueError: the features are not a finite float64 matrix of the announced shape.

    Cost: n^2 m_H flops (half of the products), memory (panel + 1) tile rows of features. Each of W processes has 1 / W of the flops, and
    sends as much of n^2 / 2 numbers.
    """
    total = tiles.count * (tiles.count + 1) // 2
    first, last, row = done
    together = alone if processes is None else processes.together
    while first < tiles.count:
        if not first < last <= first + panel:  # a new panel, or one that was started with more memory
            last, row = min(first + panel, tiles.count), first
        held = [read_rows(source, tiles.rows(j)) for j in range(first, last)]
        for i in range(row, tiles.count):
            mine = held[i - first] if i < last else read_rows(source, tiles.rows(i))
            columns = range(first, min(i + 1, last))
            multiply = partial(_multiply, mine, held, first, ones if bias else 0.0)
            if processes is None:
                for j in columns:
                    multiply(j, tiles[i, j])
            else:
                shared_products(processes, tiles, i, columns, multiply)
            before = first * tiles.count - first * (first - 1) // 2  # tiles in the columns on the left
            report((before + sum(min(k + 1, last) - first for k in range(first, i + 1))) / total)
            together(partial(_note, i, mine if first == 0 else None, seen, save, (first, last, i + 1)))
            del mine, multiply  # before the next row is read, because at most panel + 1 tile rows may be held
        held.clear()
        first = last
        together(partial(save, (first, first, first)))


def _note(
    row: int,
    features: Tensor | None,
    seen: Callable[[int, Tensor], None],
    save: Callable[[GramDone], None],
    done: GramDone,
) -> None:
    if features is not None:
        seen(row, features)
    save(done)


def read_rows(source: FeatureRows, rows: slice) -> Tensor:
    """Read and check some rows, and move them to the CPU, where the tiles are.

    Raises:
        ValueError: the rows are not a finite float64 matrix of the announced shape.
    """
    found = source.rows(rows.start, rows.stop).cpu()
    wanted = (rows.stop - rows.start, source.width)
    if found.dtype != torch.float64 or tuple(found.shape) != wanted:
        raise ValueError(
            f"features: rows {rows.start}-{rows.stop} are {found.dtype} of {tuple(found.shape)}; need float64 of {wanted}"
        )
    require_features(found, first=rows.start)
    return found


def _multiply(mine: Tensor, held: Sequence[Tensor], first: int, ones: float, column: int, out: Tensor) -> None:
    _product(mine, held[column - first], ones, out)


def _product(left: Tensor, right: Tensor, ones: float, out: Tensor) -> None:
    torch.mm(left[:, :STRIP], right[:, :STRIP].T, out=out)
    part = torch.empty_like(out)
    for start in range(STRIP, left.shape[1], STRIP):
        # Not addmm, because a library may start its long sum with the present content.
        out += torch.mm(left[:, start : start + STRIP], right[:, start : start + STRIP].T, out=part)
    if ones:
        out += ones


def gram_rounding(tiles: Tiles, width: int) -> float:
    r"""Bound :math:`\|\hat G - G\|_2`, the rounding error of the computed Gram matrix; the bound is proven.

    Every product is rounded once, added up in a strip of at most 2,048 features, and then added to the m / 2048 other strips
    and the 1. Hence :math:`|\hat G_{ij} - G_{ij}| \le \gamma_D |h_i||h_j|` with D = min(m, 2048) + m / 2048 + 1 (Higham
    2002, section 4.2). The matrix of these bounds has the norm gamma_D sum |h_i|^2 = gamma_D tr G, where
    tr G <= tr(computed) / (1 - gamma_D). Entries that underflow are covered by ``OUTWARD`` if the trace is above 2^-800.
    """
    g = gram_relative(width)
    return g / (1 - g) * float(tiles.diagonal().sum()) * (1 + gamma(tiles.size, torch.float64)) * OUTWARD


def gram_relative(width: int) -> float:
    """Return gamma_D; entry (i, j) errs by at most gamma_D |h_i||h_j|, see ``gram_rounding``."""
    return gamma(min(width, STRIP) + -(-width // STRIP) + 1, torch.float64)
