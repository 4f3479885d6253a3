"""The two closest rows of a matrix, with a proven distance, without looking at all pairs one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.products.precision import gamma
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.reporting.progress import Report, silent

BLOCK = 1024
AT_ONCE = 4096
"""Pairs whose distance is computed from their difference at a time."""

AXIS_STEPS = 5
UNDERFLOW = 1e-300
"""Above what underflow can take from a square."""


@dataclass(frozen=True)
class ClosestRows:
    """Two rows and their distance, which is that of no other two rows undercut."""

    first: int
    second: int
    distance: Bounded
    compared: float  # share of the pairs that were looked at


def closest_rows(
    matrix: Tensor, *, labels: Tensor | None = None, block: int = BLOCK, report: Report = silent
) -> ClosestRows:
    r"""The closest two of n rows x_i and bounds of their Euclidean distance.

    Rows are sorted along the direction in which they spread most: with |v| = 1, v^T (x_i - x_j) <= |x_i - x_j|, so of two blocks
    whose gap along v exceeds the best distance so far nothing needs to be computed. Otherwise the squares come from a matrix
    product, y_i = x_i - mean,

    .. math:: s_{ij} = |y_i|^2 + |y_j|^2 - 2 y_i \cdot y_j, \qquad
        \bigl|\hat s_{ij} - |x_i - x_j|^2\bigr| \le \gamma_{d+16} (|y_i| + |y_j|)^2,

    (the rounding of y, of the product and of the sums), and only pairs which these bounds leave in question are computed from their
    difference, whose relative error is gamma_{d+4}. So the bounds hold for all pairs.

    Args:
        matrix: x, (n, d), float64, n >= 2.
        labels: (n,); only pairs with different labels count then.
        block: rows of a block.
        report: told the share of the blocks that is done.

    Raises:
        ValueError: fewer than two rows, not float64, or labels that are all the same or not one a row.

    Cost: at most n^2 d flops, memory O(block^2 + n d).
    """
    if matrix.ndim != 2 or len(matrix) < 2 or matrix.dtype != torch.float64:
        raise ValueError(f"matrix: {matrix.dtype} of shape {tuple(matrix.shape)}; need at least two rows in float64")
    n, d = matrix.shape
    if labels is not None and (labels.shape != (n,) or bool((labels == labels[0]).all())):
        raise ValueError(
            f"labels: shape {tuple(labels.shape)}; need one for each of the {n} rows, and two different ones"
        )
    centred = matrix - matrix.mean(0)
    along = centred @ _axis(centred)
    order = along.argsort()
    rows, along = centred[order], along[order]
    norms = torch.linalg.vector_norm(rows, dim=1)
    classes = None if labels is None else labels.to(matrix.device)[order]
    search = _Search(matrix, order, rows, norms, gamma(d + 16, torch.float64), classes)
    slack = 4 * gamma(d + 16, torch.float64) * float(norms.max())  # of the projections
    starts = range(0, n, block)
    looked = 0
    # Neighbours first: a small distance at once spares most of the rest.
    for start in starts:
        looked += search.look(slice(start, start + block), slice(start, start + block))
        if search.best == 0:
            break
    for number, start in enumerate(starts):
        mine = slice(start, min(start + block, n))
        for second in range(start + block, n, block):
            if search.best == 0 or float(along[second] - along[mine.stop - 1]) - slack > search.best * (1 + 1e-9):
                break
            looked += search.look(mine, slice(second, second + block))
        report((number + 1) / len(starts))
    value, error = search.best, search.best * gamma(d + 4, torch.float64)
    lower = math.nextafter(value - error, 0.0) if value else 0.0
    upper = math.nextafter(value + error, math.inf) if value else 0.0
    bounded = Bounded(value, lower, upper, certified=True, method="difference of the two rows")
    first, second = sorted(search.pair)
    return ClosestRows(first, second, bounded, looked / (n * (n - 1) / 2))


@dataclass
class _Search:
    matrix: Tensor
    order: Tensor  # row numbers in the matrix, sorted
    rows: Tensor  # centred, sorted
    norms: Tensor
    relative: float
    labels: Tensor | None  # sorted like the rows
    best: float = math.inf
    pair: tuple[int, int] = (0, 1)

    def look(self, mine: slice, theirs: slice) -> int:
        """Compare two blocks (or one with itself); returns the number of pairs."""
        left, right = self.rows[mine], self.rows[theirs]
        here, there = self.norms[mine, None], self.norms[None, theirs]
        squares = torch.addmm(here.square() + there.square(), left, right.T, alpha=-2)
        lower = squares - self.relative * (here + there).square()
        own = mine.start == theirs.start
        if own:
            lower[torch.ones_like(lower, dtype=torch.bool).tril()] = math.inf
        if self.labels is not None:
            lower[self.labels[mine, None] == self.labels[None, theirs]] = math.inf
        # The most promising pair first: it usually leaves no other in question.
        if lower.numel():
            row, column = divmod(int(lower.argmin()), lower.shape[1])
            if math.isfinite(float(lower[row, column])):
                self._compare(torch.tensor([[row + mine.start, column + theirs.start]]))
        open_pairs = ((lower <= self.best**2 * (1 + 1e-12) + UNDERFLOW) & (lower < math.inf)).nonzero()
        for start in range(0, len(open_pairs), AT_ONCE):
            if self.best == 0:
                break
            offsets = torch.tensor([mine.start, theirs.start])
            self._compare(open_pairs[start : start + AT_ONCE].cpu() + offsets)
        return len(left) * (len(left) - 1) // 2 if own else len(left) * len(right)

    def _compare(self, pairs: Tensor) -> None:
        first, second = (self.order[pairs[:, side].to(self.order.device)] for side in (0, 1))
        distances = distance_of(self.matrix[first], self.matrix[second])
        at = int(distances.argmin())
        if float(distances[at]) < self.best:
            self.best, self.pair = float(distances[at]), (int(first[at]), int(second[at]))


def distance_of(first: Tensor, second: Tensor) -> Tensor:
    """|x_i - y_i|, row by row, with a relative error of gamma_{d+4}: zero only where the rows are equal, however small they are."""
    difference = first - second
    scale = difference.abs().amax(1)
    unit = difference / torch.where(scale > 0, scale, 1.0)[:, None]
    distances: Tensor = torch.linalg.vector_norm(unit, dim=1) * scale
    return distances


def _axis(centred: Tensor) -> Tensor:
    """A unit vector along which the rows spread most, roughly: what it is decides about speed only."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(centred.shape[1], generator=generator, dtype=torch.float64).to(centred.device)
    for _ in range(AXIS_STEPS):
        vector = centred.T @ (centred @ (vector / vector.norm().clamp_min(1e-300)))
    norm = vector.norm()
    return vector / norm if float(norm) > 0 else torch.zeros_like(vector)
