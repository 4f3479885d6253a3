"""Kawaguchi & Sun 2021 in a run: expressivity of the last hidden features, and phase 2 of an ``ExpressivityGuard``."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria
from lightning_conv.callbacks.guard.callback import ExpressivityGuard
from lightning_conv.callbacks.guard.head.descent import HeadDescent
from lightning_conv.callbacks.run.assumptions import on_the_probe, without_verdict
from lightning_conv.callbacks.run.callbacks import find_callback
from lightning_conv.callbacks.run.features import LastFeatures
from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion, not_applicable
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import (
    SOURCE,
    ExpressivityFacts,
    expressivity_facts,
    judge_expressivity,
)
from lightning_conv.theory.papers.kawaguchi_sun.phase_two import EITHER, STEP, THEOREM, judge_head_gaps, judge_head_step

RANK = "rank [h, 1] = n, that is sigma_min([h, 1]) > 0"
WHERE = ", L the mean loss on the training set"
INFIMUM = "inf of L over the last layer = (1/n) sum_i inf ell_i, below which no weights of any network come"
ASKED = {"head_step": (SOURCE, STEP), "head_bound": (THEOREM, EITHER), "phase_two_infimum": (THEOREM, INFIMUM)}


@register_criteria
class KawaguchiSunTracker(CriteriaTracker):
    """Judges the expressivity condition on the probe and phase 2 of a guard on the training set; it has no state of its own."""

    name, position = "kawaguchi_sun", 80
    source = SOURCE
    assumes = frozenset({"smooth", "fixed data"})

    def __init__(self) -> None:
        self._features: ExpressivityFacts | str = "not looked at"

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Look at the last hidden features and return ``feature_quantities``."""
        self._features = find_facts(run.features, run.targets)
        return {} if isinstance(self._features, str) else feature_quantities(self._features)

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return ``expressivity_condition`` and ``alignment``; on a part of the training set nothing is certified."""
        if isinstance(self._features, str):
            return [not_applicable("expressivity_condition", SOURCE, RANK, self._features)]
        return [on_the_probe(each, whole_set=run.whole_set) for each in judge_expressivity(self._features)]

    def unconditional(self, run: RunView) -> list[Criterion]:
        """Return ``phase_two_criteria``, which are about the frozen trunk, whatever the network and the probe are."""
        return phase_two_criteria(find_callback(run.trainer, ExpressivityGuard))

    def finish(self, run: RunView) -> bool:
        """Return whether there is a guard: it measures at the end of an epoch, and checks the trunk at the end of training."""
        return find_callback(run.trainer, ExpressivityGuard) is not None


def find_facts(features: LastFeatures | str, targets: Tensor | None) -> ExpressivityFacts | str:
    """Compute rank [h, 1] of the features and whether the targets lie in the range of [h, 1], or say why that is not known.

    Args:
        features: h, or why there are none.
        targets: numbers or class numbers, one row per sample; any others are left out.

    Cost: the singular values of an n x (m_H + 1) matrix.
    """
    if isinstance(features, str):
        return features
    with attempted(*READING) as attempt:
        rows = _rows(targets, len(features.values))
        return expressivity_facts(
            features.values, rows, bias=features.bias, feature_error=features.error, narrow=features.narrow
        )
    return str(attempt.error)


def _rows(targets: Tensor | None, samples: int) -> Tensor | None:
    """Return the targets as ``certify_expressivity`` takes them, or None."""
    if targets is None or len(targets) != samples:
        return None
    if targets.is_floating_point():
        rows = targets.detach().cpu().double().reshape(samples, -1)
        return rows if float(rows.norm()) > 0 else None
    return targets.detach().cpu() if targets.ndim == 1 else None


def feature_quantities(facts: ExpressivityFacts) -> dict[str, float]:
    """Return log phi, the ends of the spectrum and the ranks of [h, 1], and what the last layer cannot reach of the targets.

    ``sigma_min`` is the n-th singular value, 0 where there are fewer columns than samples. Its lower bound is proven up to the estimated
    rounding inside the trunk, and 0 where nothing is.
    """
    certified = facts.certificate.sigma_min
    found = {
        "log_phi": facts.log_phi.value,
        "sigma_max": facts.sigma_max,
        "sigma_min": facts.sigma_min,
        "sigma_min_lower": math.nan if certified is None else certified.lower,
        "condition_number": facts.condition_number,
        "stable_rank": facts.stable_rank,
        "effective_rank": facts.effective_rank,
        "rank_share": facts.certificate.rank_lower / facts.certificate.n,
    }
    if facts.alignment is not None and facts.alignment.residual is not None:
        found["alignment_residual"] = facts.alignment.residual.value
    return found


def phase_two_criteria(guard: ExpressivityGuard | None) -> list[Criterion]:
    """Judge phase 2 by the mean loss on the training set: ``head_step``, ``head_bound``, ``phase_two_infimum``.

    Args:
        guard: of the run, or None.

    Returns:
        Where every step was a plain full-batch gradient step on the head, of a proven size: whether the step was at most 1 / L_H
        (``undecided`` beyond it, where the theorem says nothing), and the measured gap that used up the largest share of its bound.
        Otherwise these two are ``not applicable``, with the last gap. The third is the guard's own verdict, ``consistent`` where it is
        certified up to an estimated rounding inside the trunk.
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
        # A step that is too long is itself the reason why no bound applies: its verdict stays.
        uncovered = descent.not_covered and step.verdict == "consistent"
        found.append(without_verdict(step, descent.not_covered) if uncovered else step)
    if descent.not_covered:
        found.append(not_applicable("head_bound", *ASKED["head_bound"], descent.not_covered, descent.last_gap))
    else:
        found.append(judge_head_gaps(descent.gaps))
    return found


def _of_infimum(guard: ExpressivityGuard) -> Criterion:
    certificate, verdict = guard.certificate, guard.verdict
    shown = None if certificate is None else certificate.residual or certificate.sigma_min
    reason = "; ".join(part for part in (guard.why, *guard.caveats) if part)
    if verdict == "certified":
        reason = "" if certificate is None else certificate.reason
        if certificate is not None and certificate.feature_error > 0:
            verdict = "consistent"
            reason += "; certified up to the rounding inside the trunk, which is an estimate"
    measured = math.nan if shown is None else shown.value
    return Criterion("phase_two_infimum", *ASKED["phase_two_infimum"], measured, 0.0, verdict, reason or guard.reason)
