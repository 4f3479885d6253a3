"""The findings of `lightning-conv lab frei`: checks and rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_conv.recipes.lab.report import Check
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.frei import FREI, KOU, Margins, NearOrthogonality


@dataclass(frozen=True)
class DataSet:
    """Training and test inputs after one map; the rows of the training inputs have norm 1."""

    name: str
    train: Tensor
    test: Tensor
    orthogonality: NearOrthogonality


@dataclass(frozen=True)
class Run:
    """One network trained on one data set."""

    data: DataSet
    slope: float
    steps: list[int]
    stable_ranks: list[float]
    spreads: list[float]  # smallest over largest margin
    movement: list[float]  # stable rank of W - W(0) at the steps, NaN at 0
    bounds: list[float]  # of the movement, by ``stable_rank_bound``
    settled: int | None  # step from which on ``patterns_settle`` is true; None: never certain
    third: float  # third over first singular value of the movement since then; NaN: never certain
    turned: int  # pairs (j, i) at the end with another sign of w_j . x_i than sign(a_j y_i)
    ranks: dict[int, int]  # step -> singular values above 1e-3 of the largest
    margins: Margins  # at the end, over |W|_F
    linear: float  # share of the test samples on which sign f = sign of the linear part

    @property
    def criterion(self) -> Criterion:
        """The condition on the data: Frei et al.'s for a leaky ReLU, Kou et al.'s with C = 1 for the ReLU."""
        return self.data.orthogonality.criteria(self.slope)[-1]

    @property
    def covered(self) -> bool:
        """Whether the condition on the data is certified."""
        return self.criterion.verdict == "certified"


def checks_of(runs: Sequence[Run]) -> list[Check]:
    """Check the inequalities that are proven at every step, and what the theorems state about the limit.

    Args:
        runs: one run per data set and slope.
    """
    covered, others = [r for r in runs if r.covered], [r for r in runs if not r.covered]
    leaky = [r for r in covered if r.slope > 0]

    def said(chosen: Sequence[Run], value: Callable[[Run], str]) -> str:
        return "; ".join(f"{r.data.name}, gamma {r.slope:g}: {value(r)}" for r in chosen) or "no run"

    def ranks(r: Run) -> str:
        early, late = r.stable_ranks[r.steps.index(1)], max(r.stable_ranks[1:])
        return f"{r.stable_ranks[0]:.1f} before, {early:.2f} after, {late:.2f} at most later"

    def moved(r: Run) -> str:
        pairs = list(zip(r.movement[1:], r.bounds[1:], strict=True))
        return f"{max(rank for rank, _ in pairs):.3f} at most, bound {min(bound for _, bound in pairs):.4g} at least"

    slanted = [r for r in runs if r.slope > 0]
    certain = [r for r in slanted if r.settled is not None and not math.isnan(r.third)]
    most = max((max(r.stable_ranks[1:]) for r in covered), default=math.nan)
    flow, descent = f"{FREI}, theorem on gradient flow (in the limit)", f"{FREI}, theorem on gradient descent; {KOU}"
    return [
        # The theorems do not apply where the condition on the data fails: then there is no check, only the tables.
        Check("some data satisfy the condition on near-orthogonality (for the others: not applicable)", f"{FREI}; {KOU}", bool(leaky),
              "not applicable: " + said(others, lambda r: f"kappa {r.criterion.measured:.3g}, needs {r.criterion.bound:.3g}")),
        Check("leaky ReLU, any data: the stable rank of W - W(0) is at most lambda_max / lambda_min of X X^T times (1 + q)^2 / (4 q), "
              "q = gamma min A / max A, at every step looked at", f"derived; {FREI}, theorem on gradient descent",
              all(rank <= bound * (1 + 1e-9) for r in slanted for rank, bound in zip(r.movement[1:], r.bounds[1:], strict=True)),
              said(slanted, moved)),
        Check("leaky ReLU, data that satisfy the condition: once every sign of w_j . x_i is certain to be that of a_j y_i it is so, "
              "and what "
              "moves has rank two (third singular value below 1e-9 of the first)", f"derived; {FREI}, theorem on gradient flow",
              all(r.third <= 1e-9 and r.turned == 0 for r in certain),
              said(certain, lambda r: f"certain from step {r.settled} on, {r.turned} other signs, third over first {r.third:.1e}")),
        Check("one step brings the stable rank to 4 or less, and there it stays", descent, most <= 4, said(covered, ranks), must=False),
        Check("two singular values at most above 1e-3 of the largest at the end (leaky ReLU)", flow,
              bool(leaky) and all(r.ranks[r.steps[-1]] <= 2 for r in leaky), said(leaky, lambda r: f"{r.ranks[r.steps[-1]]}"), must=False),
        Check("the margins of all samples agree to 5 % at the end", f"{FREI}; {KOU} (in the limit)",
              bool(covered) and all(r.spreads[-1] > 0.95 for r in covered), said(covered, lambda r: f"{r.spreads[-1]:.4f}"), must=False),
        Check("the boundary is linear: sign f(x) = sign(sum a_j w_j . x) on all test images (leaky ReLU)", flow,
              bool(leaky) and all(r.linear == 1 for r in leaky), said(leaky, lambda r: f"{r.linear:.3f}"), must=False),
    ]  # fmt: skip


def data_row(data: DataSet, slopes: Sequence[float]) -> dict[str, object]:
    """Return the table row of one data set: kappa and the verdicts on the conditions."""
    found = data.orthogonality
    row: dict[str, object] = {"data": data.name, "dimension": data.train.shape[1], "kappa": found.kappa.value}
    for slope in slopes:
        for criterion in found.criteria(slope):
            if slope > 0 or criterion.source == KOU:
                row[f"{criterion.name}, {criterion.bound:.3g}"] = criterion.verdict
    return row


def row(r: Run) -> dict[str, object]:
    """Return the table row of one run: column -> value."""
    at_one = r.steps.index(1)
    return {
        "data": r.data.name,
        "gamma": r.slope,
        "hypothesis": "holds" if r.covered else "not applicable",
        "stable rank, start": r.stable_ranks[0],
        "after one step": r.stable_ranks[at_one],
        "end": r.stable_ranks[-1],
        "rank (1e-3), start": r.ranks[0],
        "rank, one step": r.ranks[1],
        "rank, end": r.ranks[r.steps[-1]],
        "margin / |W|_F, least": r.margins.smallest,
        "margin spread": r.margins.spread,
        "linear on test": r.linear,
    }


def plain(r: Run) -> dict[str, object]:
    """Return a run as plain numbers for the JSON file: one list per measured quantity, over ``steps``."""
    return {"data": r.data.name, "slope": r.slope, "steps": r.steps, "stable_rank": r.stable_ranks, "spread": r.spreads,
            "movement": r.movement, "bound": r.bounds}  # fmt: skip
