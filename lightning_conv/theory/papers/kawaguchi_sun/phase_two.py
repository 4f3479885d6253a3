"""Kawaguchi and Sun's second phase as criteria: the step against 1 / L_H and the loss gaps against the bounds.

The bounds come from ``lightning_conv.last_layer``. ``judge_phase_two`` judges a descent whose loss is known at every
step. ``judge_head_gaps`` judges a descent that was measured at some of its steps, and takes the rounding errors of the
steps into account.
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
    """One measurement of a head that is trained by gradient descent, after t steps."""

    steps: int  # t
    gap: float  # L(w_t) - L*
    bound: float  # upper bound of the gap for exact steps
    rounded: float  # upper bound for steps with rounding errors, ``rounded_bound``
    lower: float  # the gap less the rounding error of its measurement

    @property
    def share(self) -> float:
        """gap / bound, the share of the bound that is used up."""
        return share_used(self.gap, self.bound)


def share_used(gap: float, bound: float) -> float:
    """Compute gap / bound; 0 if the gap is not positive, infinite if a bound of 0 is exceeded."""
    return 0.0 if gap <= 0 else divide(gap, bound)


def judge_head_step(step: float, curvature: Bounded) -> Criterion:
    """Judge ``head_step``, the hypothesis eta <= 1 / L_H: ``consistent`` if it is true, otherwise ``undecided``.

    The theorem says nothing about larger steps, so they do not refute it. Up to 2 / L_H the loss still never rises
    (descent lemma).

    Args:
        step: Largest step size eta that was taken, on the mean loss.
        curvature: Lipschitz constant L_H of the gradient of the mean loss by the head.
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
    """Judge ``head_bound``: the gap at the measurement with the largest share of its bound, after at least one step.

    The verdict is ``refuted`` only if the gap, less the rounding error of its measurement, exceeds the bound that
    allows for the rounding errors of the steps. If it exceeds only the exact bound, the verdict is ``undecided``.

    Args:
        gaps: Measurements of one uninterrupted descent with steps of at most 1 / L_H.
    """
    taken = [each for each in gaps if each.steps > 0]
    if not taken:
        reason = "no step of phase 2 was measured yet"
        return Criterion("head_bound", THEOREM, EITHER, math.nan, math.nan, "undecided", reason)
    # A violation that rounding does not explain comes before a larger share that rounding explains.
    worst = max(taken, key=lambda each: (each.lower > each.rounded, each.share))
    found = at_most("head_bound", THEOREM, EITHER, worst.gap, worst.bound * (1 + ROUNDING))
    where = f"the worst of {len(taken)} measurements, after {worst.steps} steps"
    if found.verdict == "refuted" and not worst.lower > worst.rounded:
        said = f"{worst.gap:.4g} > {worst.bound:.4g}, which the rounding of the steps explains (with it {worst.rounded:.4g})"
        found = replace(found, verdict="undecided", reason=said)
    return replace(
        found, bound=worst.bound, reason=f"{found.reason}; {worst.share:.3g} of the bound is used up ({where})"
    )


def judge_phase_two(
    gaps: Tensor, step: float, comparators: Sequence[Comparator], curvature: HeadCurvature, *, mu: float | None = None
) -> list[Criterion]:
    r"""Judge the losses of a head's gradient descent against the theorem's bounds, at every step.

    Args:
        gaps: L(w_t) - L*, t = 0..T, of the mean loss, for a constant step size.
        step: Constant step size eta, on the mean loss.
        comparators: Comparators w of the first weights w_0, by ``lightning_conv.last_layer.comparators``.
        curvature: L_H, by ``head_curvature``; the theorem requires eta <= 1 / L_H.
        mu: (L_ell / n) sigma_min([h, 1])^2 or less, for a squared loss; adds the linear bound. None: no linear bound.

    Returns:
        - ``head_step``: eta against 1 / L_H. It is ``refuted`` for a larger step, because the caller claims to have
          chosen a valid one.
        - ``head_bound``: the largest share of min over comparators of L(w) - L* + |w_0 - w|^2 / (2 eta t) that is used
          up.
        - ``head_linear``, with ``mu``: the same for (1 - eta mu)^{2t} (L(w_0) - L*).

    Raises:
        ValueError: There are fewer than two losses.
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
