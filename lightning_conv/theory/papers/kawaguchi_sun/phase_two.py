"""Kawaguchi and Sun's second phase as criteria: the step of the head against 1 / L_H, its gaps against the proven bounds.

The bounds are those of ``lightning_conv.last_layer``. ``judge_phase_two`` judges a descent whose every loss is known, ``judge_head_gaps``
one that was measured now and then, with what the rounding of its steps may have added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_conv.last_layer import Comparator, HeadCurvature, gradient_descent_bound, linear_bound
from lightning_conv.linalg.eigenvalues.bounded import Bounded, divide
from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import SOURCE

THEOREM = f"{SOURCE}, Theorem 2"
ROUNDING = 1e-9

STEP = "eta <= 1 / L_H, L_H = (L_ell / n) sigma_max([h, 1])^2"
SUBLINEAR = "L(w_t) - L* <= min over w of L(w) - L* + |w_0 - w|^2 / (2 eta t), at every t"
LINEAR = "L(w_t) - L* <= (1 - eta mu)^(2 t) (L(w_0) - L*), squared loss, at every t"
EITHER = "L(w_t) - L* <= min over w of L(w) - L* + |w_0 - w|^2 / (2 eta t), squared loss: and (1 - eta mu)^(2 t) (L(w_0) - L*)"


@dataclass(frozen=True)
class HeadGap:
    """One measurement of a head that descends, t steps after it began."""

    steps: int  # t
    gap: float  # L(w_t) - L*
    bound: float  # that exact steps keep to
    rounded: float  # the same for the steps as they were, ``rounded_bound``
    lower: float  # of the gap, rounding of its measurement included

    @property
    def share(self) -> float:
        """Of the bound that is used up."""
        return share_used(self.gap, self.bound)


def share_used(gap: float, bound: float) -> float:
    """gap / bound; 0 where the gap is none, infinite where a bound of 0 is not kept."""
    return 0.0 if gap <= 0 else divide(gap, bound)


def judge_head_step(step: float, curvature: Bounded) -> Criterion:
    """``head_step``: eta against 1 / L_H, the theorem's hypothesis: ``consistent`` up to there, ``undecided`` beyond.

    The theorem is silent about longer steps: that they fail is not shown. Up to 2 / L_H the loss still never rises (descent lemma).

    Args:
        step: eta, on the mean loss; the largest that was taken.
        curvature: L_H.
    """
    most = 1 + ROUNDING
    allowed, surely = (divide(most, end) for end in (curvature.upper, curvature.lower))
    falls = divide(2.0, curvature.upper)
    found = at_most("head_step", SOURCE, STEP, step, allowed)
    if found.verdict != "refuted":
        return found
    if step <= surely:
        said = f"{step:.4g} lies between 1 / L_H with L_H from above, {allowed:.4g}, and from below, {surely:.4g}"
    elif step <= falls:
        said = f"{found.reason}, beyond which the bound is not proven; up to 2 / L_H = {falls:.4g} the loss still never rises"
    else:
        said = f"{found.reason}, beyond which the bound is not proven, and above 2 / L_H = {falls:.4g}, beyond which nothing is"
    return replace(found, verdict="undecided", reason=said)


def judge_head_gaps(gaps: Iterable[HeadGap]) -> Criterion:
    """``head_bound``: the gap at the measurement that used up the largest share of its bound, after at least one step.

    ``refuted`` only where the gap, less the rounding of its measurement, lies above what the bound becomes with the rounding of the
    steps; ``undecided`` in between.

    Args:
        gaps: of one unbroken descent, every step at most 1 / L_H.
    """
    taken = [each for each in gaps if each.steps > 0]
    if not taken:
        return Criterion(
            "head_bound", THEOREM, EITHER, math.nan, math.nan, "undecided", "no step of phase 2 was measured yet"
        )
    # One that is above all rounding speaks louder than a larger share that rounding explains.
    worst = max(taken, key=lambda each: (each.lower > each.rounded, each.share))
    found = at_most("head_bound", THEOREM, EITHER, worst.gap, worst.bound * (1 + ROUNDING))
    where = (
        f"{worst.share:.3g} of the bound is used up (the worst of {len(taken)} measurements, after {worst.steps} steps)"
    )
    if found.verdict == "refuted" and not worst.lower > worst.rounded:
        said = f"{worst.gap:.4g} > {worst.bound:.4g}, which the rounding of the steps explains (with it {worst.rounded:.4g})"
        found = replace(found, verdict="undecided", reason=said)
    return replace(found, bound=worst.bound, reason=f"{found.reason}; {where}")


def judge_phase_two(
    gaps: Tensor, step: float, comparators: Sequence[Comparator], curvature: HeadCurvature, *, mu: float | None = None
) -> list[Criterion]:
    r"""Hold the losses of a head's gradient descent against the theorem's bounds, at every step.

    Args:
        gaps: L(w_t) - L*, t = 0..T, of the mean loss; steps are constant.
        step: eta.
        comparators: by ``lightning_conv.last_layer.comparators``, for the first of these weights.
        curvature: by ``head_curvature``: the theorem asks for eta <= 1 / L_H.
        mu: (L_ell / n) sigma_min([h, 1])^2 or less, for a squared loss: adds the linear bound.

    Returns:
        ``head_step``: eta against 1 / L_H, here ``refuted`` beyond it, as whoever chose the step claims that it is shorter.
        ``head_bound``: largest share of min over comparators of L(w) - L* + |w_0 - w|^2 / (2 eta t) that is used up; ``head_linear``:
        the same of (1 - eta mu)^{2t} (L(w_0) - L*).

    Raises:
        ValueError: fewer than two losses.
    """
    if len(gaps) < 2:
        raise ValueError(f"gaps: {len(gaps)}; need the losses before and after at least one step")
    values = gaps.tolist()
    most = 1 + ROUNDING
    later = list(enumerate(values))[1:]
    share = max(share_used(gap, gradient_descent_bound(comparators, step, t)) for t, gap in later)
    chosen = judge_head_step(step, curvature.value)
    if step > divide(most, curvature.value.lower):
        chosen = replace(chosen, verdict="refuted")
    found = [chosen, at_most("head_bound", THEOREM, SUBLINEAR, share, most)]
    if mu is not None:
        linear = max(share_used(gap, linear_bound(values[0], step, mu, t)) for t, gap in later)
        found.append(at_most("head_linear", f"{SOURCE}, squared loss", LINEAR, linear, most))
    return found
