"""The activation patterns 1{X v >= 0} of n samples over all directions v, found by linear programs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_PROGRAMS = 20_000
"""Largest number of linear programs of an enumeration; each takes a millisecond or two."""


@dataclass(frozen=True)
class Arrangement:
    """The patterns 1{X v >= 0} over all directions v, as columns."""

    patterns: Tensor  # D, (n, p), 0 and 1, distinct columns
    directions: Tensor  # (d, p), one v for each column
    general_position: bool  # any min(n, rank) rows of X are linearly independent, decided in exact arithmetic
    complete: bool  # proven to be all patterns; otherwise this relies on the solver's decision what is infeasible

    @property
    def count(self) -> int:
        """Number p of patterns."""
        return self.patterns.shape[1]


def cell_count(n: int, rank: int) -> int:
    """Compute 2 sum_{k < r} C(n - 1, k), the number of sign patterns of n rows of rank r in general position.

    The patterns are those without zeros (Cover 1965). For rows that are not in general position it is an upper bound.

    Example:
        >>> cell_count(4, 2), cell_count(5, 3), cell_count(3, 3)
        (8, 22, 8)
    """
    return 2 * sum(comb(n - 1, k) for k in range(rank))


def arrangement_patterns(inputs: Tensor) -> Arrangement:
    """Enumerate all patterns 1{X v >= 0} by a tree over the samples.

    Linear programs decide how a branch of the tree can be extended. A branch requires <x_i, v> >= 1 where the pattern
    is 1 and for <x_i, v> <= -1 where it is 0. If only directions with <x_i, v> = 0 are possible (v = 0 if no half-space
    contains all samples, and rows that are not in general position), the boundary is allowed. The directions are
    verified in rational arithmetic, so every listed pattern occurs. In general position the list is complete if it has
    ``cell_count`` patterns in addition to the pattern of v = 0, which is all ones.

    Args:
        inputs: X, (n, d); add a column of ones for a bias.

    Raises:
        ValueError: ``inputs`` is not a matrix, or there are too many patterns to enumerate; the message says how many.
        ModuleNotFoundError: scipy is missing.

    Cost: about 2 n linear programs per pattern, and of the order of n^r / r! patterns for rank r.
    """
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(f"inputs: shape {tuple(inputs.shape)}; need a matrix with one row per sample")
    rows: NDArray[np.float64] = inputs.detach().cpu().double().numpy()
    n, rank = len(rows), int(np.linalg.matrix_rank(rows))
    programs = sum(cell_count(i, min(rank, i)) for i in range(1, n + 1))
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"inputs: {n} samples of rank {rank} have up to {cell_count(n, rank):,} patterns, about {programs:,} linear programs; take "
            "fewer samples or fewer features"
        )
    found = [_Branch(np.zeros(rows.shape[1]), [], strict=True)]
    for i in range(1, n + 1):
        found = [longer for branch in found for bit in (1, 0) if (longer := branch.extended(rows[:i], bit)) is not None]
    exact = [[Fraction(value) for value in row] for row in rows.tolist()]
    kept = {tuple(branch.bits): branch.v for branch in found if branch.verified(exact)}
    general = _general_position(exact, rank)
    cells = sum(branch.strict for branch in found if tuple(branch.bits) in kept)
    patterns = torch.tensor(list(kept), dtype=torch.float64).T.contiguous()
    directions = torch.tensor(np.array(list(kept.values()))).T.contiguous()
    return Arrangement(patterns, directions, general, complete=general and cells == cell_count(n, rank))


@dataclass(frozen=True)
class _Branch:
    """A node of the tree: a pattern of the first samples and a direction that has it."""

    v: NDArray[np.float64]
    bits: list[int]
    strict: bool  # whether no sample lies on the boundary

    def extended(self, rows: NDArray[np.float64], bit: int) -> _Branch | None:
        """Return the branch with one more sample on the given side, or None if there is no such direction."""
        bits = [*self.bits, bit]
        value = float(rows[-1] @ self.v)
        if self.strict and bits[:-1] and (value >= 1 if bit else value <= -1):
            return _Branch(self.v, bits, strict=True)
        if self.strict and (v := _direction(rows, bits, margin=1.0)) is not None:
            return _Branch(v, bits, strict=True)
        v = _direction(rows, bits, margin=0.0)
        return None if v is None else _Branch(v, bits, strict=False)

    def verified(self, exact: list[list[Fraction]]) -> bool:
        """Check in rational arithmetic that v has these bits; on the boundary to 1e-7, because v is rounded."""
        v = [Fraction(value) for value in self.v.tolist()]
        values = [sum(a * b for a, b in zip(row, v, strict=True)) for row in exact]
        slack = Fraction(0) if self.strict else Fraction(1, 10**7)
        return all(value >= -slack if bit else value < 0 for value, bit in zip(values, self.bits, strict=True))


def _direction(rows: NDArray[np.float64], bits: list[int], margin: float) -> NDArray[np.float64] | None:
    """Find a v with <x_i, v> >= margin where the bit is 1 and <x_i, v> <= -1 where it is 0; None if there is none."""
    try:
        from scipy.optimize import linprog
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "arrangement_patterns solves linear programs with scipy, which is not installed; run: pip install scipy"
        ) from error
    sides = np.where(np.array(bits) == 1, -1.0, 1.0)
    bounds = np.where(np.array(bits) == 1, -margin, -1.0)
    # Scale the rows to norm one, because the solver's tolerance is absolute.
    norms = np.maximum(np.linalg.norm(rows, axis=1), np.finfo(float).tiny)
    done = linprog(
        np.zeros(rows.shape[1]), A_ub=sides[:, None] * rows / norms[:, None], b_ub=2 * bounds, bounds=(None, None)
    )
    return None if done.x is None or done.status != 0 else np.asarray(done.x) / norms.min()


def _general_position(exact: list[list[Fraction]], rank: int) -> bool:
    """Return whether any min(n, r) rows are linearly independent."""
    return all(
        _rank([exact[i] for i in chosen]) == min(rank, len(exact)) for chosen in combinations(range(len(exact)), rank)
    )


def _rank(rows: list[list[Fraction]]) -> int:
    """Compute the rank by elimination in rational arithmetic."""
    rows, rank = [list(row) for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank
