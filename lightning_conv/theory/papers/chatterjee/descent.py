"""What Chatterjee's criterion implies for gradient descent, checked against a run that is observed at some of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_conv.theory.criterion import Criterion, at_least, at_most
from lightning_conv.theory.papers.chatterjee.ratio import length_bound
from lightning_conv.theory.tools.observation import Observation, every_step, infimum_of_ratios

CHATTERJEE = "Chatterjee 2022 (2203.16462)"


def descent_criteria(history: Sequence[Observation], *, epsilon: float = 0.5) -> list[Criterion]:
    """The consequences of Chatterjee's criterion for gradient descent, held against what was seen.

    The last two are judged at the step, of those measured, where they come nearest to failing or fail most.

    The infimum over the steps measured is an upper bound of that over all steps; unless every step was measured, a rate or a length that
    fails against it is ``undecided``. That the criterion itself holds, 4 f_0 < r^2 alpha(w_0, r) for some r, no observation can show:
    alpha is an infimum over a ball.

    Args:
        history: observations from the first step on, in order.
        epsilon: of the theorem, in (0, 1): the share of the descent that a step may lose to curvature.

    Raises:
        ValueError: epsilon is out of range.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: {epsilon}; need a share in (0, 1)")
    efficiency = min((e for seen in history if not math.isnan(e := seen.efficiency)), default=math.nan)
    infimum = infimum_of_ratios(history)
    shrunk, rate = _slowest(history, infimum, epsilon)
    length, bound = _longest(history, infimum, epsilon)
    found = [
        at_least(
            "descent_efficiency", f"{CHATTERJEE}, Theorem on gradient descent",
            f"(f_t - f_{{t+1}}) / (h |grad f_t|^2) >= 1 - eps, eps = {epsilon:g}", efficiency, 1 - epsilon,
        ),
        at_least(
            "linear_rate", f"{CHATTERJEE}, Theorem on gradient descent",
            "mean decrease of log f a step, from the start to any step >= -log(1 - (1 - eps) h inf a), inf over the steps measured",
            shrunk, rate,
        ),
        at_most(
            "path_length", f"{CHATTERJEE}, Theorem on gradient descent",
            "sum h |grad f| <= 2 (sqrt f_0 - sqrt f_t) / ((1 - eps) sqrt inf a) at every t, inf over the steps measured", length, bound,
        ),
    ]  # fmt: skip
    if every_step(history):
        return found
    # Between the steps measured the ratio may be smaller, and with it what the last two ask for.
    why = "; not every step was measured, and the infimum over all of them may be smaller"
    return [
        found[0],
        *(
            replace(each, verdict="undecided", reason=each.reason + why) if each.verdict == "refuted" else each
            for each in found[1:]
        ),
    ]


def _slowest(history: Sequence[Observation], infimum: float, epsilon: float) -> tuple[float, float]:
    """The smallest mean decrease of log f from the start to a later step, and the rate that the theorem promises."""
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
    """Path length and its bound at the step where their quotient is largest; at the start both are 0."""
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
    """Whether the loss has changed by far more than its rounding since the start."""
    return abs(first.loss - seen.loss) > 100 * seen.noise * first.loss
