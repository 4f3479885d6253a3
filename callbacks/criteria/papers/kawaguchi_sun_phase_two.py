"""Phase 2 of an ``ExpressivityGuard`` as criteria: its step, its gaps against their bound, and what its certificate proves."""

from __future__ import annotations

import math
from dataclasses import replace

import lightning.pytorch as pl

from lightning_conv.callbacks.criteria.certificates import voided
from lightning_conv.callbacks.guard.callback import ExpressivityGuard
from lightning_conv.callbacks.guard.head.descent import HeadDescent
from lightning_conv.theory.criterion import Criterion, Verdict, not_applicable
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import SOURCE
from lightning_conv.theory.papers.kawaguchi_sun.phase_two import EITHER, STEP, THEOREM, judge_head_gaps, judge_head_step

WHERE = ", L the mean loss on the training set"
INFIMUM = "inf of L over the last layer = (1/n) sum_i inf ell_i, below which no weights of any network come"
ASKED = {"head_step": (SOURCE, STEP), "head_bound": (THEOREM, EITHER), "phase_two_infimum": (THEOREM, INFIMUM)}


def find_guard(trainer: pl.Trainer) -> ExpressivityGuard | None:
    """The run's ``ExpressivityGuard``, or None."""
    found = [c for c in trainer.callbacks if isinstance(c, ExpressivityGuard)]  # type: ignore[attr-defined]
    return found[0] if found else None


def phase_two_criteria(guard: ExpressivityGuard | None) -> list[Criterion]:
    """What the theorem says of phase 2, of the mean loss on the training set: ``head_step``, ``head_bound``, ``phase_two_infimum``.

    Args:
        guard: of the run, or None.

    Returns:
        Where every step was a plain full-batch gradient step on the head, of a proven size: whether the step was at most 1 / L_H
        (``undecided`` beyond it, of which the theorem is silent), and the measured gap that used up the largest share of its bound.
        Otherwise ``not applicable``, with the last gap. And the guard's own verdict, ``consistent`` where it is certified up to an
        estimated rounding inside the trunk.
    """
    return [replace(each, asks=each.asks + WHERE) for each in _criteria(guard)]


def _criteria(guard: ExpressivityGuard | None) -> list[Criterion]:
    if guard is None:
        return _all_not_applicable("the run has no ExpressivityGuard")
    if guard.phase == 1:
        if guard.declined:
            return _all_not_applicable(f"phase 2 was not entered: {guard.reason}")
        why = f"phase 2 has not begun ({guard.reason})"
        return [replace(each, verdict="undecided") for each in _all_not_applicable(why)]
    return [*_of_steps(guard.descent), _of_infimum(guard)]


def _all_not_applicable(reason: str) -> list[Criterion]:
    return [not_applicable(name, source, asks, reason) for name, (source, asks) in ASKED.items()]


def _of_steps(descent: HeadDescent) -> list[Criterion]:
    found = []
    if descent.curvature is None or (math.isnan(descent.step) and descent.not_covered):
        why = descent.not_covered or "L_H of the head's loss is not known"
        found.append(not_applicable("head_step", *ASKED["head_step"], why, descent.step))
    elif math.isnan(descent.step):
        taken = bool(descent.gaps) and descent.gaps[-1].steps > 0
        why = "every step of phase 2 had rate 0 so far" if taken else "no step of phase 2 was taken yet"
        found.append(Criterion("head_step", *ASKED["head_step"], math.nan, math.nan, "undecided", why))
    else:
        step = judge_head_step(descent.step, descent.curvature)
        # A step that is too long is what ends the cover: it stays what it is.
        void = descent.not_covered and step.verdict == "consistent"
        found.append(voided(step, descent.not_covered) if void else step)
    if descent.not_covered:
        found.append(not_applicable("head_bound", *ASKED["head_bound"], descent.not_covered, descent.last_gap))
    else:
        found.append(judge_head_gaps(descent.gaps))
    return found


_VERDICTS: dict[str, Verdict] = {"certified": "certified", "refuted": "refuted", "undecided": "undecided"}


def _of_infimum(guard: ExpressivityGuard) -> Criterion:
    certificate, verdict = guard.certificate, _VERDICTS.get(guard.verdict, "not applicable")
    shown = None if certificate is None else certificate.residual or certificate.sigma_min
    reason = "; ".join(part for part in (guard.why, *guard.caveats) if part)
    if verdict == "certified":
        reason = "" if certificate is None else certificate.reason
        if certificate is not None and certificate.feature_error > 0:
            verdict = "consistent"
            reason += "; certified up to the rounding inside the trunk, which is an estimate"
    measured = math.nan if shown is None else shown.value
    return Criterion("phase_two_infimum", *ASKED["phase_two_infimum"], measured, 0.0, verdict, reason or guard.reason)
