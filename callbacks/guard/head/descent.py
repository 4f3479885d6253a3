"""``HeadDescent``: the head's steps in phase 2 with their measured gaps and bounds, for a comparison with the theorem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_conv.callbacks.guard.settings import StepRule
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.theory.papers.kawaguchi_sun.phase_two import HeadGap


@dataclass(frozen=True)
class HeadDescent:
    """The head's steps since their rule was set up."""

    not_covered: str  # reason why they are not plain full-batch gradient steps with a proven bound; empty: they are
    step: float  # the largest eta; NaN: not known
    curvature: Bounded | None  # L_H
    gaps: list[HeadGap]  # the measurements with a bound
    last_gap: float  # L - L* at the last measurement; NaN: not known


def descent_of(
    steps: Mapping[str, Any],
    rule: StepRule,
    history: Sequence[Mapping[str, float]],
    caveats: Sequence[str],
    curvature: Bounded | None,
) -> HeadDescent:
    """Summarise the head's steps from the state of a guard.

    Args:
        steps: State of the step rule.
        rule: Requested step rule.
        history: Measurements of phase 2 in order, one dict per measurement.
        caveats: Reasons why the guarantee is limited.
        curvature: L_H, the smallest Lipschitz constant of the gradient of the head's mean loss; None: not known.
    """
    gaps: list[HeadGap] = []
    for entry in history:
        if "head_steps" not in entry:
            continue
        taken = int(entry["head_steps"])
        if gaps and taken <= gaps[-1].steps:  # the count began again: a new plan, from another start
            gaps = []
        gaps.append(HeadGap(taken, entry["head_gap"], entry["bound"], entry["bound_rounded"], entry["head_gap_lower"]))
    step = max(float(steps.get("largest", 0.0)), float(steps.get("first", 0.0))) or math.nan
    gap = next((entry["gap"] for entry in reversed(history) if "gap" in entry), math.nan)
    return HeadDescent(_why_not(steps, rule, caveats), step, curvature, gaps, gap)


def _why_not(steps: Mapping[str, Any], rule: StepRule, caveats: Sequence[str]) -> str:
    if caveats:
        return "; ".join(caveats)
    if steps.get("rule") == "solve":
        return "the head's problem was solved at the switch, there are no steps"
    if (why := steps.get("given_up")) is not None:
        return str(why)
    if "gap" in steps:  # the plan has a bound, at least the gap at its start
        return ""
    return str(steps.get("no_bound", f"nothing is known of the steps of step_rule={rule!r}"))
