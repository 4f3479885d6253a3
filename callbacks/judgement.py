"""Evidence of a run against the theorems: which paper asks for what, and the verdicts, ``judge``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_conv.callbacks.certificates import ALLEN_ZHU, DU, own_lambda_0, voided
from lightning_conv.callbacks.hypotheses import EVERYWHERE, Breach, Hypothesis, breached
from lightning_conv.contraction import is_full
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.spectrum import Spectrum
from lightning_conv.theory.allen_zhu.semi_smoothness import Residual, fit_semi_smoothness
from lightning_conv.theory.clipping import SOURCE as CLIPPING
from lightning_conv.theory.criterion import Criterion, at_least, at_most
from lightning_conv.theory.du import step_criterion
from lightning_conv.theory.kawaguchi_sun import SOURCE as KAWAGUCHI
from lightning_conv.theory.loss_scale import LossScale
from lightning_conv.theory.observation import Observation, descent_criteria
from lightning_conv.theory.oymak import SOURCE as OYMAK


@dataclass(frozen=True)
class Evidence:
    """All that was measured in a run, on the probe."""

    history: Sequence[Observation]
    gram: KernelGram
    first_spectrum: Spectrum
    kernel: Sequence[Criterion]  # ``kernel_criteria``
    least_lambda: float  # smallest lower bound of lambda_min over the measurements
    scale: LossScale | None  # of a squared loss on the probe
    whole_set: bool  # whether the probe is the training set
    separation: Sequence[Criterion]  # ``separation_criteria``
    expressivity: Sequence[Criterion]  # ``expressivity_criteria``
    certified: Sequence[Criterion]  # ``descent_certificate`` of the start
    clipped: bool  # whether RegularizedGradientClipping is at work

    def alone(self) -> list[Observation]:
        """The observations whose step was seen."""
        return [seen for seen in self.history if not math.isnan(seen.next_loss)]


@dataclass(frozen=True)
class Paper:
    """A theorem and what it asks of a run."""

    source: str
    asks: frozenset[Hypothesis]
    criteria: Callable[[Evidence], list[Criterion]]


def judge(names: Iterable[str], evidence: Evidence, breaches: Sequence[Breach]) -> list[Criterion]:
    """The verdicts of the papers called ``names``; where a hypothesis is broken, ``not applicable`` with the measured number.

    Args:
        names: keys of ``PAPERS``.
        evidence: what was measured.
        breaches: hypotheses that do not hold.
    """
    found: list[Criterion] = []
    for paper in (PAPERS[name] for name in names):
        reason = breached(breaches, paper.asks)
        found += [voided(each, reason) if reason else each for each in paper.criteria(evidence)]
    return found


def _chatterjee(evidence: Evidence) -> list[Criterion]:
    return [*evidence.certified, *descent_criteria(evidence.history)]


def _clipping(evidence: Evidence) -> list[Criterion]:
    steps = [e for seen in evidence.history if not math.isnan(e := seen.efficiency)]
    asks = "(f_t - f_{t+1}) / (h_t |grad f_t|^2) >= 1/2"
    if not evidence.clipped:
        reason = "the run has no RegularizedGradientClipping"
        return [Criterion("clipping_descent", CLIPPING, asks, math.nan, math.nan, "not applicable", reason)]
    return [at_least("clipping_descent", CLIPPING, asks, min(steps, default=math.nan), 0.5)]


def _du(evidence: Evidence) -> list[Criterion]:
    seen = next((each for each in reversed(evidence.history) if not math.isnan(each.next_loss)), None)
    if seen is None or evidence.scale is None or math.isnan(seen.step_size) or not is_full(evidence.gram):
        return list(evidence.kernel)
    step, lambda_0 = evidence.scale.step_on_sum(seen.step_size), own_lambda_0(evidence.first_spectrum)
    rate = step * lambda_0.value / 2
    if seen.resolved and 0 < rate < 1:
        return [*evidence.kernel, step_criterion(seen.loss, seen.next_loss, step, lambda_0)]
    why = (
        "the change of the loss is rounding" if not seen.resolved else f"eta lambda_0 / 2 = {rate:.3g} is not in (0, 1)"
    )
    asks = "L(k+1) / L(k) <= 1 - eta lambda_0 / 2"
    return [*evidence.kernel, Criterion("step_contraction", DU, asks, seen.contraction, math.nan, "undecided", why)]


def _oymak(evidence: Evidence) -> list[Criterion]:
    source = OYMAK
    asks = "(alpha / 4) |w_k - w_0| + |r_k| <= |r_0| with alpha^2 the smallest lambda_min(G) measured"
    first, last, scale = evidence.history[0], evidence.history[-1], evidence.scale
    if scale is None or not is_full(evidence.gram) or math.isnan(last.loss):
        reason = 'needs a squared loss and the full kernel, Probe(outputs="full")'
        return [Criterion("misfit_and_distance", source, asks, math.nan, math.nan, "not applicable", reason)]
    alpha = math.sqrt(max(evidence.least_lambda, 0.0))
    misfit, start = (math.sqrt(2 * max(seen.loss, 0.0) / scale.k) for seen in (last, first))
    # A distance of zero at the start would compare |r_0| with itself, rounding and all.
    found = at_most("misfit_and_distance", source, asks, alpha / 4 * last.distance + misfit, start * (1 + 1e-6))
    if found.verdict != "refuted":
        return [found]
    # alpha is asked for in the whole ball, where it may be smaller than at the weights that were measured.
    return [replace(found, verdict="undecided", reason=f"{found.reason}; alpha in the whole ball may be smaller")]


def _allen_zhu(evidence: Evidence) -> list[Criterion]:
    found = list(evidence.separation)
    if not evidence.whole_set:
        where = "; on the probe, whose delta is an upper bound of the training set's"
        found = [
            replace(each, verdict="consistent", reason=each.reason + where) if each.verdict == "certified" else each
            for each in found
        ]
    infimum = min((seen.ratio for seen in evidence.history if not math.isnan(seen.loss)), default=math.nan)
    asks = "|grad F|^2 / F > 0 wherever it was measured"
    return [
        *found,
        _positive("no_critical_point", f"{ALLEN_ZHU}, Theorem 3", asks, infimum),
        _semi_smoothness(evidence.history),
    ]


def _semi_smoothness(history: Sequence[Observation]) -> Criterion:
    """The bound rho <= a sqrt(F) |V| + b |V|^2, fitted to every other observed step, twice that on the steps in between."""
    clear = [seen for seen in history if not math.isnan(seen.curvature) and seen.spectral > 0]
    steps = [Residual(seen.loss, seen.next_loss, seen.linear, seen.spectral) for seen in clear]
    source, asks = (
        f"{ALLEN_ZHU}, Theorem 4",
        "rho <= 2 (a sqrt(F) |V| + b |V|^2), a and b fitted to every other observed step",
    )
    try:
        used = fit_semi_smoothness(steps[::2]).use(steps[1::2])
    except ValueError:
        why = f"{len(steps)} steps were observed with a residual above rounding; it takes four"
        return Criterion("semi_smoothness", source, asks, math.nan, math.nan, "undecided", why)
    return at_most("semi_smoothness", source, asks, max(used, default=math.nan), 2.0)


def _positive(name: str, source: str, asks: str, measured: float) -> Criterion:
    """The criterion measured > 0."""
    found = at_least(name, source, asks, measured, sys.float_info.min)
    said = {"consistent": f"{measured:.4g} is above 0", "refuted": f"{measured:.4g} is not above 0"}
    return replace(found, bound=0.0, reason=said.get(found.verdict, found.reason))


def _kawaguchi_sun(evidence: Evidence) -> list[Criterion]:
    if evidence.whole_set:
        return list(evidence.expressivity)
    where = "; on the probe's samples only"
    return [
        replace(each, verdict="consistent", reason=each.reason + where) if each.verdict == "certified" else each
        for each in evidence.expressivity
    ]


PAPERS: dict[str, Paper] = {
    "chatterjee": Paper("Chatterjee 2022", EVERYWHERE | {"full batch", "whole set", "attained infimum", "smooth"}, _chatterjee),
    "du": Paper(DU, EVERYWHERE | {"full batch", "whole set", "squared loss"}, _du),
    "allen_zhu": Paper(ALLEN_ZHU, EVERYWHERE | {"squared loss"}, _allen_zhu),
    "oymak_soltanolkotabi": Paper(OYMAK, EVERYWHERE | {"full batch", "whole set", "squared loss", "smooth"}, _oymak),
    "clipping": Paper(CLIPPING, EVERYWHERE - {"unclipped"} | {"full batch", "whole set", "attained infimum", "smooth"}, _clipping),
    "kawaguchi_sun": Paper(KAWAGUCHI, frozenset({"smooth", "fixed data"}), _kawaguchi_sun),
}  # fmt: skip
"""Name -> what it asks for and how it is judged."""
