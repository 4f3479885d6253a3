"""Evidence of a run against the theorems: which paper asks for what, and the verdicts, ``judge``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_conv.callbacks.criteria.certificates import ALLEN_ZHU, StartCertificate, voided
from lightning_conv.callbacks.criteria.data_facts import DataFacts
from lightning_conv.callbacks.criteria.measured import Measured
from lightning_conv.callbacks.criteria.papers.allen_zhu_states import ForwardStability
from lightning_conv.callbacks.criteria.papers.bias_ntk_activation import SparseActivation
from lightning_conv.callbacks.criteria.papers.chatterjee_ball import BallSearch, ball_criterion
from lightning_conv.callbacks.criteria.papers.du_kernel import DU, OWN, not_of_the_paper
from lightning_conv.callbacks.criteria.worst import worst_at
from lightning_conv.callbacks.run.assumptions import EVERYWHERE, Breach, Hypothesis, breached
from lightning_conv.kernels.contraction import is_full
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.losses.scale import LossScale
from lightning_conv.theory.criterion import Criterion, at_least, at_most, not_applicable
from lightning_conv.theory.papers.allen_zhu.semi_smoothness import Residual, fit_semi_smoothness
from lightning_conv.theory.papers.bias_ntk import SOURCE as YANG
from lightning_conv.theory.papers.chatterjee.descent import descent_criteria
from lightning_conv.theory.papers.clipping import SOURCE as CLIPPING
from lightning_conv.theory.papers.clipping import clipped_path_bound
from lightning_conv.theory.papers.du.descent import step_contraction_criterion
from lightning_conv.theory.papers.frei import FREI
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import SOURCE as KAWAGUCHI
from lightning_conv.theory.papers.oymak import SOURCE as OYMAK
from lightning_conv.theory.tools.observation import Observation, every_step, infimum_of_ratios


@dataclass(frozen=True)
class Evidence:
    """All that was measured in a run, on the probe."""

    history: Sequence[Observation]
    measured: Measured
    scale: LossScale | None  # of a squared loss on the probe
    whole_set: bool  # whether the probe is the training set
    certificate: StartCertificate | None
    ball: BallSearch | None  # around the start; None: nothing was searched
    radius: float | None  # radii up to here are asked about
    infimum: float  # of the loss; 0 where it is not known
    largest_rate: float  # of all steps so far, on the run's loss; NaN: none, or not known
    data: DataFacts
    leaky: float | str  # gamma of the network of Frei et al., or why the run does not train it
    stability: ForwardStability
    sparse: SparseActivation
    clipped: bool  # whether RegularizedGradientClipping is at work
    phase_two: Sequence[Criterion]  # of the run's ExpressivityGuard
    linearised: Sequence[Criterion]  # of the observed steps, for the deep networks of Du et al.

    @property
    def gram(self) -> KernelGram:
        """The last kernel."""
        assert self.measured.gram is not None
        return self.measured.gram


@dataclass(frozen=True)
class Paper:
    """A theorem and what it asks of a run."""

    source: str
    asks: frozenset[Hypothesis]
    criteria: Callable[[Evidence], list[Criterion]]
    apart: Callable[[Evidence], Sequence[Criterion]] = lambda _: ()
    """Criteria that know their own hypotheses."""


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
        found += [_with_breaches(each, reason) if reason else each for each in paper.criteria(evidence)]
        found += paper.apart(evidence)
    return found


def _with_breaches(criterion: Criterion, reason: str) -> Criterion:
    """Not applicable for ``reason``, after that of its own where it was not anyway: another network is the first thing to know."""
    own = criterion.reason.split("; ") if criterion.verdict == "not applicable" else []
    return voided(criterion, "; ".join(dict.fromkeys([*own, *reason.split("; ")])))


def _chatterjee(evidence: Evidence) -> list[Criterion]:
    certified: list[Criterion] = []
    if evidence.certificate is not None:
        largest = math.nan if evidence.scale is None else evidence.scale.step_on_mean(evidence.largest_rate)
        certified = evidence.certificate.criteria(largest)
    in_the_ball = ball_criterion(evidence.history, evidence.ball, evidence.radius, infimum=evidence.infimum)
    return [*certified, in_the_ball, *descent_criteria(evidence.history)]


def _clipping(evidence: Evidence) -> list[Criterion]:
    asked = {
        "clipping_descent": "(f_t - f_{t+1}) / (h_t |grad f_t|^2) >= 1/2",
        "clipping_step_rate": "f_{t+1} / f_t <= 1 - h_t mu / 2, h_t >= eta delta, mu the smallest |grad f|^2 / f measured",
        "clipping_length": "sum_t h_t |grad f_t| <= 4 sqrt(f_0 / mu), mu the smallest |grad f|^2 / f measured",
    }
    if not evidence.clipped:
        reason = "the run has no RegularizedGradientClipping"
        return [not_applicable(name, CLIPPING, asks, reason) for name, asks in asked.items()]
    history, mu = evidence.history, infimum_of_ratios(evidence.history)
    (descent, descends), (rate, shrinks), (length, bounded) = asked.items()
    clear = [seen for seen in history if not math.isnan(seen.efficiency)]
    found = [at_least(descent, CLIPPING, descends, min((seen.efficiency for seen in clear), default=math.nan), 0.5)]
    if clear and math.isfinite(mu):
        seen = max(clear, key=lambda each: each.contraction + each.step_size * mu / 2)
        rated = at_most(rate, CLIPPING, shrinks, seen.contraction, 1 - seen.step_size * mu / 2)
        found.append(worst_at(rated, seen.step))
    else:
        found.append(at_most(rate, CLIPPING, shrinks, math.nan, math.nan))
    longest = clipped_path_bound(max(history[0].loss, 0.0), mu) if mu > 0 else math.nan
    path = at_most(length, CLIPPING, bounded, history[-1].path_length, longest)
    if path.verdict == "refuted" and not every_step(history):
        path = replace(path, verdict="undecided", reason=f"{path.reason}; between the steps measured mu may be smaller")
    return [*found, path]


OF_THE_START = frozenset(
    {"own_lambda_min_share", "kernel_drift", "limit_distance", "layer_norms", "layer_movement", "neuron_movement"}
)
"""Criteria of Du et al. that hold something against the start."""

LATE = "the run was not seen from its first step on, and the lemmas are about its initialisation"


def _du(evidence: Evidence) -> list[Criterion]:
    measured, scale = evidence.measured, evidence.scale
    found = [*measured.du.criteria, *evidence.linearised]
    if evidence.history[0].step != 0:
        found = [voided(each, LATE) if each.name in OF_THE_START else each for each in found]
    seen = [each for each in evidence.history if not math.isnan(each.next_loss) and not math.isnan(each.step_size)]
    if not seen or scale is None or not is_full(evidence.gram):
        return found
    lambda_0 = measured.lambda_0
    steps = [(each, scale.step_on_sum(each.step_size)) for each in seen]
    judged = [pair for pair in steps if pair[0].resolved and lambda_0.value > 0]
    if judged:
        each, step = max(judged, key=lambda pair: pair[0].contraction + pair[1] * lambda_0.value / 2)
        worst = worst_at(step_contraction_criterion(each.contraction, step, lambda_0), each.step)
    else:
        last = seen[-1]
        why = "the change of the loss is rounding" if not last.resolved else "lambda_0 is not resolved above 0"
        unseen = step_contraction_criterion(last.contraction, math.nan, lambda_0)
        worst = replace(unseen, measured=last.contraction, verdict="undecided", reason=why)
    if measured.du.of_the_paper:
        return [*found, worst]
    named = replace(worst, source=f"after {worst.source}", asks=f"{worst.asks}, {OWN}")
    return [*found, not_of_the_paper(named)]


def _oymak(evidence: Evidence) -> list[Criterion]:
    line = "(alpha / 4) |w_k - w_0| + |r_k| <= |r_0| at every k, with alpha^2 the smallest lambda_min(G) measured"
    steps = "h <= 1 / (2 beta^2) at every step, with beta^2 the largest lambda_max(G) measured"
    seen = [each for each in evidence.history if not math.isnan(each.loss)]
    scale, measured = evidence.scale, evidence.measured
    if scale is None or not is_full(evidence.gram) or not seen:
        reason = 'needs a squared loss and the full kernel, Probe(outputs="full")'
        return [
            not_applicable(name, OYMAK, asks, reason)
            for name, asks in (("oymak_step", steps), ("misfit_and_distance", line))
        ]
    # beta is asked for in the whole ball, where it is larger: a step beyond this is beyond the theorem's.
    allowed = 1 / (2 * measured.greatest_lambda_max) if measured.greatest_lambda_max > 0 else math.nan
    return [
        at_most("oymak_step", OYMAK, steps, scale.step_on_sum(evidence.largest_rate), allowed),
        _line(line, seen, math.sqrt(measured.least_lambda_min), scale.k),
    ]


def _line(asks: str, seen: Sequence[Observation], alpha: float, k: float) -> Criterion:
    """The line at every observed step."""
    start, *later = [math.sqrt(2 * max(each.loss, 0.0) / k) for each in seen]
    # A distance of zero at the start would compare |r_0| with itself, rounding and all.
    allowed, name = start * (1 + 1e-6), "misfit_and_distance"
    if not later:
        return Criterion(name, OYMAK, asks, math.nan, allowed, "undecided", "no step was taken yet")
    misfit, step = max(zip(later, [each.step for each in seen[1:]], strict=True))
    if misfit > allowed:
        found = at_most(name, OYMAK, asks, misfit, allowed)
        return worst_at(replace(found, reason=f"|r_k| alone is too large, whatever alpha is: {found.reason}"), step)
    values = [alpha / 4 * each.distance + r for each, r in zip(seen[1:], later, strict=True)]
    value, step = max(zip(values, [each.step for each in seen[1:]], strict=True))
    found = at_most(name, OYMAK, asks, value, allowed)
    if alpha == 0:
        why = "lambda_min(G) is not resolved above 0, and with alpha = 0 the line says nothing about the distance"
        return replace(found, verdict="undecided", reason=why)
    if found.verdict == "refuted":
        # alpha is asked for in the whole ball, where it may be smaller than at the weights that were measured.
        found = replace(found, verdict="undecided", reason=f"{found.reason}; alpha in the whole ball may be smaller")
    return worst_at(found, step)


def _allen_zhu(evidence: Evidence) -> list[Criterion]:
    found = evidence.data.of_separation(whole_set=evidence.whole_set)
    found += evidence.stability.criteria(from_the_start=evidence.history[0].step == 0)
    # Theorem 3, no critical point near the start, has unspecified constants: its quotients are logged, and no verdict follows.
    return [*found, _semi_smoothness(evidence.history)]


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


def _kawaguchi_sun(evidence: Evidence) -> list[Criterion]:
    if evidence.whole_set:
        return evidence.measured.of_features
    where = "; on the probe's samples only"
    return [
        replace(each, verdict="consistent", reason=each.reason + where) if each.verdict == "certified" else each
        for each in evidence.measured.of_features
    ]


def _implicit_bias(evidence: Evidence) -> list[Criterion]:
    slope, why_not = (evidence.leaky, "") if isinstance(evidence.leaky, float) else (None, evidence.leaky)
    return [evidence.data.of_orthogonality(slope, whole_set=evidence.whole_set, why_not=why_not)]


def _bias_ntk(evidence: Evidence) -> list[Criterion]:
    return evidence.sparse.criteria()


PAPERS: dict[str, Paper] = {
    "chatterjee": Paper("Chatterjee 2022", EVERYWHERE | {"full batch", "whole set", "attained infimum", "smooth"}, _chatterjee),
    "du": Paper(DU, EVERYWHERE | {"full batch", "whole set", "squared loss"}, _du),
    "allen_zhu": Paper(ALLEN_ZHU, EVERYWHERE | {"squared loss"}, _allen_zhu),
    "oymak_soltanolkotabi": Paper(OYMAK, EVERYWHERE | {"full batch", "whole set", "squared loss", "smooth"}, _oymak),
    "clipping": Paper(CLIPPING, EVERYWHERE - {"unclipped"} | {"full batch", "whole set", "attained infimum", "smooth"}, _clipping),
    "implicit_bias": Paper(FREI, EVERYWHERE | {"full batch"}, _implicit_bias),
    "bias_ntk": Paper(YANG, EVERYWHERE | {"full batch", "squared loss"}, _bias_ntk),
    "kawaguchi_sun": Paper(KAWAGUCHI, frozenset({"smooth", "fixed data"}), _kawaguchi_sun, lambda evidence: evidence.phase_two),
}  # fmt: skip
"""Name -> what it asks for and how it is judged."""
