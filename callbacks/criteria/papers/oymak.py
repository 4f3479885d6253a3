"""Oymak & Soltanolkotabi 2019 in a run: the step against the largest eigenvalue, and misfit and distance under one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria
from lightning_conv.callbacks.run.assumptions import EVERYWHERE
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.callbacks.run.worst_step import worst_at
from lightning_conv.kernels.contraction import is_full
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion, at_most, not_applicable
from lightning_conv.theory.papers.oymak import SOURCE, STEP, Hypotheses, judge_step
from lightning_conv.theory.tools.observation import Observation

LINE = "(alpha / 4) |w_k - w_0| + |r_k| <= |r_0| at every k, with alpha^2 the smallest lambda_min(G) measured"
STEP_ASKS = f"{STEP} at every step, with beta^2 the largest lambda_max(G) measured"


@register_criteria
class OymakTracker(CriteriaTracker):
    """Judges Theorem 2.1 with alpha^2 and beta^2 the extreme eigenvalues of the kernels that were measured."""

    name, aliases, position = "oymak", ("oymak_soltanolkotabi",), 40
    source = SOURCE
    assumes = EVERYWHERE | {"full batch", "whole set", "squared loss", "smooth"}

    def __init__(self) -> None:
        self.least_lambda_min = math.inf  # the smallest lower bound of lambda_min(G) so far
        self.greatest_lambda_max = 0.0  # the largest lower bound of lambda_max(G) so far
        self._full = False  # whether the kernel is that of all outputs

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Keep the extreme eigenvalues; there are no scalars."""
        self.least_lambda_min = min(self.least_lambda_min, max(spectrum.lambda_min.lower, 0.0))
        self.greatest_lambda_max = max(self.greatest_lambda_max, spectrum.lambda_max.lower)
        self._full = is_full(gram)
        return {}

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return ``oymak_step`` and ``misfit_and_distance``."""
        seen = [each for each in run.history if not math.isnan(each.loss)]
        if run.scale is None or not self._full or not seen:
            reason = 'needs a squared loss and the full kernel, Probe(outputs="full")'
            return [
                not_applicable(name, SOURCE, asks, reason)
                for name, asks in (("oymak_step", STEP_ASKS), ("misfit_and_distance", LINE))
            ]
        # Nothing that is measured bounds L, so only the first factor of the condition can be judged. The theorem takes beta in the
        # whole ball, where it is larger: a step beyond this bound is beyond the theorem's.
        beta = math.sqrt(self.greatest_lambda_max) if self.greatest_lambda_max > 0 else math.nan
        known = Hypotheses(math.nan, math.sqrt(self.least_lambda_min), beta, lipschitz=math.nan)
        return [
            replace(judge_step(run.scale.step_on_sum(run.largest_rate), known), asks=STEP_ASKS),
            _line(seen, math.sqrt(self.least_lambda_min), run.scale.k),
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {"least_lambda": self.least_lambda_min, "greatest_lambda": self.greatest_lambda_max}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.least_lambda_min = float(state.get("least_lambda", math.inf))
        self.greatest_lambda_max = float(state.get("greatest_lambda", 0.0))


def _line(seen: Sequence[Observation], alpha: float, k: float) -> Criterion:
    """Judge the line at every observed step."""
    start, *later = [math.sqrt(2 * max(each.loss, 0.0) / k) for each in seen]
    # A distance of zero at the start would compare |r_0| with itself, rounding and all.
    allowed, name = start * (1 + 1e-6), "misfit_and_distance"
    if not later:
        return Criterion(name, SOURCE, LINE, math.nan, allowed, "undecided", "no step was taken yet")
    misfit, step = max(zip(later, [each.step for each in seen[1:]], strict=True))
    if misfit > allowed:
        found = at_most(name, SOURCE, LINE, misfit, allowed)
        return worst_at(replace(found, reason=f"|r_k| alone is too large, whatever alpha is: {found.reason}"), step)
    values = [alpha / 4 * each.distance + r for each, r in zip(seen[1:], later, strict=True)]
    value, step = max(zip(values, [each.step for each in seen[1:]], strict=True))
    found = at_most(name, SOURCE, LINE, value, allowed)
    if alpha == 0:
        why = "lambda_min(G) is not resolved above 0, and with alpha = 0 the line says nothing about the distance"
        return replace(found, verdict="undecided", reason=why)
    if found.verdict == "refuted":
        # The theorem takes alpha in the whole ball, where it may be smaller than at the weights that were measured.
        found = replace(found, verdict="undecided", reason=f"{found.reason}; alpha in the whole ball may be smaller")
    return worst_at(found, step)
