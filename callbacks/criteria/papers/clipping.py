"""Tucat et al. 2025 in a run: descent, rate and path length of delta-GClip (``RegularizedGradientClipping``)."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace

from lightning_conv.callbacks.clipping import RegularizedGradientClipping
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria
from lightning_conv.callbacks.run.assumptions import EVERYWHERE
from lightning_conv.callbacks.run.callbacks import find_callback
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.callbacks.run.worst_step import worst_at
from lightning_conv.theory.criterion import Criterion, at_least, at_most, not_applicable
from lightning_conv.theory.papers.clipping import SOURCE, clipped_loss_bound, clipped_path_bound
from lightning_conv.theory.tools.observation import Observation, every_step, infimum_of_ratios

DESCENT = "clipping_descent", SOURCE, "(f_t - f_{t+1}) / (h_t |grad f_t|^2) >= 1/2"
RATE = (
    "clipping_step_rate",
    SOURCE,
    "f_{t+1} / f_t <= 1 - h_t mu / 2, h_t >= eta delta, mu the smallest |grad f|^2 / f measured",
)
LENGTH = "clipping_length", SOURCE, "sum_t h_t |grad f_t| <= 4 sqrt(f_0 / mu), mu the smallest |grad f|^2 / f measured"


@register_criteria
class ClippingTracker(CriteriaTracker):
    """Judges the descent of clipped steps; its state is the run's history."""

    name, position = "clipping", 50
    source = SOURCE
    assumes = EVERYWHERE - {"unclipped"} | {"full batch", "whole set", "attained infimum", "smooth"}

    def observe(self, run: RunView, step: Observation) -> dict[str, float]:
        """Return ``clipped_contraction``: 1 - eta delta mu / 2 with mu = inf a, the largest f_{t+1} / f_t that is promised."""
        infimum = infimum_of_ratios(run.history)
        clipping = find_callback(run.trainer, RegularizedGradientClipping)
        known = 0 < infimum < math.inf and run.history[0].loss > 0 and not math.isnan(step.step_size)
        if clipping is not None and known:
            with suppress(ValueError, KeyError):
                eta = step.step_size / clipping.metrics["clipping/factor"]
                bound = clipped_loss_bound(1.0, eta=eta, delta=clipping.delta, mu=infimum, steps=1)
                return {"clipped_contraction": bound}
        return {}

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return ``clipping_descent``, ``clipping_step_rate`` and ``clipping_length``."""
        if find_callback(run.trainer, RegularizedGradientClipping) is None:
            return [
                not_applicable(*each, "the run has no RegularizedGradientClipping") for each in (DESCENT, RATE, LENGTH)
            ]
        history, mu = run.history, infimum_of_ratios(run.history)
        clear = [seen for seen in history if not math.isnan(seen.efficiency)]
        found = [at_least(*DESCENT, min((seen.efficiency for seen in clear), default=math.nan), 0.5)]
        if clear and math.isfinite(mu):
            seen = max(clear, key=lambda each: each.contraction + each.step_size * mu / 2)
            found.append(worst_at(at_most(*RATE, seen.contraction, 1 - seen.step_size * mu / 2), seen.step))
        else:
            found.append(at_most(*RATE, math.nan, math.nan))
        longest = clipped_path_bound(max(history[0].loss, 0.0), mu) if mu > 0 else math.nan
        path = at_most(*LENGTH, history[-1].path_length, longest)
        if path.verdict == "refuted" and not every_step(history):
            why = f"{path.reason}; between the steps measured mu may be smaller"
            path = replace(path, verdict="undecided", reason=why)
        return [*found, path]
