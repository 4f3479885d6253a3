"""The Gram matrix of features that are never held at once: h h^T (+ 1 for the bias column), tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import require_features
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.kernels.products.precision import gamma
from lightning_conv.reporting.progress import Report

STRIP = 2048
"""Features that are multiplied at a time: short sums, and their sums, round less than one long sum."""


GramDone: TypeAlias = Sequence[int]
"""(first, last, row): columns of tiles before ``first`` are done, and those before ``last`` above tile row ``row``."""


class FeatureRows(Protocol):
    """Features of n samples, computed on demand: the same numbers whenever they are asked for."""

    @property
    def samples(self) -> int:
        """n."""

    @property
    def width(self) -> int:
        """m_H."""

    def rows(self, start: int, stop: int) -> Tensor:
        """h of the samples start, ..., stop - 1: (stop - start, m_H), float64, on any device."""


@dataclass(frozen=True)
class HeldRows:
    """Features that are there already."""

    features: Tensor  # (n, m_H), float64

    @property
    def samples(self) -> int:
        """n."""
        return len(self.features)

    @property
    def width(self) -> int:
        """m_H."""
        return self.features.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Some of them."""
        return self.features[start:stop]


def stream_gram(
    source: FeatureRows,
    tiles: Tiles,
    *,
    bias: bool,
    panel: int,
    done: GramDone = (0, 0, 0),
    report: Report,
    save: Callable[[GramDone], None],
    seen: Callable[[int, Tensor], None] = lambda row, features: None,
) -> None:
    r"""Fill ``tiles`` with :math:`G = h h^T + 1 1^T` (without the ones if there is no bias).

    A panel of ``panel`` tile rows of h is held while the rows below it pass by once, so that h is computed about
    n / (2 panel tile) times. See ``gram_rounding`` for the error.

    Args:
        source: h.
        tiles: where G goes.
        bias: whether a bias comes along.
        panel: tile rows that are held.
        done: what ``tiles`` holds already.
        report: told the share that is done.
        save: told what is done, after each tile row.
        seen: given each tile row of h, with its number, when it is read for the first time.

    Raises:
        ValueError: features that are no finite float64 matrix of the announced shape.

    Cost: n^2 m_H flops (half of the products), memory (panel + 1) tile rows of features.
    """
    total = tiles.count * (tiles.count + 1) // 2
    first, last, row = done
    while first < tiles.count:
        if not first < last <= first + panel:  # a new panel, or one that was begun with more memory
            last, row = min(first + panel, tiles.count), first
        held = [read_rows(source, tiles.rows(j)) for j in range(first, last)]
        for i in range(row, tiles.count):
            mine = held[i - first] if i < last else read_rows(source, tiles.rows(i))
            if first == 0:
                seen(i, mine)
            for j in range(first, min(i + 1, last)):
                _product(mine, held[j - first], bias, tiles[i, j])
            before = first * tiles.count - first * (first - 1) // 2  # tiles in the columns on the left
            report((before + sum(min(k + 1, last) - first for k in range(first, i + 1))) / total)
            save((first, last, i + 1))
            del mine  # before the next ones come: panel + 1 are promised
        held.clear()
        first = last
        save((first, first, first))


def read_rows(source: FeatureRows, rows: slice) -> Tensor:
    """Some rows, checked and on the CPU, where the tiles are.

    Raises:
        ValueError: no finite float64 matrix of the announced shape.
    """
    found = source.rows(rows.start, rows.stop).cpu()
    wanted = (rows.stop - rows.start, source.width)
    if found.dtype != torch.float64 or tuple(found.shape) != wanted:
        raise ValueError(
            f"features: rows {rows.start}-{rows.stop} are {found.dtype} of {tuple(found.shape)}; need float64 of {wanted}"
        )
    require_features(found, first=rows.start)
    return found


def _product(left: Tensor, right: Tensor, bias: bool, out: Tensor) -> None:
    torch.mm(left[:, :STRIP], right[:, :STRIP].T, out=out)
    part = torch.empty_like(out)
    for start in range(STRIP, left.shape[1], STRIP):
        # Not addmm: a library may begin its long sum with what is there.
        out += torch.mm(left[:, start : start + STRIP], right[:, start : start + STRIP].T, out=part)
    if bias:
        out += 1


def gram_rounding(tiles: Tiles, width: int) -> float:
    r"""Proven bound on :math:`\|\hat G - G\|_2`, for the computed and the exact Gram matrix of the features as they are.

    Every product is rounded once, added up in a strip of at most 2,048 and then with the m / 2048 other strips and the 1, hence
    :math:`|\hat G_{ij} - G_{ij}| \le \gamma_D |h_i||h_j|` with D = min(m, 2048) + m / 2048 + 1 (Higham 2002, section 4.2), and
    the matrix of these has the norm gamma_D sum |h_i|^2 = gamma_D tr G, where tr G <= tr(computed) / (1 - gamma_D).
    """
    g = gram_relative(width)
    return g / (1 - g) * float(tiles.diagonal().sum()) * (1 + gamma(tiles.size, torch.float64))


def gram_relative(width: int) -> float:
    """gamma_D: an entry is off by at most this times |h_i||h_j|, see ``gram_rounding``."""
    return gamma(min(width, STRIP) + -(-width // STRIP) + 1, torch.float64)
