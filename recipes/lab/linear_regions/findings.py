"""The findings of `lightning-conv lab linear_regions`: checks and rows of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_conv.recipes.lab.report import Check
from lightning_conv.theory.papers.linear_regions import LinearRegions, most_regions, typical_regions

SOURCE = "Montufar et al. 2014; Serra et al. 2018"


@dataclass(frozen=True)
class Run:
    """One trained network."""

    widths: tuple[int, ...]
    seed: int
    start: LinearRegions
    end: LinearRegions
    loss: float
    off: float  # largest difference between the network and the line through its kinks, over the size of the values
    curve: Tensor | None = None  # (points, 2), of the first seed


def checks_of(runs: Sequence[Run], folded: dict[int, LinearRegions], width: int) -> list[Check]:
    """Check the counts against the bounds and the networks themselves."""
    off = max(r.off for r in runs)
    most = max(max(r.start.pieces, r.end.pieces) / most_regions(r.widths) for r in runs)
    ratio = [r.start.activation_regions / typical_regions(r.widths) for r in runs]
    grown = max(r.end.pieces / typical_regions(r.widths) for r in runs)
    kogan = "Hanin, Rolnick 2019; Kogan, Jananthan, Kepner 2025 (infinite width)"
    return [
        Check("between two neighbouring kinks the network is straight", "the count itself", off < 1e-9, f"off by {off:.1e} of its size"),
        Check("pieces <= product of (width + 1)", SOURCE, most <= 1, f"at most {most:.3g} of the bound is used"),
        Check("the folding network has 2^depth pieces", "Telgarsky 2016", all(f.pieces == 2**d for d, f in folded.items()),
              ", ".join(f"{d}: {f.pieces}" for d, f in folded.items())),
        Check("at the start about one breakpoint a unit at any depth (to 25 %)", kogan, all(0.75 <= value <= 1.25 for value in ratio),
              f"regions over (sum of widths + 1): {min(ratio):.2f} to {max(ratio):.2f}", must=False),
        Check("trained networks have fewer than 3 (sum of widths + 1) pieces", "observed; Hanin, Rolnick 2019", grown < 3,
              f"at most {grown:.2f} times, at width {width}", must=False),
    ]  # fmt: skip


def row(runs: Sequence[Run], depth: int) -> dict[str, object]:
    """Return the table row of one depth, means over the seeds: column -> value."""
    mine = [r for r in runs if len(r.widths) == depth]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "hidden layers": depth,
        "units": sum(mine[0].widths),
        "pieces, start": mean([r.start.pieces for r in mine]),
        "pieces, end": mean([r.end.pieces for r in mine]),
        "of them in [0, 1]": mean([r.end.within(0, 1) for r in mine]),
        "activation regions, end": mean([r.end.activation_regions for r in mine]),
        "sum of widths + 1": typical_regions(mine[0].widths),
        "most possible": most_regions(mine[0].widths),
        "mean squared error": mean([r.loss for r in mine]),
    }


def folded_row(depth: int, found: LinearRegions) -> dict[str, object]:
    """Return the table row of one folding network: column -> value."""
    return {
        "hidden layers": depth,
        "pieces": found.pieces,
        "2^depth": 2**depth,
        "most possible": most_regions(found.widths),
    }


def plain(r: Run) -> dict[str, object]:
    """Return a run as plain numbers for the JSON file: widths, seed, pieces before and after, kinks and loss."""
    counts = {"start": r.start.pieces, "end": r.end.pieces, "kinks": r.end.kinks}
    return {"widths": r.widths, "seed": r.seed, **counts, "loss": r.loss}
