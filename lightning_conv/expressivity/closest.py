"""The two closest rows of a matrix, with a proven distance, without computing every pair from its difference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_conv.checked import checked, whole
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import exponent_of, gamma, ldexp, ldexp_up
from lightning_conv.reporting.progress import Report, silent

BLOCK = 1024
AT_ONCE = 4096
"""Number of pairs whose distance is computed from their difference at a time."""

AXIS_STEPS = 5
LARGEST_EXPONENT = 1000
"""Entries beyond 2^1000 are refused, because their distances may overflow."""
UNDERFLOW = 1e-300
"""Upper bound of what underflow can take from a square."""


@dataclass(frozen=True)
class ClosestRows:
    """Two rows and their distance, which is the smallest of all pairs."""

    first: int
    second: int
    distance: Bounded
    compared: float  # share of the pairs that were compared


@checked(block=whole(1))
def closest_rows(
    matrix: Tensor, *, labels: Tensor | None = None, block: int = BLOCK, report: Report = silent
) -> ClosestRows:
    r"""Find the two closest of n rows x_i, with bounds of their Euclidean distance.

    Rows are sorted along the direction v in which they spread most. With |v| = 1, v^T (x_i - x_j) <= |x_i - x_j|, so two
    blocks whose gap along v exceeds the best distance so far need not be compared. For all others the squared distances
    come from a matrix product. With y_i = x_i - mean,

    .. math:: s_{ij} = |y_i|^2 + |y_j|^2 - 2 y_i \cdot y_j, \qquad
        \bigl|\hat s_{ij} - |x_i - x_j|^2\bigr| \le \gamma_{d+16} (|y_i| + |y_j|)^2,

    which covers the rounding of y, of the product and of the sums. Only pairs that these bounds leave open are computed
    from their difference, whose relative error is gamma_{d+4}. So the bounds are valid for all pairs. The squared distances
    are those of the rows times a power of two that brings them to about 1, since squares of tiny rows would vanish.
    Differences are those of the rows as given, so two rows have distance 0 only if they are equal.

    Args:
        matrix: x, (n, d), float64, n >= 2.
        labels: (n,); if given, only pairs with different labels count.
        block: number of rows per block.
        report: called with the share of the blocks that is done.

    Raises:
        ValueError: there are fewer than two rows, they are not float64, a row has NaN or infinite entries, or entries so large
            that distances overflow, or the labels are all the same or not one per row.

    Cost: at most n^2 d flops, memory O(block^2 + n d).
    """
    if matrix.ndim != 2 or len(matrix) < 2 or matrix.dtype != torch.float64:
        raise ValueError(f"matrix: {matrix.dtype} of shape {tuple(matrix.shape)}; need at least two rows in float64")
    n, d = matrix.shape
    if labels is not None and (labels.shape != (n,) or bool((labels == labels[0]).all())):
        raise ValueError(
            f"labels: shape {tuple(labels.shape)}; need one for each of the {n} rows, and two different ones"
        )
    exponent = _require_finite(matrix)
    scaled = ldexp(matrix, -exponent)
    centred = scaled - scaled.mean(0)
    along = centred @ _axis(centred)
    order = along.argsort()
    rows, along = centred[order], along[order]
    norms = torch.linalg.vector_norm(rows, dim=1)
    classes = None if labels is None else labels.to(matrix.device)[order]
    search = _Search(matrix, exponent, order, rows, norms, gamma(d + 16, torch.float64), classes)
    slack = 4 * gamma(d + 16, torch.float64) * float(norms.max())  # rounding of the projections
    starts = range(0, n, block)
    looked = 0
    # Neighbours first, because a small distance early on saves most of the rest.
    for start in starts:
        looked += search.look(slice(start, start + block), slice(start, start + block))
        if search.best == 0:
            break
    for number, start in enumerate(starts):
        mine = slice(start, min(start + block, n))
        for second in range(start + block, n, block):
            if search.best == 0 or float(along[second] - along[mine.stop - 1]) - slack > search.reach * (1 + 1e-9):
                break
            looked += search.look(mine, slice(second, second + block))
        report((number + 1) / len(starts))
    bounded = _around(search.best, d)
    first, second = sorted(search.pair)
    return ClosestRows(first, second, bounded, looked / (n * (n - 1) / 2))


def _require_finite(matrix: Tensor) -> int:
    """Return the exponent of the largest entry.

    Raises:
        ValueError: an entry is NaN, infinite or beyond 2^1000.
    """
    bad = (~torch.isfinite(matrix)).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"matrix: row {int(bad[0])} (and {len(bad) - 1} more) has NaN or infinite entries, which have no distances; remove these "
            "samples"
        )
    exponent = exponent_of(matrix)
    if exponent > LARGEST_EXPONENT:
        raise ValueError(
            f"matrix: entries of up to {float(matrix.abs().max()):.1e}, whose distances overflow; divide the matrix by a constant"
        )
    return exponent


def _around(value: float, columns: int) -> Bounded:
    """Return the interval of a distance as ``distance_of`` computes it, whose last product may be subnormal."""
    method = "difference of the two rows"
    if value == 0:
        return Bounded(0.0, 0.0, 0.0, True, method)
    found = Bounded.around(value, math.ulp(0.0), gamma(columns + 4, torch.float64), certified=True, method=method)
    # Rows at a computed distance are not equal, so their distance is at least the smallest positive number.
    return replace(found, lower=max(found.lower, math.ulp(0.0)))


@dataclass
class _Search:
    matrix: Tensor
    exponent: int  # of the largest entry
    order: Tensor  # row numbers in the matrix, sorted
    rows: Tensor  # of the scaled matrix, centred, sorted
    norms: Tensor
    relative: float
    labels: Tensor | None  # sorted like the rows
    best: float = math.inf
    pair: tuple[int, int] = (0, 1)

    @property
    def reach(self) -> float:
        """The best distance so far in units of the scaled matrix, rounded up."""
        return ldexp_up(self.best, -self.exponent)

    def look(self, mine: slice, theirs: slice) -> int:
        """Compare two blocks, or a block with itself, and return the number of pairs."""
        left, right = self.rows[mine], self.rows[theirs]
        here, there = self.norms[mine, None], self.norms[None, theirs]
        squares = torch.addmm(here.square() + there.square(), left, right.T, alpha=-2)
        lower = squares - self.relative * (here + there).square()
        own = mine.start == theirs.start
        if own:
            lower[torch.ones_like(lower, dtype=torch.bool).tril()] = math.inf
        if self.labels is not None:
            lower[self.labels[mine, None] == self.labels[None, theirs]] = math.inf
        # The most promising pair first, because it usually settles all others.
        if lower.numel():
            row, column = divmod(int(lower.argmin()), lower.shape[1])
            if math.isfinite(float(lower[row, column])):
                self._compare(torch.tensor([[row + mine.start, column + theirs.start]]))
        open_pairs = ((lower <= self.reach**2 * (1 + 1e-12) + UNDERFLOW) & (lower < math.inf)).nonzero()
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
    """Compute |x_i - y_i| row by row with a relative error of gamma_{d+4}; it is zero only where the rows are equal."""
    difference = first - second
    scale = difference.abs().amax(1)
    unit = difference / torch.where(scale > 0, scale, 1.0)[:, None]
    distances: Tensor = torch.linalg.vector_norm(unit, dim=1) * scale
    return distances


def _axis(centred: Tensor) -> Tensor:
    """Estimate the unit vector along which the rows spread most; it affects the speed only."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(centred.shape[1], generator=generator, dtype=torch.float64).to(centred.device)
    for _ in range(AXIS_STEPS):
        vector = centred.T @ (centred @ (vector / vector.norm().clamp_min(1e-300)))
    norm = vector.norm()
    return vector / norm if float(norm) > 0 else torch.zeros_like(vector)
