"""The findings of `lightning-conv lab oymak`: checks, rows of the tables and curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_conv.recipes.lab.report import Check, log_spaced, with_verdict
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.oymak import CertifiedHypotheses, Hypotheses, SampledHypotheses, misfits
from lightning_conv.theory.tools.descent import Descent


@dataclass(frozen=True)
class Case:
    """One descent on S, and the constants that are claimed for it."""

    name: str
    path: Descent
    claimed: Hypotheses
    seen: SampledHypotheses
    criteria: list[Criterion]  # of the constants, then of the line


def proven_checks(certified: CertifiedHypotheses, case: Case, until: float) -> list[Check]:
    """Check the proven hypotheses, and every conclusion for the run to which they apply."""
    first, share = certified.criterion, float(case.path.losses[-1] / case.path.losses[0])
    return [
        Check(first.asks, first.source, certified.holds, with_verdict(first)),
        *(Check.of(each, case.name) for each in case.criteria),
        Check(f"|r|^2 falls to {until:.0e} of its start", first.source, share <= until, f"{share:.3g} after {case.path.taken} steps"),
    ]  # fmt: skip


def row(case: Case) -> dict[str, Any]:
    """Return the table row of one run: column -> value."""
    path, r = case.path, misfits(case.path, 1.0)
    return {
        "run": case.name, "step on S": float(path.steps[0]), "steps": path.taken, "misfit at the start": float(r[0]),
        "largest misfit": float(r.max()), "misfit in the end": float(r[-1]), "farthest": float(path.distances.max()),
        "path length": float(path.lengths[-1]),
    }  # fmt: skip


def constants(case: Case) -> dict[str, Any]:
    """Return the claimed constants and the values sampled along the run, as a row of the table."""
    return {
        "run": case.name, "alpha": case.claimed.alpha, "least sigma_min(J) seen": case.seen.sigma_min, "beta": case.claimed.beta,
        "largest sigma_max(J) seen": case.seen.sigma_max, "L": case.claimed.lipschitz, "largest slope of J seen": case.seen.lipschitz,
        "radius": case.claimed.radius,
    }  # fmt: skip


def curve(case: Case) -> dict[str, Any]:
    """Return the run as plain numbers for the JSON file: ``step``, ``misfit``, ``distance`` and ``length``, one entry per step."""
    steps, r = log_spaced(case.path.taken, 150), misfits(case.path, 1.0)
    return {
        "step": steps, "misfit": r[steps].tolist(), "distance": case.path.distances[steps].tolist(),
        "length": case.path.lengths[steps].tolist(),
    }  # fmt: skip
