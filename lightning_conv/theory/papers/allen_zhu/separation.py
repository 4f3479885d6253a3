"""The data of Allen-Zhu, Li & Song 2019: their normalisation of the inputs, and the distances between inputs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_conv.expressivity.closest import ClosestRows, closest_rows
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import gamma, sum_down, sum_up
from lightning_conv.reporting.progress import Report, silent
from lightning_conv.theory.criterion import Criterion, at_least

BLOCK = 1024
AT_ONCE = 65_536
"""Number of pairs whose distance is computed from their difference at once."""

SOURCE = "Allen-Zhu, Li, Song 2019, Assumption 2.1"
SOURCE_BY_LABEL = "Zou, Cao, Zhou, Gu 2020, data separation"


def unit_inputs(inputs: Tensor) -> Tensor:
    r"""Normalise inputs to x~ = (x / (sqrt2 |x|), 1 / sqrt2), (n, d + 1), float64.

    The rows have norm 1, and their last entry is 1/sqrt2, which takes the place of a bias in the first layer. Two rows
    become equal if one input is a positive multiple of the other, since |x~ - x~'| = |x/|x| - x'/|x'|| / sqrt2.

    Args:
        inputs: Samples, (n, ...); all dimensions after the first are flattened.

    Raises:
        ValueError: An input is zero or not finite.

    Example:
        >>> unit_inputs(torch.tensor([[3.0, 4.0]])).square().sum(1)
        tensor([1.0000], dtype=torch.float64)
    """
    x = inputs.detach().double().flatten(1)
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    bad = ~(torch.isfinite(norms) & (norms > 0))
    if bool(bad.any()):
        raise ValueError(
            f"inputs: sample {int(bad.flatten().nonzero()[0])} has norm {float(norms[bad][0])}; it has no direction"
        )
    return torch.cat([x / norms, torch.ones_like(norms)], 1) / math.sqrt(2)


def direction_rounding(features: int) -> float:
    """Bound the rounding error that ``unit_inputs`` causes in a distance.

    Rounding moves a row by at most gamma_{d+9}, and therefore a distance by at most twice that. Two inputs that are
    positive multiples of one another in float64 end up at most this far apart.

    Args:
        features: Number d of entries of an input.
    """
    return 2 * gamma(features + 9, torch.float64)


def are_unit_inputs(inputs: Tensor, *, tolerance: float = 1e-4) -> bool:
    """Check whether all rows have norm 1 and last entry 1/sqrt2, as ``unit_inputs`` makes them.

    Args:
        inputs: Samples, (n, ...).
        tolerance: Absolute tolerance of both.
    """
    x = inputs.detach().double().flatten(1)
    off = torch.stack([torch.linalg.vector_norm(x, dim=1) - 1, x[:, -1] - 1 / math.sqrt(2)]).abs()
    return bool((off <= tolerance).all())


@dataclass(frozen=True)
class Separation:
    """Distances between n inputs after ``unit_inputs``."""

    delta: ClosestRows  # over all pairs: |x~_i - x~_j| >= delta
    by_label: ClosestRows | None  # over pairs with different labels (Zou et al.); None without labels
    below: dict[float, int]  # threshold -> number of pairs at that distance or closer

    def criteria(self, least: float = 0.0) -> list[Criterion]:
        """Judge the separation of all pairs, and by label if labels were given, against ``least``.

        With ``least`` = 0 no two inputs may have the same direction, which is what the theorem needs. ``certified``
        means proven for the inputs as float64 numbers.

        Returns:
            The criterion of delta over all pairs, then, with labels, that over pairs with different labels.
        """
        bound = max(least, sys.float_info.min)
        asks = "|x_i - x_j| >= delta for all i != j"
        found = [at_least("separation", SOURCE, asks, self.delta.distance, bound, proves=True)]
        if self.by_label is not None:
            asks, phi = "|x_i - x_j| >= phi where y_i != y_j", self.by_label.distance
            found.append(at_least("separation_by_label", SOURCE_BY_LABEL, asks, phi, bound, proves=True))
        return found


def separation(
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    below: Sequence[float] = (),
    normalised: bool = False,
    block: int = BLOCK,
    report: Report = silent,
) -> Separation:
    """Compute the separation delta of the data with a proven interval, its pair, and the number of close pairs.

    Duplicates and inputs that are positive multiples of one another have delta = 0. One such pair violates the
    hypothesis. A delta far below 1/L makes the width of the theorem, which is polynomial in 1/delta, useless. The
    number of close pairs shows whether close pairs are an exception or the rule (augmented copies).

    Args:
        inputs: Samples, (n, ...), before normalisation.
        labels: Classes, (n,); None: no separation by label.
        below: Thresholds at which pairs are counted.
        normalised: The inputs are ``unit_inputs`` already and are used as they are.
        block: Number of samples that are compared at once.
        report: Called with the share of the work that is done.

    Raises:
        ValueError: There are fewer than two inputs, an input is zero or not finite, or all labels are the same.

    Cost: at most n^2 d flops for each of delta, by_label and all thresholds together; memory O(block^2 + n d).

    Source: Allen-Zhu, Li, Song 2019, Assumption 2.1; by label: Zou, Cao, Zhou, Gu 2020.
    """
    x = inputs.detach().double().flatten(1) if normalised else unit_inputs(inputs)
    parts = 1 + (labels is not None) + bool(below)
    moved = direction_rounding(x.shape[1] - 1)
    delta = _widened(closest_rows(x, block=block, report=lambda done: report(done / parts)), moved)
    by_label = None
    if labels is not None:
        found = closest_rows(x, labels=labels, block=block, report=lambda done: report((1 + done) / parts))
        by_label = _widened(found, moved)
    counts = pairs_within(x, below, block=block) if below else {}
    return Separation(delta, by_label, counts)


def pairs_within(matrix: Tensor, distances: Sequence[float], *, block: int = BLOCK) -> dict[float, int]:
    r"""Count the pairs of rows at each distance or closer, every pair once.

    The squared distances come from a matrix product of the centred rows y_i, whose error is at most gamma_{d+16}
    (|y_i| + |y_j|)^2. Pairs that this error leaves undecided are computed from their difference. A pair is therefore
    counted on the wrong side only if its distance equals the threshold to a relative gamma_{d+4}, about 1e-14.

    Args:
        matrix: Rows, (n, d), float64.
        distances: Thresholds, 0 or larger; 0 counts equal rows.
        block: Number of rows that are compared at once.

    Returns:
        Threshold -> number of pairs.

    Raises:
        ValueError: A threshold is negative or NaN.

    Cost: n^2 d flops; O(block^2) memory.
    """
    if any(not distance >= 0 for distance in distances):
        raise ValueError(f"distances: {list(distances)}; each must be 0 or larger")
    rows = matrix - matrix.mean(0)
    norms = torch.linalg.vector_norm(rows, dim=1)
    relative = gamma(matrix.shape[1] + 16, torch.float64)
    counts = dict.fromkeys(distances, 0)
    for first in range(0, len(rows), block):
        mine = slice(first, first + block)
        for second in range(first, len(rows), block):
            theirs = slice(second, second + block)
            squares = torch.addmm(
                norms[mine, None].square() + norms[None, theirs].square(), rows[mine], rows[theirs].T, alpha=-2
            )
            error = relative * (norms[mine, None] + norms[None, theirs]).square()
            if first == second:
                squares[torch.ones_like(squares, dtype=torch.bool).tril()] = math.inf
            for distance in counts:
                below = squares + error <= distance**2
                in_question = ((squares - error <= distance**2) & ~below).nonzero()
                counts[distance] += int(below.sum())
                for pairs in in_question.split(AT_ONCE):
                    gaps = matrix[pairs[:, 0] + first] - matrix[pairs[:, 1] + second]
                    counts[distance] += int((torch.linalg.vector_norm(gaps, dim=1) <= distance).sum())
    return counts


def _widened(found: ClosestRows, by: float) -> ClosestRows:
    distance = found.distance
    lower, upper = max(sum_down(distance.lower, -by), 0.0), sum_up(distance.upper, by)
    wider = Bounded(distance.value, lower, upper, certified=True, method=distance.method)
    return replace(found, distance=wider)
