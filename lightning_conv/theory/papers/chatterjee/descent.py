"""The consequences of Chatterjee's criterion for gradient descent, judged in a run that is observed at some steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_conv.theory.criterion import Criterion, at_least, at_most
from lightning_conv.theory.papers.chatterjee.ratio import length_bound
from lightning_conv.theory.tools.observation import Observation, every_step, infimum_of_ratios

CHATTERJEE = "Chatterjee 2022 (2203.16462)"


def descent_criteria(history: Sequence[Observation], *, epsilon: float = 0.5) -> list[Criterion]:
    """Judge what Chatterjee's criterion implies for gradient descent: efficiency, linear rate, path length.

    The rate and the length are judged at the measured step that comes closest to a violation, or violates them most.

    The infimum of |grad f|^2 / f over the measured steps is an upper bound of that over all steps. Unless every step
    was measured, a rate or a length that violates a bound made from it is therefore ``undecided``. No observation can
    show that the criterion itself, 4 f_0 < r^2 alpha(w_0, r) for some r, is true, because alpha is an infimum over a
    ball.

    Args:
        history: Observations from the first step on, in order.
        epsilon: The share of the first-order decrease h |grad f|^2 that a step may lose to curvature, in (0, 1).

    Returns:
        The criteria ``descent_efficiency``, ``linear_rate`` and ``path_length``, in this order.

    Raises:
        ValueError: epsilon is out of range.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: {epsilon}; pass a share in (0, 1)")
    efficiency = min((e for seen in history if not math.isnan(e := seen.efficiency)), default=math.nan)
    infimum = infimum_of_ratios(history)
    shrunk, rate = _slowest(history, infimum, epsilon)
    length, bound = _longest(history, infimum, epsilon)
    source, measured = f"{CHATTERJEE}, Theorem on gradient descent", "inf over the steps measured"
    decrease = f"(f_t - f_{{t+1}}) / (h |grad f_t|^2) >= 1 - eps, eps = {epsilon:g}"
    slope = "mean decrease of log f per step, from the start to any step >= -log(1 - (1 - eps) h inf a)"
    path = "sum h |grad f| <= 2 (sqrt f_0 - sqrt f_t) / ((1 - eps) sqrt inf a) at every t"
    first = at_least("descent_efficiency", source, decrease, efficiency, 1 - epsilon)
    later = (
        at_least("linear_rate", source, f"{slope}, {measured}", shrunk, rate),
        at_most("path_length", source, f"{path}, {measured}", length, bound),
    )
    if every_step(history):
        return [first, *later]
    # Between the measured steps the ratio may be smaller, and with it the bounds of the last two.
    why = "; not every step was measured, and the infimum over all of them may be smaller"
    open_ = (replace(each, verdict="undecided", reason=each.reason + why) for each in later)
    return [first, *(new if old.verdict == "refuted" else old for old, new in zip(later, open_, strict=True))]


def _slowest(history: Sequence[Observation], infimum: float, epsilon: float) -> tuple[float, float]:
    """Find the smallest mean decrease of log f from the start to a later step, and the rate of the theorem."""
    steps = [seen.step_size for seen in history if not math.isnan(seen.step_size)]
    if not (steps and 0 < infimum < math.inf and history[0].loss > 0):
        return math.nan, math.nan
    first, rate = history[0], -math.log1p(-min((1 - epsilon) * min(steps) * infimum, 1 - 1e-16))
    slowest = math.nan
    for seen in history[1:]:
        taken = seen.step - first.step
        if not (seen.loss > 0 and taken > 0):
            continue
        decrease, rounding = -math.log(seen.loss / first.loss) / taken, 10 * seen.noise / taken
        clear = _clear(first, seen) or decrease + rounding < rate or seen is history[-1]
        if clear and not decrease >= slowest:
            slowest = decrease
    return slowest, rate


def _longest(history: Sequence[Observation], infimum: float, epsilon: float) -> tuple[float, float]:
    """Find the path length and its bound at the step where their quotient is largest; at the start both are 0."""
    if not (history and 0 < infimum < math.inf):
        return math.nan, math.nan
    first, worst, largest = history[0], (math.nan, math.nan), -math.inf
    start = max(first.loss, 0.0)
    for seen in history:
        if math.isnan(seen.path_length) or math.isnan(seen.loss):
            continue
        now, slack = max(seen.loss, 0.0), 10 * seen.noise
        bound = length_bound(start, now, infimum, epsilon=epsilon)
        loose = length_bound(start * (1 + slack), now * (1 - slack), infimum, epsilon=epsilon)
        if not (_clear(first, seen) or seen.path_length > loose or seen is history[-1]):
            continue
        share = seen.path_length / bound if bound > 0 else (math.inf if seen.path_length > 0 else 0.0)
        if share > largest:
            worst, largest = (seen.path_length, bound), share
    return worst


def _clear(first: Observation, seen: Observation) -> bool:
    """Return whether the loss has changed by far more than its rounding error since the start."""
    return abs(first.loss - seen.loss) > 100 * seen.noise * first.loss
