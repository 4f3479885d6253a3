"""The findings of `lightning-conv lab kawaguchi_sun`: checks, rows of the tables and curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_conv.last_layer import Comparator, HeadCurvature, gradient_descent_bound, linear_bound
from lightning_conv.recipes.lab.kawaguchi_sun.phase_one import PhaseOne
from lightning_conv.recipes.lab.report import Check, log_spaced, with_verdict
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import ExpressivityFacts, judge_expressivity


@dataclass(frozen=True)
class HeadDescent:
    """Gradient descent on one head, with its proven bounds."""

    name: str
    gaps: Tensor  # L(w_t) - inf L, (T + 1,)
    family: list[Comparator]
    curvature: HeadCurvature
    mu: float | None  # squared loss with rank n: (L_ell / n) sigma_min^2, proven
    floor: float  # squared loss: the smallest loss that any head reaches
    criteria: list[Criterion]


def curve(each: HeadDescent) -> dict[str, Any]:
    """Return ``step``, ``loss``, ``bound`` and ``linear bound`` at about a hundred steps, evenly spaced in the logarithm."""
    steps = log_spaced(len(each.gaps) - 1, 100)
    bounds = [gradient_descent_bound(each.family, each.curvature.step, t) for t in steps]
    linear = [linear_bound(float(each.gaps[0]), each.curvature.step, each.mu, t) for t in steps] if each.mu else []
    return {"step": steps, "loss": each.gaps[steps].tolist(), "bound": bounds, "linear bound": linear}


def phase_one_checks(wide: PhaseOne) -> list[Check]:
    """Check that rank n is certified throughout phase 1 and that the loss falls.

    Rank n at one weight vector implies it for almost every one, so only rounding can hide it.
    """
    n = wide.after.facts.certificate.n
    ranks = [look.facts.certificate.rank_lower for look in wide.looks]
    lost = n - wide.looks[-1].facts.certificate.rank_lower
    source = "Kawaguchi, Sun, Assumption on expressivity"
    return [
        Check(
            "wide: rank [h, 1] = n is certified at every look of phase 1", source, min(ranks) == n,
            f"least {min(ranks)} of {n} at {len(ranks)} looks; {lost} short at tau", must=False,
        ),
        Check(
            "wide: the loss of phase 1 falls", "nobody", wide.looks[-1].loss < wide.looks[0].loss,
            f"{wide.looks[0].loss:.4g} to {wide.looks[-1].loss:.4g}; {wide.after.loss:.4g} after the noise", must=False,
        ),
    ]  # fmt: skip


def moments(each: PhaseOne, after: ExpressivityFacts) -> list[tuple[str, ExpressivityFacts]]:
    """Return (moment, facts) at the start, at step tau and after the noise was added."""
    return [("at the start", each.looks[0].facts), ("at tau", each.looks[-1].facts), ("after the noise", after)]


def rank_checks(facts: dict[str, ExpressivityFacts]) -> list[Check]:
    """Check that rank n of the wide layer is certified, and report the verdicts on the narrow one."""
    wide, narrow = (judge_expressivity(facts[name]) for name in ("wide", "narrow"))
    judged = [("wide", wide[0], True), *(("narrow", criterion, False) for criterion in narrow)]
    return [Check.of(c, name, verdicts=("certified",), seen=with_verdict(c), must=must) for name, c, must in judged]


def run_checks(each: HeadDescent) -> list[Check]:
    """Check the bounds of one descent, and its losses against the smallest loss of any head if that is known."""
    checks = [Check.of(criterion, each.name) for criterion in each.criteria]
    if each.floor:
        lowest = float(each.gaps.min())
        seen = f"floor {each.floor:.6g}, lowest loss {lowest:.6g}"
        checks += [
            Check(
                f"{each.name}: no loss lies below rho^2 |Y|^2 / (n C), rho the alignment residual", "least squares",
                lowest >= each.floor * (1 - 1e-12), seen,
            ),
            Check(
                f"{each.name}: the loss comes within a tenth of that floor", "nobody", lowest <= 1.1 * each.floor, seen, must=False
            ),
        ]  # fmt: skip
    return checks


def facts_row(name: str, facts: ExpressivityFacts) -> dict[str, Any]:
    """Return the table row of the features at one moment: column -> value (rank, singular values, verdict)."""
    certificate, residual = facts.certificate, facts.alignment.residual if facts.alignment else None
    return {
        "features": name, "verdict": certificate.verdict, "rank at least": certificate.rank_lower, "n": certificate.n,
        "sigma_min": certificate.sigma_min.value if certificate.sigma_min else 0.0,
        "sigma_max": certificate.sigma_max.value if certificate.sigma_max else 0.0, "log phi": facts.log_phi.value,
        "condition number": facts.condition_number, "stable rank": facts.stable_rank, "effective rank": facts.effective_rank,
        "alignment residual": residual.value if residual else float("nan"),
    }  # fmt: skip


def run_row(each: HeadDescent) -> dict[str, Any]:
    """Return the table row of one descent on the head: column -> value."""
    last = len(each.gaps) - 1
    return {
        "run": each.name, "step 1 / L_H": each.curvature.step, "loss at the start": float(each.gaps[0]),
        "loss in the end": float(each.gaps[-1]),
        "bound in the end": gradient_descent_bound(each.family, each.curvature.step, last),
        "linear bound in the end": linear_bound(float(each.gaps[0]), each.curvature.step, each.mu, last) if each.mu else float("nan"),
        "floor": each.floor,
    }  # fmt: skip
