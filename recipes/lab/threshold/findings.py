"""The findings of `lightning-conv lab threshold`: the checks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_conv.recipes.lab.report import Check
from lightning_conv.theory.papers.threshold import (
    SOURCE,
    Arrangement,
    ThresholdOptimum,
    cell_count,
    shattered_optimum,
    solve_threshold_network,
)


@dataclass(frozen=True)
class StraightThrough:
    """The runs of one width from several seeds, each with the best objective that it visited."""

    width: int
    objectives: list[float]
    sampled: list[float]  # optima of the convex program on as many random patterns, from the same seeds

    def excess(self, optimum: ThresholdOptimum) -> list[float]:
        """Return objective / (certified lower bound of the optimum) - 1 of every run."""
        return [value / optimum.lower - 1 for value in self.objectives]

    def sampled_excess(self, optimum: ThresholdOptimum) -> float:
        """Return the median optimum on random patterns, relative to the same lower bound, minus 1."""
        return statistics.median(self.sampled) / optimum.lower - 1


def arrangement_checks(arrangement: Arrangement, n: int) -> list[Check]:
    """Check the number of patterns against the formula for samples in general position."""
    expected = cell_count(n, 3)
    return [
        Check(
            "the patterns are 2 sum_{k < r} C(n - 1, k) for samples in general position", "Cover 1965",
            arrangement.count == expected or not arrangement.general_position,
            f"n = {n}, r = 3: {arrangement.count} patterns, formula {expected}, general position: {arrangement.general_position}",
        ),
    ]  # fmt: skip


def optimum_checks(
    inputs: Tensor,
    targets: Tensor,
    arrangement: Arrangement,
    optima: dict[float, ThresholdOptimum],
    trained: dict[float, list[StraightThrough]],
) -> list[Check]:
    """Check the certified optimum, and that no trained network is below it."""
    gaps = max(optimum.gap / optimum.objective for optimum in optima.values())
    lowest = min(min(each.excess(optima[beta])) for beta, widths in trained.items() for each in widths)
    reached = max(
        abs(_network_loss(inputs, targets, arrangement, optimum, beta) / optimum.objective - 1)
        for beta, optimum in optima.items()
    )
    units = max(optimum.units for optimum in optima.values())
    return [
        Check("the LASSO is solved: duality gap below 1e-6 of the optimum", SOURCE, gaps < 1e-6, f"largest {gaps:.1e}"),
        Check("no straight-through network is below the certified optimum", SOURCE, lowest >= 0, f"closest: {lowest:.2%} above"),
        Check(
            "a network built from the solution has the optimum as its weight-decay loss", SOURCE, reached < 1e-9,
            f"relative difference {reached:.1e}, with directions of norm 1e-8",
        ),
        Check("the optimum needs at most n units", SOURCE, units <= len(targets), f"{units} for n = {len(targets)}"),
        Check(
            "straight-through training finds the optimum to 1 %", SOURCE, lowest < 0.01, f"best run {lowest:.2%} above", must=False
        ),
    ]  # fmt: skip


def _network_loss(
    inputs: Tensor, targets: Tensor, arrangement: Arrangement, optimum: ThresholdOptimum, beta: float
) -> float:
    """Return 1/2 |f(X) - y|^2 + beta/2 |theta|^2, evaluated on the network itself."""
    used = optimum.weights != 0
    directions = arrangement.directions[:, used]
    directions = 1e-8 * directions / directions.norm(dim=0).clamp(min=1e-300)
    root = optimum.weights[used].abs().sqrt()
    outputs = ((inputs @ directions >= 0).double() * root) @ (root * optimum.weights[used].sign())
    decay = directions.square().sum() + 2 * root.square().sum()
    return float(0.5 * (outputs - targets).square().sum() + beta / 2 * decay)


def shattered_checks(targets: Tensor, arrangement: Arrangement, decay: Sequence[float]) -> list[Check]:
    """Check the closed form of the optimum where all patterns exist."""
    worst = 0.0
    for beta in decay:
        closed, optimum = (
            shattered_optimum(targets, beta)[1],
            solve_threshold_network(arrangement.patterns, targets, beta),
        )
        worst = max(worst, abs(closed / optimum.objective - 1))
    n = len(targets)
    return [
        Check(f"{n} linearly independent digits are shattered", SOURCE, arrangement.count == 2**n, f"{arrangement.count} patterns"),
        Check(
            "their optimum is min_d 1/2 |d - y|^2 + beta (max (d)_+ + max (-d)_+)", SOURCE, worst < 1e-6, f"relative difference {worst:.1e}"
        ),
    ]  # fmt: skip
